import math

import numpy as np
import pytest
from scipy import stats

from trackrec.abtest.moments import Lift, Ratio, estimate, lift, theta
from trackrec.abtest.resampling import Bootstrap, Halvings, lifts

from .logs import BEFORE, CVR, REVENUE, moments, users


def seed(number: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(number)


def test_weights_are_poisson() -> None:
    """Each user's weight is Poisson(1), and no two resamples or users share one."""
    bootstrap = Bootstrap(20_000, 3, seed(1))
    bootstrap.add(np.eye(3))
    counts = [np.bincount(weights.astype(int), minlength=9) for weights in bootstrap.sums.T]
    expected = stats.poisson.pmf(np.arange(9), 1) * 20_000
    for count in counts:
        # Five and more are one class: fewer than a hundred draws have them.
        assert (
            stats.chisquare([*count[:5], count[5:].sum()], [*expected[:5], 20_000 - expected[:5].sum()]).pvalue > 1e-3
        )
    assert np.abs(np.corrcoef(bootstrap.sums.T) - np.eye(3)).max() < 0.03


@pytest.mark.parametrize("ratio", [REVENUE, CVR])
@pytest.mark.parametrize("cuped", [False, True])
def test_it_agrees_with_the_delta_method(ratio: Ratio, cuped: bool) -> None:
    random = np.random.default_rng(2)
    pair = [users(random, 4000), users(random, 4000, conversion=0.12)]
    sides, sums = [moments(given) for given in pair], []
    for number, given in enumerate(pair):
        bootstrap = Bootstrap(4000, 5, seed(number))
        for start in range(0, 4000, 700):
            bootstrap.add(given[start : start + 700])
        sums.append(bootstrap.sums)
    covariates = [BEFORE] if cuped else []
    coefficients = theta(ratio, sides, covariates) if cuped else None
    at = np.concatenate(pair)[:, covariates].mean(axis=0)
    before, after = (estimate(ratio, side, covariates, coefficients, at) for side in sides)
    found = lift(before, after, 0.95)
    assert isinstance(found, Lift)
    drawn = lifts(ratio, sums[0], sums[1], covariates, coefficients)
    assert drawn.mean() == pytest.approx(found.value, abs=0.1 * drawn.std())
    # Standard deviations of 4,000 draws are known to 1.1 %.
    assert drawn.std() == pytest.approx((found.high - found.low) / 2 / 1.959964, rel=0.05)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert abs(low - found.low) < 0.25 * drawn.std() and abs(high - found.high) < 0.25 * drawn.std()


def test_it_agrees_with_a_plain_bootstrap() -> None:
    """Which draws as many users as there are, with replacement, one resample at a time."""
    random = np.random.default_rng(3)
    given = users(random, 800)
    bootstrap = Bootstrap(4000, 5, seed(3))
    bootstrap.add(given)
    ours = bootstrap.sums[:, 2] / bootstrap.sums[:, 1]
    plain = []
    for _ in range(4000):
        drawn = given[random.integers(800, size=800)]
        plain.append(drawn[:, 2].sum() / drawn[:, 1].sum())
    assert ours.std() == pytest.approx(np.std(plain), rel=0.06)
    assert ours.mean() == pytest.approx(np.mean(plain), abs=0.1 * ours.std())


def test_halves_are_those_of_their_users() -> None:
    given = users(np.random.default_rng(4), 60)
    halvings = Halvings(3, [CVR, REVENUE], seed(4))
    halvings.add(given[:50])
    halvings.add(given[50:])
    heads = np.random.default_rng(seed(4))
    chosen = np.hstack(
        [heads.integers(2, size=(3, 50), dtype=np.uint8), heads.integers(2, size=(3, 10), dtype=np.uint8)]
    )
    for number, ratio in enumerate((CVR, REVENUE)):
        for found, flips in zip(halvings.halves(number), chosen.astype(bool), strict=True):
            for half, own in zip(found, (given[flips], given[~flips]), strict=True):
                expected = estimate(ratio, moments(own))
                assert half.users == len(own)
                assert estimate(Ratio(0, 1), half).value == pytest.approx(expected.value)
                assert math.isclose(estimate(Ratio(0, 1), half).variance, expected.variance, rel_tol=1e-6)
