"""Interactions to active users: whom the batch feature job writes a RecCoT for, and from which history.

Written in Ibis, as the recipes are: all engines give the same rows. A user's prompt is the one that `contexts` of kind
`snapshot` has for a period that begins at the same moment.
"""

from datetime import UTC, datetime
from pathlib import Path

import ibis
from ibis import _
from ibis.expr.types import StructValue, Table

from trackrec import storage
from trackrec.config import Domain
from trackrec.data.recipe import drawn

_DAY = 86_400


def midnight_after(timestamp: int) -> int:
    """The first moment of the next day, UTC, in seconds since 1970."""
    return (timestamp // _DAY + 1) * _DAY


def partition(users: Path) -> str:
    """The partition that a published table `users` is for: its moment's day, UTC, as YYYY-MM-DD.

    Raises:
        NotPublishedError: it is no stage's output.
        LookupError: it is another stage's.
    """
    as_of = storage.read_manifest(users).facts.get("as_of")
    if as_of is None:
        raise LookupError(f"{users} does not tell its users' moment; give what the stage `active_users` wrote")
    return datetime.fromtimestamp(as_of, UTC).date().isoformat()


def newest(interactions: Table, as_of: int) -> Table:
    """Each user with an interaction before `as_of` (s), and the moment of the last such (user_id, newest)."""
    return interactions.filter(_.timestamp < as_of).group_by("user_id").agg(newest=_.timestamp.max())


def active(newest: Table, as_of: int, days: int) -> Table:
    """Those of `newest`'s users whose last interaction lies within the `days` before `as_of`."""
    return newest.filter(_.newest >= as_of - days * _DAY)


def sampled(active: Table, most: int | None, seed: int) -> Table:
    """At most so many of the users, drawn by a hash: the same ones on every day that they are active."""
    if most is None:
        return active
    place = ibis.row_number().over(order_by=[drawn(seed, _.user_id), _.user_id])
    return active.mutate(place=place).filter(_.place < most)


def users(kept: Table, interactions: Table, items: Table, *, as_of: int, domain: Domain, history_length: int) -> Table:
    """The `users` table: the users of `kept`, ordered, each with the last items before `as_of`, oldest first.

    Args:
        history_length: so many items.
    """
    before = interactions.filter(_.timestamp < as_of).semi_join(kept, "user_id")
    # A user's rows are numbered by time.
    back = ibis.row_number().over(group_by="user_id", order_by=_.row_id.desc())
    last = before.select("row_id", "user_id", "item_id", "rating", "label", back=back)
    last = last.filter(last.back < history_length)
    rows = last.left_join(items.select("item_id", known_title="title"), "item_id")
    # `row_id` comes first, so the structs sort by it.
    shown = ibis.struct(
        {
            "row_id": rows.row_id,
            "item_id": rows.item_id,
            "title": ibis.coalesce(rows.known_title, rows.item_id),
            "rating": rows.rating,
            "label": rows.label,
        }
    )
    found = rows.group_by("user_id").agg(rows=shown.collect())
    return found.order_by("user_id").select(
        "user_id",
        # Written as a number it would be 32 bits wide on DuckDB.
        as_of=ibis.literal(str(as_of)).cast("int64"),
        domain=ibis.literal(domain),
        history=found.rows.sort().map(_shown_item),
    )


def _shown_item(row: StructValue) -> StructValue:
    return ibis.struct({name: row[name] for name in ("item_id", "title", "rating", "label")})
