"""Distillation: the generator's supervised fine-tuning on the teacher's RecCoTs (paper 3.5)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trackrec import seeds, storage
from trackrec.align import distillation
from trackrec.align.launching import Launch, launch
from trackrec.config import SftSettings
from trackrec.data import schema
from trackrec.prompts.render import cot_prompt


def run(
    settings: SftSettings,
    *,
    contexts: Path,
    recots: Path,
    base_model: Path,
    generator: Path,
    seed: int = 0,
    launch: Launch = launch,
) -> None:
    """Writes G, trained from the base model, to `generator`.

    Args:
        recots: the teacher's, one or more a context.
        launch: where the training runs.
    Raises:
        ValueError: a RecCoT of a context that is not among `contexts`.
    """
    inputs = {"contexts": contexts, "recots": recots, "base_model": base_model}
    with storage.publish("sft_generator", settings, inputs=inputs, outputs={"generator": generator}, seed=seed) as job:
        job.facts |= launch(train, settings, inputs, job.outputs["generator"], job.work, seed)


def train(settings: SftSettings, inputs: Mapping[str, Path], out: Path, work: Path, seed: int) -> dict[str, Any]:
    """One process of the training; `inputs` as `run` names them."""
    contexts, recots = inputs["contexts"], inputs["recots"]
    shown = {row["context_id"]: row for row in schema.rows(contexts, "contexts", ["context_id", "domain", "history"])}
    demonstrations = []
    for recot in schema.rows(recots, "recots"):
        context = shown.get(recot["context_id"])
        if context is None:
            raise ValueError(
                f"{recots} has a RecCoT for context {recot['context_id']}, which {contexts} has not; "
                "run `distill_data` again on these contexts"
            )
        demonstrations.append(
            distillation.Demonstration(
                context_id=recot["context_id"],
                prompt=cot_prompt(context["domain"], context["history"]),
                recot=recot["text"],
                finished=recot["finish_reason"] == "stop",
            )
        )
    return distillation.distil(
        settings, demonstrations, inputs["base_model"], out, work, seeds.derive(seed, "sft_generator")
    )
