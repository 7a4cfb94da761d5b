import pytest

from trackrec.align.preferences import Tally, build


def recots(*texts: str, context: str = "c") -> list[dict]:
    """Texts that end in "…" were cut at the token limit."""
    return [
        {"context_id": context, "sample": i, "text": text, "finish_reason": "length" if text.endswith("…") else "stop"}
        for i, text in enumerate(texts)
    ]


def rewards(*by_sample: list[float], context: str = "c", first_row: int = 0) -> list[dict]:
    """One list a sample: its rewards on the context's examples."""
    return [
        {"context_id": context, "sample": sample, "row_id": first_row + example, "reward": reward}
        for sample, values in enumerate(by_sample)
        for example, reward in enumerate(values)
    ]


def test_best_mean_over_the_contexts_examples_is_chosen() -> None:
    # Means .5, .6, .4; on the first example alone sample 0 would win, on the second sample 2.
    sets, tally = build(recots("a", "b", "c…"), rewards([0.9, 0.1], [0.6, 0.6], [0.1, 0.7]), 0)
    assert sets == [
        {
            "context_id": "c",
            "chosen": "b",
            "rejected": ["a", "c…"],
            "chosen_reward": pytest.approx(0.6),
            "rejected_rewards": [pytest.approx(0.5), pytest.approx(0.4)],
            "chosen_finished": True,
            "rejected_finished": [True, False],
        }
    ]
    assert tally == Tally(contexts=1, preferences=1)


def test_of_equal_rewards_the_lowest_sample_is_chosen_whatever_the_order_of_rows() -> None:
    texts, scored = recots("a", "b", "c"), rewards([0.1], [0.7], [0.7])
    assert build(texts, scored, 0) == build(texts[::-1], scored[::-1], 0)
    assert build(texts, scored, 0)[0][0]["chosen"] == "b"


def test_equal_means_are_equal_in_whatever_order_they_are_summed() -> None:
    # .1 + .2 + .3 and .3 + .2 + .1 differ in the last bit when added one by one.
    sets, _ = build(recots("a", "b", "c"), rewards([0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.0, 0.0, 0.0]), 0)
    assert sets[0]["chosen"] == "a"


@pytest.mark.parametrize(("tolerance", "kept"), [(0.125, False), (0.124, True)])
def test_rewards_within_the_tolerance_drop_the_context(tolerance: float, kept: bool) -> None:
    # Exact in binary: the spread is .125, and the tolerance counts as equal.
    sets, tally = build(recots("a", "b", "c"), rewards([0.5], [0.625], [0.5625]), tolerance)
    assert (len(sets), tally.dropped_equal) == ((1, 0) if kept else (0, 1))


def test_the_chosen_text_over_again_is_no_negative() -> None:
    sets, tally = build(recots("a", "b", "a", "c"), rewards([0.9], [0.2], [0.9], [0.3]), 0)
    assert (sets[0]["chosen"], sets[0]["rejected"], sets[0]["rejected_rewards"]) == ("a", ["b", "c"], [0.2, 0.3])
    assert tally == Tally(contexts=1, preferences=1, removed_same_text=1)


def test_a_rejected_text_over_again_counts_twice() -> None:
    sets, _ = build(recots("a", "b", "b"), rewards([0.9], [0.2], [0.2]), 0)
    assert sets[0]["rejected"] == ["b", "b"]


def test_one_text_only_drops_the_context() -> None:
    # A scorer's rounding may give equal texts unequal rewards.
    sets, tally = build(recots("a", "a"), rewards([0.9], [0.8]), 0)
    assert sets == [] and tally == Tally(contexts=1, dropped_same_text=1)


def test_contexts_are_apart_and_in_order() -> None:
    sets, tally = build(
        recots("x", "y", context="k2") + recots("p", "q", context="k1") + recots("r", "s", context="k3"),
        rewards([0.2], [0.8], context="k2")
        + rewards([0.7], [0.1], context="k1", first_row=9)
        + rewards([0.5], [0.5], context="k3"),
        1e-6,
    )
    assert [(s["context_id"], s["chosen"]) for s in sets] == [("k1", "p"), ("k2", "y")]
    assert tally == Tally(contexts=3, preferences=2, dropped_equal=1)


@pytest.mark.parametrize(
    "scored",
    [
        rewards([0.1], [0.2]),  # sample 2 has no reward
        rewards([0.1], [0.2], [0.3], [0.4]),  # a reward without its sample
        rewards([0.1, 0.1], [0.2, 0.2], [0.3]),  # sample 2 on fewer examples
        rewards([0.1], [0.2], [0.3], context="other"),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(scored: list[dict]) -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        build(recots("a", "b", "c"), scored, 0)


def test_a_reward_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="a reward of context k is no number"):
        build(recots("a", "b", context="k"), rewards([0.1], [float("nan")], context="k"), 0)
