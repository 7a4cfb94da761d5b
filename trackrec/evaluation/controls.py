"""Controls that tell what a RecCoT is worth: here, an example reads a text about somebody else."""

import random
from collections.abc import Mapping

# Random starts; only contexts shared by several users in part ever need a second one.
_STARTS = 100


def shuffle_between_users(owners: Mapping[str, frozenset[str]], seed: int) -> dict[str, str]:
    """For each context, the context whose RecCoT it gets: a permutation in which no text stays with a user of its own
    but those that are about everybody.

    A random permutation, in which each conflict is then swapped away. Where every context has one user, a swap is there
    to be found unless some user owns more than half of the contexts, and then no such permutation exists: of the n - k
    contexts that are not a user's, at most k - 1 hold one of the user's k texts while one is where it must not be.

    A context that shares a user with every other one (the empty history, which all users begin with) says nothing
    about any of them, and keeps its text.

    Args:
        owners: the users of each context (equal histories make one context for several users).

    Raises:
        ValueError: no such permutation was found.
    """
    everybodys = {name for name, users in owners.items() if _shares_with_all(name, users, owners)}
    receivers = sorted(owners.keys() - everybodys)
    rng = random.Random(seed)
    stuck = frozenset[str]().union(*owners.values())
    for _ in range(_STARTS if receivers else 0):
        givers = receivers.copy()
        rng.shuffle(givers)
        stuck = _swap_conflicts_away(receivers, givers, owners, rng)
        if not stuck:
            return dict(zip(receivers, givers, strict=True)) | {name: name for name in everybodys}
    raise ValueError(
        f"RecCoTs cannot be shuffled between users: too many of the {len(owners)} contexts are of user "
        f"{', '.join(sorted(stuck)[:3])}. Take contexts of more users (raise `contexts.max_test_contexts`), or run "
        "without this control (`loop.controls: false`, `ranking.controls_of: []`)."
    )


def _shares_with_all(name: str, users: frozenset[str], owners: Mapping[str, frozenset[str]]) -> bool:
    return not any(users.isdisjoint(others) for other, others in owners.items() if other != name)


def _swap_conflicts_away(
    receivers: list[str], givers: list[str], owners: Mapping[str, frozenset[str]], rng: random.Random
) -> frozenset[str]:
    """Changes `givers` in place; returns the users of a context that no swap helps, none when all are apart."""

    def apart(receiver: int, giver: int) -> bool:
        return owners[receivers[receiver]].isdisjoint(owners[givers[giver]])

    for i in range(len(receivers)):
        if apart(i, i):
            continue
        # From a random place on, so that the swaps do not gather at the first contexts.
        start = rng.randrange(len(receivers))
        candidates = ((start + step) % len(receivers) for step in range(len(receivers)))
        swap = next((j for j in candidates if apart(i, j) and apart(j, i)), None)
        if swap is None:
            return owners[receivers[i]]
        givers[i], givers[swap] = givers[swap], givers[i]
    return frozenset()
