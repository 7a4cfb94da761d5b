"""CoT preference alignment: G is trained on its validator's preferences (paper 3.2.2; Algorithm 2, stage 1)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trackrec import seeds, storage
from trackrec.align.launching import Launch, launch
from trackrec.align.sdpo_trainer import PreferenceSet, align
from trackrec.config import SdpoSettings
from trackrec.data import schema
from trackrec.llm.models import check_whole
from trackrec.prompts.render import cot_prompt


def run(
    settings: SdpoSettings,
    *,
    contexts: Path,
    preferences: Path,
    base_model: Path,
    generator: Path,
    aligned: Path,
    seed: int = 0,
    iteration: int = 0,
    launch: Launch = launch,
) -> None:
    """Writes G, trained on from `generator`, to `aligned`.

    Args:
        generator: the base model itself, or an earlier G. As it is now, it is the reference.
        launch: where the training runs.
    """
    inputs = {"contexts": contexts, "preferences": preferences, "base_model": base_model, "generator": generator}
    with storage.publish(
        "sdpo", settings, inputs=inputs, outputs={"aligned": aligned}, seed=f"{seed}/{iteration}"
    ) as job:
        check_whole(base_model, generator)
        order = seeds.derive(seed, "sdpo", iteration)
        job.facts |= launch(train, settings, inputs, job.outputs["aligned"], job.work, order)


def train(settings: SdpoSettings, inputs: Mapping[str, Path], out: Path, work: Path, seed: int) -> dict[str, Any]:
    """One process of the training; `inputs` as `run` names them."""
    sets = preference_sets(inputs["contexts"], inputs["preferences"])
    return align(settings, sets, inputs["base_model"], inputs["generator"], out, work, seed)


def preference_sets(contexts: Path, preferences: Path) -> list[PreferenceSet]:
    """The preference sets joined with their contexts' prompts.

    Raises:
        KeyError: a preference set's context is not in `contexts`.
    """
    shown = {row["context_id"]: row for row in schema.rows(contexts, "contexts", ["context_id", "domain", "history"])}
    sets = []
    for row in schema.rows(preferences, "preferences"):
        if row["context_id"] not in shown:
            raise KeyError(
                f"{contexts} lacks context {row['context_id']} of {preferences}; give those it was made from"
            )
        context = shown[row["context_id"]]
        sets.append(
            PreferenceSet(
                context_id=row["context_id"],
                prompt=cot_prompt(context["domain"], context["history"]),
                chosen=row["chosen"],
                rejected=row["rejected"],
                chosen_finished=row["chosen_finished"],
                rejected_finished=row["rejected_finished"],
            )
        )
    return sets
