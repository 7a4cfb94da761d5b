import math

import pytest

from trackrec.evaluation.significance import compare


def test_by_hand() -> None:
    found = compare([0.70, 0.70, 0.70, 0.70], [0.71, 0.72, 0.73, 0.74])
    assert (found.seeds, found.base_std) == (4, pytest.approx(0))
    assert (found.base, found.ours, found.difference) == pytest.approx((0.70, 0.725, 0.025))
    # Differences .01 … .04: squared deviations from .025 sum to .0005, over n - 1.
    std = math.sqrt(0.0005 / 3)
    assert found.ours_std == pytest.approx(std)
    # Student's t with three degrees of freedom has a distribution function in closed form.
    t = 0.025 / (std / 2)
    x = t / math.sqrt(3)
    below = 0.5 + (x / (1 + x * x) + math.atan(x)) / math.pi
    assert found.p_value == pytest.approx(2 * (1 - below))
    assert found.p_value == pytest.approx(0.0305, abs=1e-4)


def test_a_loss_has_the_same_p() -> None:
    gain, loss = compare([0.70, 0.71, 0.70], [0.71, 0.74, 0.73]), compare([0.71, 0.74, 0.73], [0.70, 0.71, 0.70])
    assert loss.difference == pytest.approx(-gain.difference)
    assert loss.p_value == pytest.approx(gain.p_value)


def test_seeds_are_paired() -> None:
    # Seeds differ by far more than the arms: unpaired, the gain would drown.
    found = compare([0.60, 0.70, 0.80], [0.611, 0.710, 0.809])
    assert found.p_value is not None and found.p_value < 0.01


def test_interval_of_two_seeds() -> None:
    # A resample has the mean .01, .02 (half of them) or .03: the tails of a quarter each are beyond 2.5 %.
    found = compare([0.5, 0.5], [0.51, 0.53])
    assert (found.low, found.high) == pytest.approx((0.01, 0.03))


def test_interval_is_the_same_each_time() -> None:
    base, ours = [0.5, 0.52, 0.49, 0.51], [0.53, 0.5, 0.52, 0.55]
    found = compare(base, ours)
    assert found == compare(base, ours)
    assert found.low < found.difference < found.high


def test_no_spread_no_test() -> None:
    found = compare([0.5, 0.6, 0.7], [0.51, 0.61, 0.71])
    assert found.p_value is None
    assert (found.low, found.high) == pytest.approx((0.01, 0.01))


@pytest.mark.parametrize(("base", "ours"), [([0.5], [0.6]), ([], []), ([0.5, 0.6], [0.6])])
def test_needs_the_same_two_seeds(base: list[float], ours: list[float]) -> None:
    with pytest.raises(ValueError, match="same two or more seeds"):
        compare(base, ours)
