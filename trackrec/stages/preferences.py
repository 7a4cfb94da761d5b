"""Preference sets (paper eq. 2) from sampled RecCoTs and their rewards."""

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from trackrec import storage
from trackrec.align.preferences import build
from trackrec.config import PreferencesSettings
from trackrec.data import schema


class NothingToLearnError(ValueError):
    """No context tells its samples apart, so there is no preference set to train on."""


def run(settings: PreferencesSettings, *, recots: Path, rewards: Path, preferences: Path) -> None:
    """
    Facts: `contexts`, `preferences`, `dropped_equal`, `dropped_same_text`, `removed_same_text`, `mean_reward` over all
    rows of `rewards`, and over the sets the mean `chosen_reward` and `rejected_reward`.

    Raises:
        NothingToLearnError: every context was dropped.
    """
    inputs = {"recots": recots, "rewards": rewards}
    with storage.publish("preferences", settings, inputs=inputs, outputs={"preferences": preferences}) as job:
        scored: list[dict[str, Any]] = schema.rows(rewards, "rewards", ["context_id", "row_id", "sample", "reward"])
        sampled = schema.rows(recots, "recots", ["context_id", "sample", "text", "finish_reason"])
        sets, tally = build(sampled, scored, settings.tolerance)
        if not sets:
            raise NothingToLearnError(
                f"none of {tally.contexts} contexts gives a preference set: {tally.dropped_equal} have all rewards "
                f"within `preferences.tolerance` ({settings.tolerance:g}) of one another, {tally.dropped_same_text} "
                "have only one text. Raise `sample.temperature` or `sample.n`, sample more contexts, or lower it."
            )
        schema.write(job.outputs["preferences"], "preferences", sets)
        job.facts |= asdict(tally) | {
            "mean_reward": fmean(row["reward"] for row in scored),
            "chosen_reward": fmean(row["chosen_reward"] for row in sets),
            "rejected_reward": fmean(fmean(row["rejected_rewards"]) for row in sets),
        }
