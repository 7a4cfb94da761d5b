import math

import pytest

from trackrec.align.feedback import reward


def test_the_reward_is_the_probability_of_what_the_user_did() -> None:
    assert reward(0.8, 0.2, label=1) == 0.8
    assert reward(0.8, 0.2, label=0) == 0.2


def test_the_reward_is_no_softmax_of_probabilities() -> None:
    """P(Yes) = .6 and P(No) = .2 among all tokens: eq. 1 gives .6 / .8, not e^.6 / (e^.6 + e^.2) = .599."""
    p_yes, p_no = 0.6, 0.2
    normalised = p_yes / (p_yes + p_no), p_no / (p_yes + p_no)
    assert reward(*normalised, label=1) == pytest.approx(0.75)
    assert reward(*normalised, label=1) != pytest.approx(math.exp(0.6) / (math.exp(0.6) + math.exp(0.2)), abs=0.1)
    with pytest.raises(ValueError, match=r"p_yes = 0\.6 and p_no = 0\.2 are not normalised"):
        reward(p_yes, p_no, label=1)
    with pytest.raises(ValueError, match="not normalised"):
        reward(math.nan, math.nan, label=1)


def test_a_tiny_probability_is_kept() -> None:
    assert reward(1.0, 1e-20, label=0) == 1e-20
