import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from trackrec.abtest.moments import Estimate, Lift, Ratio, estimate, lift, sample_ratio, theta

from .logs import BEFORE, CVR, REVENUE, moments, users

# Simulated experiments; a rate of 5 % is found within this of it in all but one in some thousand seeds.
EXPERIMENTS = 1500
TOLERANCE = 3.5 * math.sqrt(0.05 * 0.95 / EXPERIMENTS)


def test_by_hand() -> None:
    """Three users a bucket: CVR 3 of 12 clicks against 6 of 12."""
    control, treatment = (
        estimate(Ratio(1, 0), moments(np.array([[2.0, each], [4.0, each], [6.0, each]]))) for each in (1.0, 2.0)
    )
    # Of the control a - R b is .5, 0, -.5; by the mean of 4 clicks .125, 0, -.125, whose variance is 1/64.
    assert (control.value, control.variance) == (0.25, pytest.approx(1 / 64 / 3))
    assert (treatment.value, treatment.variance) == (0.5, pytest.approx(1 / 16 / 3))
    found = lift(control, treatment, 0.95)
    assert isinstance(found, Lift)
    # (.5 - .25 r)^2 = 1.96^2 (1/48 + r^2/192): .0424924 r^2 - .25 r + .1699696 = 0.
    assert (found.value, found.low, found.high) == (
        pytest.approx(1.0), pytest.approx(0.78446 - 1, abs=1e-4), pytest.approx(5.09901 - 1, abs=1e-4),
    )  # fmt: skip
    assert found.p_value == pytest.approx(2 * stats.norm.sf(math.sqrt(2.4)))


@given(
    st.tuples(st.floats(0.5, 2), st.floats(1e-6, 0.1)),
    st.tuples(st.floats(-1, 2), st.floats(1e-6, 0.1)),
    st.floats(0.6, 0.99),
)
def test_interval_and_p_value_say_the_same(
    control: tuple[float, float], treatment: tuple[float, float], confidence: float
) -> None:
    found = lift(Estimate(*control), Estimate(*treatment), confidence)
    if not isinstance(found, str):
        assert found.low < found.value < found.high
        assert abs(found.p_value - (1 - confidence)) < 1e-9 or (
            (found.low <= 0 <= found.high) == (found.p_value > 1 - confidence)
        )


def test_with_many_users_the_interval_is_the_delta_methods() -> None:
    control, treatment = Estimate(0.2, 1e-8), Estimate(0.21, 2e-8)
    found = lift(control, treatment, 0.95)
    assert isinstance(found, Lift)
    error = 1.05 * math.sqrt(2e-8 / 0.21**2 + 1e-8 / 0.2**2)
    assert (found.low, found.high) == (
        pytest.approx(0.05 - 1.959964 * error, rel=1e-4), pytest.approx(0.05 + 1.959964 * error, rel=1e-4),
    )  # fmt: skip


def test_moments_are_those_of_all_users_at_once() -> None:
    sums = users(np.random.default_rng(1), 2500) + 1e6
    for batch in (1, 999, 2500):
        found = moments(sums, batch)
        assert found.users == 2500
        np.testing.assert_allclose(found.mean, sums.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.comoments / 2499, np.cov(sums.T), rtol=1e-6, atol=1e-7)


def test_revenue_per_user_is_a_plain_mean() -> None:
    sums = users(np.random.default_rng(2), 500)
    found = estimate(REVENUE, moments(sums))
    assert found.value == pytest.approx(sums[:, 3].mean())
    assert math.sqrt(found.variance) == pytest.approx(stats.sem(sums[:, 3]))


def naive(sums: NDArray[np.float64]) -> Estimate:
    """CVR as if every click were a draw of its own."""
    rate = sums[:, 2].sum() / sums[:, 1].sum()
    return Estimate(rate, rate * (1 - rate) / sums[:, 1].sum())


@pytest.mark.parametrize("cuped", [False, True])
def test_no_lift_is_found_in_five_percent_of_a_a_tests(cuped: bool) -> None:
    random = np.random.default_rng(3)
    rejected = {"revenue": 0, "cvr": 0, "naive": 0}
    for _ in range(EXPERIMENTS):
        pair = [users(random, 300), users(random, 300)]
        for name, ratio in (("revenue", REVENUE), ("cvr", CVR)):
            rejected[name] += measured(ratio, pair, cuped).p_value < 0.05
        found = lift(naive(pair[0]), naive(pair[1]), 0.95)
        assert isinstance(found, Lift)
        rejected["naive"] += found.p_value < 0.05
    for name in ("revenue", "cvr"):
        assert abs(rejected[name] / EXPERIMENTS - 0.05) < TOLERANCE
    # The same would be seen if users' clicks were taken for independent.
    assert rejected["naive"] / EXPERIMENTS > 0.05 + TOLERANCE


def measured(ratio: Ratio, pair: list[NDArray[np.float64]], cuped: bool) -> Lift:
    control, treatment = (moments(sums) for sums in pair)
    if not cuped:
        found = lift(estimate(ratio, control), estimate(ratio, treatment), 0.95)
    else:
        coefficients = theta(ratio, (control, treatment), [BEFORE])
        at = np.concatenate(pair)[:, [BEFORE]].mean(axis=0)
        sides = [estimate(ratio, side, [BEFORE], coefficients, at) for side in (control, treatment)]
        found = lift(sides[0], sides[1], 0.95)
    assert isinstance(found, Lift)
    return found


@pytest.mark.parametrize("cuped", [False, True])
def test_the_true_lift_is_in_the_interval_in_ninety_five_percent(cuped: bool) -> None:
    """+10 % in both: conversions by themselves, and with them revenue."""
    random = np.random.default_rng(4)
    inside = {"revenue": 0, "cvr": 0}
    # The true one, from very many users: `users` caps a few users' rate, so it is not quite 10 %.
    large = [moments(users(np.random.default_rng(5), 1_000_000, conversion=rate)) for rate in (0.1, 0.11)]
    truth = {name: ratio.of(large[1]) / ratio.of(large[0]) - 1 for name, ratio in (("revenue", REVENUE), ("cvr", CVR))}
    assert truth["cvr"] == pytest.approx(0.1, abs=0.01)
    for _ in range(EXPERIMENTS):
        pair = [users(random, 400), users(random, 400, conversion=0.11)]
        for name, ratio in (("revenue", REVENUE), ("cvr", CVR)):
            found = measured(ratio, pair, cuped)
            inside[name] += found.low < truth[name] < found.high
    for name in inside:
        assert abs(inside[name] / EXPERIMENTS - 0.95) < TOLERANCE


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
def test_cuped_leaves_one_minus_rho_squared(rho: float) -> None:
    random = np.random.default_rng(6)
    sides = []
    for _ in range(2):
        before = random.normal(size=20_000)
        y = 5 + rho * before + math.sqrt(1 - rho**2) * random.normal(size=20_000)
        sides.append(moments(np.column_stack([np.ones(20_000), y, 3 * before + 7])))
    ratio = Ratio(1, 0)
    coefficients = theta(ratio, sides, [2])
    assert coefficients == pytest.approx([rho / 3], rel=0.05)
    for side in sides:
        kept = estimate(ratio, side, [2], coefficients, np.array([7.0])).variance / estimate(ratio, side).variance
        assert kept == pytest.approx(1 - rho**2, rel=0.05)


def test_theta_is_least_squares_within_the_buckets() -> None:
    random = np.random.default_rng(7)
    pair = [users(random, 300), users(random, 200, conversion=0.2)]
    pair = [np.column_stack([sums, random.normal(size=len(sums)) + sums[:, 1]]) for sums in pair]
    targets, sums = [], []
    for one in pair:
        ratio = one[:, 2].sum() / one[:, 1].sum()
        targets.append((one[:, 2] - ratio * one[:, 1]) / one[:, 1].mean())
        sums.append(one[:, 4:] - one[:, 4:].mean(axis=0))
    expected, *_ = np.linalg.lstsq(np.concatenate(sums), np.concatenate(targets), rcond=None)
    np.testing.assert_allclose(theta(CVR, [moments(one) for one in pair], [4, 5]), expected)


def test_covariates_that_say_the_same_twice() -> None:
    sums = users(np.random.default_rng(8), 400)
    pair = [moments(sums[:200]), moments(sums[200:])]
    doubled = np.column_stack([sums, 1e6 * sums[:, BEFORE]])
    twice = [moments(doubled[:200]), moments(doubled[200:])]
    once = estimate(REVENUE, pair[0], [4], theta(REVENUE, pair, [4]), sums[:, [4]].mean(axis=0))
    same = estimate(REVENUE, twice[0], [4, 5], theta(REVENUE, twice, [4, 5]), doubled[:, [4, 5]].mean(axis=0))
    assert (same.value, same.variance) == (pytest.approx(once.value), pytest.approx(once.variance))


@pytest.mark.parametrize(("value", "variance"), [(0.0, 0.0), (0.1, 0.01), (-1.0, 0.01)])
def test_a_control_of_about_nothing_has_no_lift(value: float, variance: float) -> None:
    found = lift(Estimate(value, variance), Estimate(0.2, 0.01), 0.95)
    assert isinstance(found, str) and "zero" in found


@pytest.mark.parametrize("users", [(5200, 4800), (5000, 5000), (5020, 4980), (101, 900)])
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.1, 0.2)])
def test_the_sample_ratio_is_a_chi_square_test(users: tuple[int, int], shares: tuple[float, float]) -> None:
    expected = np.array(shares) / sum(shares) * sum(users)
    assert sample_ratio(users, shares) == pytest.approx(stats.chisquare(users, expected).pvalue)
