"""What an A/B test found (paper 4.3, Table 4): lifts in revenue and CVR, overall and on the long tail, with intervals.

Revenue is per user of the bucket, CVR is conversions per click (per impression, where the log has no clicks). A user
counts in the long tail's rows, too, with zeros where none of the user's rows is of it: who is compared stays who was
randomised.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from trackrec.abtest.log import TAIL, Users
from trackrec.abtest.moments import Moments, Ratio, Vector, estimate, lift, sample_ratio, theta
from trackrec.abtest.resampling import Bootstrap, Halvings, lifts

Metric = Literal["revenue", "cvr"]
Slice = Literal["long-tail", "all"]
# Below this p-value the buckets are not what was randomised, and neither is anything measured on them. Low, since a
# healthy experiment should meet it once in a thousand looks (Fabijan et al., 2019).
MISMATCH = 0.001
# The columns of a half's moments.
_HALF = Ratio(0, 1)


class Row(BaseModel):
    """One metric on one slice."""

    model_config = ConfigDict(extra="forbid")

    metric: Metric
    slice: Slice
    control: float | None = None
    treatment: float | None = None
    # Parts of the control's value: 0.02 is +2 %.
    lift: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    # The bootstrap's percentile interval of the same lift.
    bootstrap_low: float | None = None
    bootstrap_high: float | None = None
    # The share of the lift's variance that CUPED took away; null without covariates.
    variance_removed: float | None = None
    # Of halves of the control against each other, the share with a p-value below 1 - confidence.
    halvings_rejected: float | None = None
    # Why there is no lift.
    reason: str = ""


class Readout(BaseModel):
    """`abtest.json`."""

    model_config = ConfigDict(extra="forbid")

    control: str
    treatment: str
    rows: int
    # Users of every bucket in the log.
    users: dict[str, int]
    dropped_in_two_buckets: int
    in_no_bucket: int
    # What share of these two buckets' users was to be in the treatment, what is, and the chi-square test's p-value.
    expected_share: float
    observed_share: float
    sample_ratio_p_value: float
    cvr_per: Literal["click", "impression"]
    confidence: float
    resamples: int
    halvings: int
    seed: int
    covariates: list[str]
    # Users with no value, by covariate.
    without_value: dict[str, int]
    results: list[Row]

    @property
    def mismatch(self) -> bool:
        """Whether the lifts must not be read."""
        return self.sample_ratio_p_value < MISMATCH


@dataclass(frozen=True)
class Analysis:
    """How the numbers are made.

    Args:
        shares: of all users, the control's and the treatment's by design; only their ratio counts.
        per_click: CVR's denominator.
        resamples, halvings: 0 leaves out the bootstrap, the A/A check.
    """

    control: str
    treatment: str
    shares: tuple[float, float]
    per_click: bool = True
    covariates: tuple[str, ...] = ()
    confidence: float = 0.95
    resamples: int = 1000
    halvings: int = 400
    seed: int = 0


def read_out(users: Users, analysis: Analysis) -> Readout:
    """Reads each user once; memory does not grow with the users.

    Raises:
        ValueError: a covariate is the same for all users, or a bucket has a single user.
    """
    found, columns = users.found, users.columns
    asked = dict(_asked(columns, analysis.per_click))
    control, treatment = (_Side(users, bucket, analysis, list(asked.values())) for bucket in _buckets(analysis))
    covariates = list(range(len(columns) - len(analysis.covariates), len(columns)))
    for name, column in zip(analysis.covariates, covariates, strict=True):
        if not any(side.moments.comoments[column, column] > 0 for side in (control, treatment)):
            raise ValueError(f"the covariate {name} is the same for all users of each bucket; leave it out")
    counts = (found.users[analysis.control], found.users[analysis.treatment])
    if min(counts) < 2:
        raise ValueError(f"a bucket with a single user has no spread: {found.users}; collect more of the log")
    results = []
    for number, ((metric, where), ratio) in enumerate(asked.items()):
        results.append(_row(metric, where, ratio, number, control, treatment, covariates, analysis))
    return Readout(
        control=analysis.control,
        treatment=analysis.treatment,
        rows=found.rows,
        users=found.users,
        dropped_in_two_buckets=found.in_two,
        in_no_bucket=found.in_none,
        expected_share=analysis.shares[1] / sum(analysis.shares),
        observed_share=counts[1] / sum(counts),
        sample_ratio_p_value=sample_ratio(counts, analysis.shares),
        cvr_per="click" if analysis.per_click else "impression",
        confidence=analysis.confidence,
        resamples=analysis.resamples,
        halvings=analysis.halvings,
        seed=analysis.seed,
        covariates=list(analysis.covariates),
        without_value=found.without_value,
        results=results,
    )


def _buckets(analysis: Analysis) -> tuple[str, str]:
    return analysis.control, analysis.treatment


def _asked(columns: list[str], per_click: bool) -> Iterator[tuple[tuple[Metric, Slice], Ratio]]:
    slices: tuple[tuple[Slice, str], ...] = (("long-tail", TAIL), ("all", ""))
    for where, prefix in slices:
        if f"{prefix}revenue" in columns:
            yield ("revenue", where), Ratio(columns.index(f"{prefix}revenue"), columns.index("users"))
            under = f"{prefix}{'clicks' if per_click else 'impressions'}"
            yield ("cvr", where), Ratio(columns.index(f"{prefix}conversions"), columns.index(under))


class _Side:
    """One bucket: its moments, and its sums in each resample."""

    def __init__(self, users: Users, bucket: str, analysis: Analysis, ratios: list[Ratio]) -> None:
        columns = len(users.columns)
        # Each bucket's draws are its own, whatever the other holds.
        draws, halves = np.random.SeedSequence([analysis.seed, int(bucket == analysis.treatment)]).spawn(2)
        self.moments = Moments(columns)
        self.bootstrap = Bootstrap(analysis.resamples, columns, draws)
        halvings = analysis.halvings if bucket == analysis.control else 0
        self.halvings = Halvings(halvings, ratios, halves)
        for batch in users.batches(bucket):
            self.moments.add(batch)
            for check in (self.bootstrap, self.halvings):
                check.add(batch)


def _row(
    metric: Metric,
    where: Slice,
    ratio: Ratio,
    number: int,
    control: _Side,
    treatment: _Side,
    covariates: list[int],
    analysis: Analysis,
) -> Row:
    row = Row(metric=metric, slice=where)
    sides = (control.moments, treatment.moments)
    if not all(side.mean[ratio.under] > 0 for side in sides):
        row.reason = "a bucket has nothing to divide by there"
        return row
    before, after = (estimate(ratio, side) for side in sides)
    coefficients: Vector | None = None
    if covariates:
        coefficients = theta(ratio, sides, covariates)
        total = sum(side.users for side in sides)
        common = sum((side.mean[covariates] * (side.users / total) for side in sides), np.zeros(len(covariates)))
        raw = before.variance + after.variance
        before, after = (estimate(ratio, side, covariates, coefficients, common) for side in sides)
        row.variance_removed = _rounded(1 - (before.variance + after.variance) / raw) if raw else None
    row.control, row.treatment = _rounded(before.value), _rounded(after.value)
    found = lift(before, after, analysis.confidence)
    if isinstance(found, str):
        row.reason = found
        return row
    row.lift, row.low, row.high = _rounded(found.value), _rounded(found.low), _rounded(found.high)
    row.p_value = _rounded(found.p_value)
    if analysis.resamples:
        drawn = lifts(ratio, control.bootstrap.sums, treatment.bootstrap.sums, covariates, coefficients)
        drawn = drawn[np.isfinite(drawn)]
        tail = (1 - analysis.confidence) / 2
        if len(drawn):
            low, high = np.quantile(drawn, [tail, 1 - tail])
            row.bootstrap_low, row.bootstrap_high = _rounded(low), _rounded(high)
    if analysis.halvings:
        row.halvings_rejected = _rejected(control.halvings, number, analysis.confidence)
    return row


def _rejected(halvings: Halvings, number: int, confidence: float) -> float | None:
    tests = []
    for one, other in halvings.halves(number):
        if min(one.users, other.users) > 1 and one.mean[1] > 0 and other.mean[1] > 0:
            found = lift(estimate(_HALF, one), estimate(_HALF, other), confidence)
            tests += [] if isinstance(found, str) else [found.p_value < 1 - confidence]
    return _rounded(float(np.mean(tests))) if tests else None


def _rounded(value: float) -> float:
    """Ten digits: sums over rows in another order differ in the sixteenth."""
    return float(f"{value:.10g}")
