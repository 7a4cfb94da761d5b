"""Looking up results in a run's report: by backbone, feature, variant and iteration, and V's rows."""

from collections.abc import Iterable
from typing import Literal

from trackrec.config import Backbone
from trackrec.evaluation.rankings import Feature
from trackrec.evaluation.report import RankedBy, Report, Row, Variant
from trackrec.evaluation.results import SliceName

Metric = Literal["auc", "uauc", "acc", "log_loss"]


def arm_of(report: Report, backbone: Backbone, feature: Feature, iteration: int | None = None) -> RankedBy | None:
    """The full loop's result with the feature, at `iteration` or of none (it reads no G's texts)."""
    for found in report.rankings:
        arm = (found.ranking.backbone, found.ranking.feature, found.variant)
        if arm == (backbone, feature, "full") and found.iteration in (iteration, None):
            return found
    return None


def recots_of(report: Report, backbone: Backbone, variant: Variant) -> dict[int, RankedBy]:
    """By iteration."""
    return {
        found.iteration: found
        for found in report.rankings
        if (found.ranking.backbone, found.ranking.feature, found.variant) == (backbone, "recot", variant)
        and found.iteration is not None
    }


def validators_of(report: Report, variant: Variant) -> dict[int, Row]:
    """V's rows by iteration."""
    return {
        row.iteration: row
        for row in report.rows
        if row.kind == "iteration" and row.variant == variant and row.iteration is not None
    }


def labelled(report: Report, labels: Iterable[str]) -> Row | None:
    rows = {row.label: row for row in report.rows}
    return next((rows[label] for label in labels if label in rows), None)


def seed_values(found: RankedBy, where: SliceName, metric: Metric) -> dict[int, float]:
    """The metric by seed, of the seeds that have it."""
    measured = [(result.seed, result.slices[where]) for result in found.ranking.seeds if where in result.slices]
    values = ((seed, getattr(measures, metric)) for seed, measures in measured)
    return {seed: value for seed, value in values if value is not None}
