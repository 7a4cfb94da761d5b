import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackrec.evaluation.controls import shuffle_between_users


def owners(*counts: int) -> dict[str, frozenset[str]]:
    """`counts[k]` contexts of user k."""
    return {f"c{k}-{i}": frozenset({f"u{k}"}) for k, count in enumerate(counts) for i in range(count)}


@given(st.lists(st.integers(1, 12), min_size=2, max_size=12), st.integers(0, 2**32))
def test_a_permutation_in_which_no_user_keeps_a_text(counts: list[int], seed: int) -> None:
    counts[0] = min(counts[0], sum(counts[1:]))
    for user in range(1, len(counts)):
        counts[user] = min(counts[user], sum(counts) - counts[user])
    held = owners(*counts)
    givers = shuffle_between_users(held, seed)
    assert sorted(givers) == sorted(givers.values()) == sorted(held)
    assert all(held[receiver].isdisjoint(held[giver]) for receiver, giver in givers.items())
    assert givers == shuffle_between_users(dict(reversed(held.items())), seed)


def test_a_context_shared_by_users_goes_to_none_of_them() -> None:
    held = owners(2, 2, 2) | {"shared": frozenset({"u0", "u1"})}
    for seed in range(20):
        givers = shuffle_between_users(held, seed)
        assert all(held[receiver].isdisjoint(held[giver]) for receiver, giver in givers.items())


def test_a_context_of_everybody_keeps_its_text() -> None:
    """The empty history, which all begin with, under rolling contexts."""
    everybody = {"empty": frozenset({"u0", "u1", "u2"})}
    held = owners(2, 2, 2)
    givers = shuffle_between_users(held | everybody, 0)
    assert givers == shuffle_between_users(held, 0) | {"empty": "empty"}


def test_seeds_differ() -> None:
    held = owners(*[1] * 30)
    assert shuffle_between_users(held, 0) != shuffle_between_users(held, 1)


@pytest.mark.parametrize("counts", [(1,), (3, 2), (1, 4, 1)])
def test_a_user_with_more_than_half_is_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be shuffled between users"):
        shuffle_between_users(owners(*counts), 0)
