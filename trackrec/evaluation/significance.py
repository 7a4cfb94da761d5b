"""Is the feature's gain more than the seeds' noise? Paired over seeds: each seed's model with it against without it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """Two arms on one metric; `difference` is ours minus base."""

    seeds: int
    base: float
    base_std: float
    ours: float
    ours_std: float
    difference: float
    # 95 % percentile interval of the mean difference by bootstrap over the seeds.
    low: float
    high: float
    # Two-sided paired t-test; None where all differences are alike, so that there is no spread to test against.
    p_value: float | None


def compare(base: Sequence[float], ours: Sequence[float], *, seed: int = 0) -> Comparison:
    """
    Args:
        base, ours: one value a seed, in the same order of seeds.

    Raises:
        ValueError: fewer than two seeds, or not as many on both sides.
    """
    a, b = np.asarray(base, dtype=np.float64), np.asarray(ours, dtype=np.float64)
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a paired test needs the same two or more seeds on both sides (got {len(a)} and {len(b)})")
    differences = b - a
    draws = np.random.default_rng(seed).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), [0.025, 0.975])
    alike = np.allclose(differences, differences[0], rtol=0, atol=1e-12)
    return Comparison(
        seeds=len(a),
        base=float(a.mean()),
        base_std=float(a.std(ddof=1)),
        ours=float(b.mean()),
        ours_std=float(b.std(ddof=1)),
        difference=float(differences.mean()),
        low=float(low),
        high=float(high),
        p_value=None if alike else float(stats.ttest_rel(b, a).pvalue),
    )
