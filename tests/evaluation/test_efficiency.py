import math

import pytest

from trackrec.evaluation import efficiency
from trackrec.evaluation.efficiency import Efficiency, Texts, Timing

UNTUNED: Texts = {"a": (80, True), "b": (60, False), "c": (70, False), "d": (80, True), "left out": (1, False)}
ALIGNED: Texts = {"a": (40, False), "b": (50, False), "c": (45, False), "d": (80, True), "only here": (1, True)}
# Settings of both alike.
SLOW, FAST = Timing(5, 1.3, {"max_tokens": 80}), Timing(9, 0.65, {"max_tokens": 80})


def found(
    untuned: Texts = UNTUNED, aligned: Texts = ALIGNED, timings: tuple[Timing, Timing] = (SLOW, FAST)
) -> Efficiency:
    made = efficiency.measured((untuned, aligned), timings)
    assert made is not None
    return made


def test_by_hand() -> None:
    """On the four contexts that both have."""
    made = found()
    assert [(cost.model, cost.recots, cost.timed) for cost in made.costs] == [("untuned", 4, 5), ("aligned", 4, 9)]
    assert (made.untuned.mean_tokens, made.untuned.cut, made.untuned.seconds) == (72.5, 0.5, 1.3)
    assert (made.aligned.mean_tokens, made.aligned.cut, made.aligned.seconds) == (53.75, 0.25, 0.65)
    # Between the two longest, 50 and 80, at 95 % of three steps.
    assert made.aligned.p95_tokens == pytest.approx(50 + 0.85 * 30)
    # Differences -40, -10, -25, 0: mean -18.75, and a spread of 17.5 over four.
    spread = math.sqrt((21.25**2 + 8.75**2 + 6.25**2 + 18.75**2) / 3)
    assert made.difference == -18.75
    assert (made.low, made.high) == (
        pytest.approx(-18.75 - 1.96 * spread / 2), pytest.approx(-18.75 + 1.96 * spread / 2),
    )  # fmt: skip


def test_each_outcome_is_said() -> None:
    assert "are shorter: 53.8 tokens against 72.5 of the untuned model (-18.8" in found().verdict
    assert found().verdict.endswith("one takes 0.650 s against 1.300 s (0.50 times).")
    assert "are longer: 72.5 tokens against 53.8" in found(ALIGNED, UNTUNED, (FAST, SLOW)).verdict
    assert found(ALIGNED, UNTUNED, (FAST, SLOW)).verdict.endswith("(2.00 times).")
    noisy: Texts = {"a": (81, True), "b": (59, False), "c": (71, False), "d": (79, False)}
    assert "not told apart in length" in found(UNTUNED, noisy).verdict
    assert "not told apart" in found({"a": (9, False)}, {"a": (5, False)}).verdict


@pytest.mark.parametrize(
    ("timing", "reason"),
    [(Timing(0, 0.0, SLOW.settings), "killed try"), (Timing(9, 0.65, {"max_tokens": 512}), "different settings")],
)
def test_seconds_that_do_not_compare_are_not_shown(timing: Timing, reason: str) -> None:
    made = found(timings=(SLOW, timing))
    assert [cost.seconds for cost in made.costs] == [None, None]
    assert reason in made.verdict and "times" not in made.verdict
    assert "| aligned | 4 | 53.8 | 75.5 | 25% | – |" in efficiency.markdown(made)


def test_nothing_in_common_is_no_table() -> None:
    assert efficiency.measured(({"a": (1, False)}, {"b": (1, False)}), (SLOW, FAST)) is None


def test_markdown() -> None:
    lines = efficiency.markdown(found()).splitlines()
    assert lines[2:6] == [
        "| model | RecCoTs | mean tokens | p95 tokens | cut | s per RecCoT |",
        "| :--- | ---: | ---: | ---: | ---: | ---: |",
        "| untuned | 4 | 72.5 | 80.0 | 50% | 1.300 |",
        "| aligned | 4 | 53.8 | 75.5 | 25% | 0.650 |",
    ]
    assert "cut at the token limit would have been longer" in lines[-1]
