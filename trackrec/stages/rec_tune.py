"""Rec-tuning of the validator on the generator's greedy RecCoTs (paper 3.4; Algorithm 2, stage 2)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trackrec import seeds, storage
from trackrec.align import rec_tuning
from trackrec.align.launching import Launch, launch
from trackrec.config import RecTuneSettings
from trackrec.data import schema
from trackrec.llm.models import check_whole


def run(
    settings: RecTuneSettings,
    *,
    examples: Path,
    contexts: Path,
    recots: Path | None,
    base_model: Path,
    validator: Path,
    tuned: Path,
    seed: int = 0,
    iteration: int = 0,
    launch: Launch = launch,
) -> None:
    """Writes V, trained on from `validator` with the train examples, to `tuned`.

    Args:
        recots: one for each train context; None tunes the control without RecCoTs (Figure 1).
        validator: the base model itself, or an earlier V.
        launch: where the training runs.
    """
    inputs = {"examples": examples, "contexts": contexts, "base_model": base_model, "validator": validator}
    if recots is not None:
        inputs["recots"] = recots
    with storage.publish(
        "rec_tune", settings, inputs=inputs, outputs={"tuned": tuned}, seed=f"{seed}/{iteration}"
    ) as job:
        check_whole(base_model, validator)
        order = seeds.derive(seed, "rec_tune", iteration)
        job.facts |= launch(train, settings, inputs, job.outputs["tuned"], job.work, order)


def train(settings: RecTuneSettings, inputs: Mapping[str, Path], out: Path, work: Path, seed: int) -> dict[str, Any]:
    """One process of the training; `inputs` as `run` names them, without `recots` for the control."""
    examples = train_examples(inputs["examples"], inputs["contexts"], inputs.get("recots"))
    data = draw(examples, settings.max_examples, seed)
    return rec_tuning.tune(settings, data, inputs["base_model"], inputs["validator"], out, work, seed)


def train_examples(examples: Path, contexts: Path, recots: Path | None) -> list[rec_tuning.Example]:
    """The train split joined with its contexts and, unless `recots` is None, each context's first RecCoT.

    Raises:
        ValueError: a context that a train example uses has no RecCoT.
    """
    shown = {row["context_id"]: row for row in schema.rows(contexts, "contexts", ["context_id", "domain", "history"])}
    texts: dict[str, str] = {}
    if recots is not None:
        texts = {row["context_id"]: row["text"] for row in schema.rows(recots, "recots") if row["sample"] == 0}
    joined = []
    for row in schema.rows(examples, "examples"):
        if row["split"] != "train":
            continue
        context = row["context_id"]
        if recots is not None and context not in texts:
            raise ValueError(f"{recots} has no RecCoT for context {context}; run `generate` on these contexts")
        joined.append(
            rec_tuning.Example(
                row_id=row["row_id"],
                domain=shown[context]["domain"],
                history=shown[context]["history"],
                title=row["title"],
                label=row["label"],
                recot=texts.get(context),
            )
        )
    return joined


def draw(examples: list[rec_tuning.Example], count: int | None, seed: int) -> list[rec_tuning.Example]:
    """All examples, or `count` of them drawn by a hash of `seed` and the row, in their order."""
    drawn = sorted(examples, key=lambda example: seeds.derive(seed, example.row_id))[:count]
    return sorted(drawn, key=lambda example: example.row_id)
