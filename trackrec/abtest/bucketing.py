"""Which bucket of an experiment a user is in: the one function that serving and the read-out share.

    slot   = the first 8 hexadecimal digits of SHA-256("SALT:USER_ID" in UTF-8), as a whole number, modulo 10,000
    bucket = the buckets take consecutive slots from 0 on, in the order of the experiment, each as many as its share
             (0.1 is 1,000 slots); who has a slot beyond the last one is in none

So any language with SHA-256 gives the same answer (`SLOT_SQL` is DuckDB's), for a user id of any kind as text. The same
salt always puts a user into the same slot; another salt is another, independent draw, so that the users of an earlier
experiment do not stay together. Needs the standard library and pydantic alone.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SLOTS = 10_000
# The buckets of a test of the base model against TrackRec.
CONTROL, TREATMENT = "control", "treatment"
# The same slot in DuckDB; `salt` is a parameter of the statement.
SLOT_SQL = f"CAST('0x' || substr(sha256($salt || ':' || user_id), 1, 8) AS BIGINT) % {SLOTS}"


class Experiment(BaseModel):
    """Who sees what: `shares` of all users by bucket, in the order that the slots are given out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # No colon: "a:b" with user "c" would be "a" with user "b:c".
    salt: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    shares: Annotated[Mapping[str, Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _shares_are_whole_slots(self) -> Self:
        for bucket, share in self.shares.items():
            if abs(share * SLOTS - round(share * SLOTS)) > 1e-6:
                raise ValueError(f"the share of {bucket!r} is no whole number of 1/{SLOTS} (got {share:g})")
        if sum(round(share * SLOTS) for share in self.shares.values()) > SLOTS:
            raise ValueError(f"the shares add up to more than 1: {dict(self.shares)}")
        return self

    @property
    def ends(self) -> list[int]:
        """The first slot behind each bucket."""
        return list(accumulate(round(share * SLOTS) for share in self.shares.values()))

    def bucket(self, user_id: str | int) -> str | None:
        """The user's bucket; None outside the experiment."""
        place = bisect_right(self.ends, slot(self.salt, user_id))
        return [*self.shares, None][place]


def slot(salt: str, user_id: str | int) -> int:
    """From 0 to 9,999, evenly over users."""
    digest = hashlib.sha256(f"{salt}:{user_id}".encode()).hexdigest()
    return int(digest[:8], 16) % SLOTS
