"""The delta method's cross-checks, in one pass over users: a bootstrap, and halvings of the control (A/A)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trackrec.abtest.moments import Moments, Ratio

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]


def _poisson_table() -> NDArray[np.uint8]:
    """The Poisson(1) variate of each of 65,536 equally likely numbers: a draw is one look-up."""
    probabilities = np.exp(-1) / np.cumprod([1, *range(1, 9)])
    ends = np.round(np.cumsum(probabilities) * 2**16).astype(int)
    return np.searchsorted(ends, np.arange(2**16), side="right").astype(np.uint8)


_POISSON = _poisson_table()


class Bootstrap:
    """Poisson bootstrap over users: each counts Poisson(1) times in each resample, so users may come one by one.

    Args:
        resamples: how many.
        columns: of the batches.
    """

    def __init__(self, resamples: int, columns: int, seed: np.random.SeedSequence) -> None:
        self._random = np.random.default_rng(seed)
        # [resamples, columns].
        self.sums: Matrix = np.zeros((resamples, columns))

    def add(self, batch: Matrix) -> None:
        if not len(self.sums):
            return
        draws = self._random.integers(2**16, size=(len(self.sums), len(batch)), dtype=np.uint16)
        self.sums += _POISSON[draws].astype(np.float64) @ batch


def lifts(
    ratio: Ratio, control: Matrix, treatment: Matrix, covariates: Sequence[int] = (), coefficients: Vector | None = None
) -> Vector:
    """The metric's lift in each resample.

    Args:
        control, treatment: `Bootstrap.sums`; their first column counts users.
        covariates, coefficients: CUPED's columns and θ, which the resamples do not find anew.

    Returns:
        [resamples]; not a number where a resample has nothing to divide by.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        before, after = (sums[:, ratio.over] / sums[:, ratio.under] for sums in (control, treatment))
        if coefficients is not None:
            chosen, both = list(covariates), control + treatment
            common = both[:, chosen] / both[:, :1]
            before = before - (control[:, chosen] / control[:, :1] - common) @ coefficients
            after = after - (treatment[:, chosen] / treatment[:, :1] - common) @ coefficients
        found: Vector = np.where(before > 0, after / before - 1, np.nan)
    return found


class Halvings:
    """Random halves of one bucket against each other: no lift is there, so a p-value is below 5 % in 5 % of them.

    Where it is in many more, the delta method's normal approximation does not hold on these users (a few of them hold
    most of the revenue, say), and its intervals are too narrow.
    """

    def __init__(self, halvings: int, ratios: Sequence[Ratio], seed: np.random.SeedSequence) -> None:
        self._random = np.random.default_rng(seed)
        self._ratios = ratios
        width = 1 + 5 * len(ratios)
        self._half: Matrix = np.zeros((halvings, width))
        self._whole: Vector = np.zeros(width)

    def add(self, batch: Matrix) -> None:
        if not len(self._half):
            return
        powers = [np.ones((len(batch), 1))]
        for ratio in self._ratios:
            over, under = batch[:, ratio.over], batch[:, ratio.under]
            powers.append(np.column_stack([over, under, over * over, over * under, under * under]))
        found = np.hstack(powers)
        heads = self._random.integers(2, size=(len(self._half), len(batch)), dtype=np.uint8)
        self._half += heads.astype(np.float64) @ found
        self._whole += found.sum(axis=0)

    def halves(self, number: int) -> list[tuple[Moments, Moments]]:
        """Of each halving, both halves' moments of the ratio `number`: columns over and under."""
        own = slice(1 + 5 * number, 6 + 5 * number)
        both = []
        for half in self._half:
            other = self._whole - half
            both.append((_moments(half[0], half[own]), _moments(other[0], other[own])))
        return both


def _moments(users: float, sums: Vector) -> Moments:
    found = Moments(2)
    if users:
        found.users = int(users)
        found.mean = sums[:2] / users
        found.comoments = np.array([[sums[2], sums[3]], [sums[3], sums[4]]]) - users * np.outer(found.mean, found.mean)
    return found
