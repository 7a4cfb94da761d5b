"""Ratio metrics of a bucket from its users' sums: the delta method, with CUPED, and no user held in memory.

A metric is a ratio of two sums over users, R = Σ a / Σ b (CVR: conversions over clicks; revenue per user: b = 1).
Users are independent; a user's impressions are not. So R's variance is that of the mean over n users of the
linearisation (a - R b) / b̄ (Deng, Knoblich and Lu, 2018, Applying the Delta Method in Metric Analytics).

CUPED (Deng et al., 2013) takes θ (x̄ - x̄ of both buckets) off R: x is of before the test, so both buckets have the same
mean of it but for chance, and what chance moved in x it moved in R, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import erfc, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


class Moments:
    """Count, mean and co-moments of the columns of many users, added batch by batch (Chan et al., 1979)."""

    def __init__(self, columns: int) -> None:
        self.users = 0
        self.mean: Vector = np.zeros(columns)
        # Σ (x - mean)(x - mean)ᵀ over users.
        self.comoments: Matrix = np.zeros((columns, columns))

    def add(self, batch: Matrix) -> None:
        """
        Args:
            batch: [users, columns].
        """
        users, mean = len(batch), batch.mean(axis=0)
        centred, moved = batch - mean, mean - self.mean
        total = self.users + users
        self.comoments += centred.T @ centred + np.outer(moved, moved) * (self.users * users / total)
        self.mean += moved * (users / total)
        self.users = total


@dataclass(frozen=True)
class Ratio:
    """Which columns a metric divides: R = Σ over / Σ under."""

    over: int
    under: int

    def of(self, moments: Moments) -> float:
        return float(moments.mean[self.over] / moments.mean[self.under])

    def linearised(self, moments: Moments) -> Vector:
        """The weights of the columns in a user's part of R."""
        weights = np.zeros(len(moments.mean))
        weights[self.over] = 1 / moments.mean[self.under]
        weights[self.under] -= self.of(moments) / moments.mean[self.under]
        return weights


@dataclass(frozen=True)
class Estimate:
    """A metric of one bucket and the variance of that number."""

    value: float
    variance: float


@dataclass(frozen=True)
class Lift:
    """Treatment over control, minus 1, with its interval and the two-sided p-value of no lift."""

    value: float
    low: float
    high: float
    p_value: float


def theta(ratio: Ratio, buckets: Sequence[Moments], covariates: Sequence[int]) -> Vector:
    """The covariates' coefficients in the linearised metric, by least squares within both buckets together."""
    chosen = list(covariates)
    inner = sum((m.comoments[np.ix_(chosen, chosen)] for m in buckets), np.zeros((len(chosen), len(chosen))))
    outer = sum((m.comoments[chosen] @ ratio.linearised(m) for m in buckets), np.zeros(len(chosen)))
    # In units of each covariate's spread: the pseudo-inverse of covariates that say the same compares their sizes.
    spread = np.sqrt(np.diag(inner))
    found: Vector = np.linalg.pinv(inner / np.outer(spread, spread), hermitian=True) @ (outer / spread) / spread
    return found


def estimate(
    ratio: Ratio,
    bucket: Moments,
    covariates: Sequence[int] = (),
    coefficients: Vector | None = None,
    at: Vector | None = None,
) -> Estimate:
    """
    Args:
        covariates, coefficients: CUPED's columns and θ; none of them leaves R as it is.
        at: the covariates' mean over both buckets.
    """
    weights, value = ratio.linearised(bucket), ratio.of(bucket)
    if coefficients is not None and at is not None:
        weights[list(covariates)] -= coefficients
        value -= float(coefficients @ (bucket.mean[list(covariates)] - at))
    variance = weights @ bucket.comoments @ weights / (bucket.users - 1) / bucket.users
    return Estimate(value, max(float(variance), 0.0))


def lift(control: Estimate, treatment: Estimate, confidence: float) -> Lift | str:
    """The test of no difference, and Fieller's interval (1954) for the ratio of two independent estimates, less 1.

    The interval holds the ratios r at which treatment - r control is not told from zero, so it leaves out zero just
    where p is below 1 - `confidence`. With many users it is the delta method's; with few, whose control may be off by a
    tenth, that one is too narrow. Without an interval: why.

    With CUPED both estimates hold the covariates' common mean, too. It cancels in their difference; in r it is left
    times the lift itself, and that product is left out.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    squared = control.value**2 - z**2 * control.variance
    if control.value <= 0 or squared <= 0:
        return "the control's value cannot be told from zero, so nothing can be measured in parts of it"
    variance = control.variance + treatment.variance
    if variance == 0:
        return "no user differs from another, so there is no spread to judge the lift by"
    product = control.value * treatment.value
    root = sqrt(product**2 - squared * (treatment.value**2 - z**2 * treatment.variance))
    return Lift(
        treatment.value / control.value - 1,
        (product - root) / squared - 1,
        (product + root) / squared - 1,
        erfc(abs(treatment.value - control.value) / sqrt(2 * variance)),
    )


def sample_ratio(users: tuple[int, int], shares: tuple[float, float]) -> float:
    """The p-value of the chi-square test that the two buckets' users are as many as their shares say."""
    expected = [sum(users) * share / sum(shares) for share in shares]
    chi_square = sum((found - asked) ** 2 / asked for found, asked in zip(users, expected, strict=True))
    # Of one degree of freedom: the square of a normal.
    return erfc(sqrt(chi_square / 2))
