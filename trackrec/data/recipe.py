"""The recipes that turn ratings into interactions: labels, windows, splits, ties and histories.

Written once in Ibis, so that DuckDB and Spark run the same expressions and give the same rows. `ratings` and `items`
come in as `trackrec.data.raw` describes. Inside, `part` is the split as a number (0 train, 1 valid, 2 test): sorted by
time.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

import ibis
from ibis import _
from ibis.expr.types import FloatingValue, IntegerValue, NumericValue, StructValue, Table, Value

SPLITS = ("train", "valid", "test")
# CoLLM breaks ties of one user and moment by split, then the item's first line in the raw file, then the line.
FILE_ORDER = ("part", "first_line", "line")


def movielens_1m(ratings: Table) -> Table:
    """CoLLM's cut: June 2001 - March 2002 train, April - August 2002 valid, September 2002 - January 2003 test."""
    rows = _with_first_line(ratings)
    rows = rows.filter(rows.timestamp >= seconds("2001-06-01"), rows.timestamp < seconds("2003-02-01"))
    return rows.mutate(
        label=at_least(rows.rating, 4), part=part_by_time(rows.timestamp, seconds("2002-04-01"), seconds("2002-09-01"))
    )


def movielens_100k(ratings: Table) -> Table:
    """All rows: in time, the first 80 % train, the next 10 % valid, the last 10 % test."""
    rows = _with_first_line(ratings).mutate(share=_share_before("timestamp", "line"))
    part = ibis.cases((rows.share < 0.8, 0), (rows.share < 0.9, 1), else_=2)
    return rows.mutate(label=at_least(rows.rating, 4), part=part)


def amazon_book(ratings: Table, items: Table) -> Table:
    """CoLLM's cut of Amazon-Book: titled books, 2017, users and items of more than 20 rows (counted once, no k-core).

    January - November train; December in time order, its first half valid, the rest test.
    """
    titled = _with_first_line(ratings.semi_join(catalogue(items).filter(_.title.notnull()), "item_id"))
    year = titled.filter(titled.timestamp >= seconds("2017-01-01"), titled.timestamp < seconds("2018-01-01"))
    counted = year.mutate(of_user=_.count().over(group_by="user_id"), of_item=_.count().over(group_by="item_id"))
    rows = counted.filter(counted.of_user > 20, counted.of_item > 20)
    rows = rows.mutate(december=rows.timestamp >= seconds("2017-12-01"))
    rows = rows.mutate(share=_share_before("timestamp", "line", group_by="december"))
    part = ibis.cases((~rows.december, 0), (rows.share < 0.5, 1), else_=2)
    return rows.mutate(label=at_least(rows.rating, 5), part=part)


def interactions(rows: Table, ties: Sequence[str], max_history: int) -> Table:
    """The `interactions` table, ordered by user, time and `ties`; ids sort as they come (numbers as numbers).

    Args:
        rows: user_id, item_id, rating, timestamp (s), label (0 or 1), part, and the columns of `ties`.
        max_history: the longest history a row carries (its newest so many items): all of it would grow with the square
            of a user's rows.
    """
    rows = rows.mutate(
        item_id=rows.item_id.cast("string"),
        rating=rows.rating.cast("float32"),
        label=rows.label.cast("int8"),
        position=ibis.row_number().over(group_by="user_id", order_by=["timestamp", *ties]),
    )
    # A user's rows are gathered once, and each row takes its slice of them: far cheaper than a window of lists, and
    # what is sorted is small. `position` comes first, so the structs sort by it.
    row = ibis.struct({name: rows[name] for name in ("position", "item_id", "rating", "label", "part", "timestamp")})
    users = rows.group_by("user_id").agg(rows=row.collect())
    # The rows of the users before each: over all users at once, so without their rows.
    # As a float (exact to 2**53): DuckDB sums integers to 128 bits, which Ibis takes for 64.
    sizes = rows.group_by("user_id").agg(size=_.count().cast("float64"))
    sizes = sizes.mutate(before=(_.size.sum().over(order_by="user_id", rows=(None, 0)) - _.size).cast("int64"))
    users = users.mutate(rows=_.rows.sort()).join(sizes, "user_id")
    users = users.mutate(items=_.rows.map(_earlier_item)).order_by("user_id")
    # Unnesting in the select list keeps the order of the users and of their rows.
    rows = users.select("user_id", "before", "items", row=_.rows.unnest())
    position = rows.row["position"]
    part = rows.row["part"]
    return rows.select(
        row_id=rows.before + position,
        split=ibis.cases(*((part == number, name) for number, name in enumerate(SPLITS))),
        user_id=rows.user_id.cast("string"),
        item_id=rows.row["item_id"],
        label=rows.row["label"],
        rating=rows.row["rating"],
        timestamp=rows.row["timestamp"],
        history=rows["items"][ibis.greatest(position - max_history, 0) : position],
    )


def _earlier_item(row: StructValue) -> StructValue:
    return ibis.struct({name: row[name] for name in ("item_id", "rating", "label")})


def catalogue(items: Table) -> Table:
    """One row an item, the last of the file; a blank title is none."""
    last = items.mutate(
        after=ibis.row_number().over(group_by="item_id", order_by=[_.line.desc(), _.title.isnull(), _.title])
    )
    last = last.filter(last.after == 0)
    return last.select("item_id", "attributes", title=last.title.strip().nullif(""))


def items_of(rows: Table, items: Table) -> Table:
    """The `items` table: each item of `rows`, under its id where no title is known."""
    known = catalogue(items)
    seen = rows.select(item_id=rows.item_id.cast("string")).distinct()
    joined = seen.left_join(known, "item_id")
    return joined.order_by("item_id").select(
        "item_id",
        title=ibis.coalesce(joined.title, joined.item_id),
        attributes=joined.attributes.fill_null(ibis.literal([], type="array<string>")),
    )


def earlier(value: Value, group_by: str, order_by: str, count: int) -> Value:
    """The last `count` values before each row, oldest first; [] where there are none."""
    window = ibis.window(group_by=group_by, order_by=order_by, rows=(-count, -1))
    # An empty frame is NULL on DuckDB and [] on Spark.
    collected = value.collect().over(window)
    return collected.fill_null(ibis.literal([], type=collected.type()))


def drawn(seed: int, identity: Value) -> Value:
    """A draw that depends on the seed and the row alone: not on engine, order or sharding."""
    return (identity + f":{seed}").hexdigest("sha256")


def at_least(rating: NumericValue, threshold: float) -> IntegerValue:
    """1 for liked (`rating` reaches `threshold`), else 0."""
    return (rating >= threshold).cast("int8")


def part_by_time(timestamp: IntegerValue, valid_from: int, test_from: int) -> IntegerValue:
    """0 before `valid_from` (s), 2 from `test_from` on, 1 between."""
    return ibis.cases((timestamp < valid_from, 0), (timestamp < test_from, 1), else_=2)


def seconds(moment: str) -> int:
    """Seconds since 1970 of an ISO 8601 moment, UTC where it names no zone.

    Raises:
        ValueError: not ISO 8601.
    """
    parsed = datetime.fromisoformat(moment)
    return int((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp())


def _with_first_line(ratings: Table) -> Table:
    firsts = ratings.group_by("item_id").agg(first_line=_.line.min())
    return ratings.join(firsts, "item_id")


def _share_before(*order_by: str, group_by: str | None = None) -> FloatingValue:
    """The share, in [0, 1), of the (group's) rows that come before a row."""
    position = ibis.row_number().over(group_by=group_by, order_by=list(order_by))
    return position / _.count().over(group_by=group_by)
