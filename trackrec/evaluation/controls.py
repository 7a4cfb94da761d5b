"""Controls that tell what a RecCoT is worth: here, every example reads a text about somebody else."""

import random
from collections.abc import Mapping


def shuffle_between_users(owners: Mapping[str, frozenset[str]], seed: int) -> dict[str, str]:
    """For each context, the context whose RecCoT it gets: a permutation in which no text stays with a user of its own.

    A random permutation, in which each conflict is then swapped away. While no two contexts share only part of their
    users, a swap is there to be found unless one user owns more than half of the contexts, where no such permutation
    exists: of the n - k contexts that are not the user's, at most k - 1 hold one of the user's k texts.

    Args:
        owners: the users of each context (equal histories make one context for several users).

    Raises:
        ValueError: a conflict cannot be swapped away.
    """
    receivers = sorted(owners)
    givers = receivers.copy()
    rng = random.Random(seed)
    rng.shuffle(givers)

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
            users = ", ".join(sorted(owners[receivers[i]])[:3])
            raise ValueError(
                f"RecCoTs cannot be shuffled between users: too many of the {len(receivers)} evaluated contexts are of "
                f"user {users}. Evaluate more users (`contexts.max_{{split}}_contexts`), or set `loop.controls: false`."
            )
        givers[i], givers[swap] = givers[swap], givers[i]
    return dict(zip(receivers, givers, strict=True))
