"""One more row in the run's table: iterations, controls and the baseline side by side (Figure 5)."""

from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel

from trackrec import storage
from trackrec.data import schema
from trackrec.evaluation import report as reports
from trackrec.evaluation import results


class _Row(BaseModel):
    """What tells this row from the others; it goes into the manifest as the stage's settings."""

    label: str
    iteration: int
    kind: Literal["control", "iteration"]
    variant: reports.Variant


def run(
    *,
    label: str,
    iteration: int,
    kind: str,
    variant: str,
    metrics: Path,
    report: Path,
    previous: Path | None = None,
    rewards: Path | None = None,
    generator: Path | None = None,
) -> None:
    """Writes the rows of `previous` and one more to `report.json`, `report.csv` and `report.md`.

    Args:
        metrics: the evaluation that the row is about.
        previous: the report so far; without one, the report begins with the baseline.
        rewards: for the row's mean reward.
        generator: the aligned G, for the preference accuracy that its training measured.

    Raises:
        ValueError: `previous` was measured on other examples, or has a row of this label.
    """
    settings = _Row.model_validate({"label": label, "iteration": iteration, "kind": kind, "variant": variant})
    given = {"previous": previous, "rewards": rewards, "generator": generator}
    inputs = {"metrics": metrics} | {name: path for name, path in given.items() if path is not None}
    with storage.publish("tabulate", settings, inputs=inputs, outputs={"report": report}) as job:
        evaluation = results.read(metrics)
        row = reports.row_of(evaluation, label=label, kind=settings.kind, iteration=iteration, variant=settings.variant)
        if rewards is not None:
            row.mean_reward = _mean_reward(rewards)
        if generator is not None:
            facts = storage.read_manifest(generator).facts
            row.preference_accuracy, row.held_out_sets = facts.get("preference_accuracy"), facts.get("held_out")
        before = reports.start(evaluation) if previous is None else reports.read(previous)
        whole = reports.add(before, evaluation, row)
        reports.write(job.outputs["report"], whole)
        job.facts["rows"] = len(whole.rows)


def _mean_reward(rewards: Path) -> float:
    """Over all rows (an example and a sample each)."""
    rows: list[dict[str, Any]] = schema.rows(rewards, "rewards", ["reward"])
    return fmean(row["reward"] for row in rows)
