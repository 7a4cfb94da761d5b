"""The rankers of one backbone, with and without RecCoTs, added to the run's results."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from trackrec import storage
from trackrec.evaluation import rankings
from trackrec.evaluation import report as reports


class _Added(BaseModel):
    """Whose RecCoTs the rankers read; it goes into the manifest as the stage's settings."""

    variant: reports.Variant
    iteration: int


def run(*, variant: str, iteration: int, found: Sequence[Path], report: Path, previous: Path | None = None) -> None:
    """Writes what `previous` holds and the rankers' metrics to `report.json`, `report.csv` and `report.md`.

    Args:
        found: `metrics.json` of `train_ctr`, one an arm; what is there already and equal is left out.
        previous: the report so far; without one, a report that holds rankers alone begins.

    Raises:
        ValueError: another result of the same arm is there, or one measured on other rows.
    """
    settings = _Added.model_validate({"variant": variant, "iteration": iteration})
    inputs = {f"found {number}": path for number, path in enumerate(found)}
    if previous is not None:
        inputs["previous"] = previous
    with storage.publish("tabulate_ctr", settings, inputs=inputs, outputs={"report": report}) as job:
        read = [rankings.read(path) for path in found]
        whole = reports.empty(read[0].split) if previous is None else reports.read(previous)
        for ranking in read:
            without = ranking.feature == "none"
            whole = reports.add_ranking(
                whole,
                reports.RankedBy(
                    # Without the feature no loop plays a part: the result counts for every variant.
                    variant="full" if without else settings.variant,
                    iteration=None if without else settings.iteration,
                    ranking=ranking,
                ),
            )
        reports.write(job.outputs["report"], whole)
        job.facts |= {"rows": len(whole.rows), "rankings": len(whole.rankings)}
