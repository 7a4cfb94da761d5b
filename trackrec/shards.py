"""A stage's contexts cut into shards, so that several pods share them; all rows of a context lie in one shard."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Number `number` (from 0) of `of` shards.

    Raises:
        ValueError: there is no such shard.
    """

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise ValueError(f"there is no shard {self.number} of {self.of}; shards count from 0")

    def own(self, context_ids: Iterable[str]) -> list[str]:
        """This shard's contexts, sorted: one of `of` runs of neighbours whose sizes differ by one at most.

        Runs, so that the shards' tables one after the other are the whole table; none is longer to work on than
        another, since a context_id is a hash. Of fewer contexts than shards, some shards get none.
        """
        names = sorted(set(context_ids))
        return names[len(names) * self.number // self.of : len(names) * (self.number + 1) // self.of]

    def facts(self) -> dict[str, int]:
        """What a part's manifest says of it, so that `gather` sees which part is missing; the whole says nothing."""
        return {} if self == WHOLE else {"shard": self.number, "shards": self.of}


WHOLE = Shard()
