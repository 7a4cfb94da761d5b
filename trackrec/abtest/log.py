"""The log of an experiment, summed by user: users were randomised, so users are what is counted.

The log is Parquet, one file or a folder of them, with any number of rows a user: one an impression, say, or one a user
and day. Its columns (others are ignored):

    user_id       text or a whole number
    bucket        text; may be left out where a salt is given, from which `trackrec.abtest.bucketing` computes it
    conversions   a count, 0 or more
    revenue       in any one currency; a refund is negative
    impressions   a count; left out, every row is one
    clicks        a count; left out, CVR is per impression
    item_id       text or a whole number; only a long tail by number of impressions reads it
    long_tail     true or false: whether the row is of the long tail, as known before the test

A covariate (CUPED) is one more column: a value of the user from before the test, the same in each of the user's rows;
null for a user who was not there then.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
from numpy.typing import NDArray

from trackrec.abtest.bucketing import SLOT_SQL, Experiment

Matrix = NDArray[np.float64]
# Users held in memory at once; the bootstrap holds a weight for each of them and each resample.
BATCH = 4096
COUNTED = ("impressions", "clicks", "conversions", "revenue")
TAIL = "long_tail_"
_IDS = ("VARCHAR", "UUID", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER",
        "UBIGINT")  # fmt: skip
_NUMBERS = (*_IDS[2:], "FLOAT", "DOUBLE", "BOOLEAN")


class LogError(ValueError):
    """A log that cannot be read as one; the message says what to mend."""


@dataclass(frozen=True)
class Reading:
    """How a log is read.

    Args:
        experiment: gives each user's bucket; without it the column `bucket` does.
        covariates: columns of values from before the test.
        long_tail_items: the long tail is the items with at most so many impressions in the whole log; without it the
            column `long_tail` says what it is, where there is one.
    """

    control: str
    treatment: str
    experiment: Experiment | None = None
    covariates: tuple[str, ...] = ()
    long_tail_items: int | None = None
    memory_limit_bytes: int = 4 * 2**30


@dataclass(frozen=True)
class Found:
    """What a log holds."""

    rows: int
    # Users of every bucket there is; those in two are in none of these.
    users: dict[str, int]
    # Users in two buckets or more, dropped.
    in_two: int
    # Users that the experiment puts into no bucket.
    in_none: int
    has_clicks: bool
    has_long_tail: bool
    # Of each covariate, the users of the two buckets without a value: they are given the mean of the others.
    without_value: dict[str, int]


class Users:
    """The sums of each user of the two buckets; `columns` names those of a batch."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, found: Found, covariates: tuple[str, ...]) -> None:
        self._connection = connection
        self.found = found
        sums = [*COUNTED, *(TAIL + name for name in COUNTED if found.has_long_tail)]
        # A sum over the first column counts users.
        self.columns = ["users", *sums, *map(_before, covariates)]

    def batches(self, bucket: str) -> Iterator[Matrix]:
        """[users, columns], at most `BATCH` users each, by user id: the order is the same each time."""
        columns = ", ".join(_quoted(name) for name in self.columns)
        rows = self._connection.sql(f"SELECT {columns} FROM users WHERE bucket = $bucket", params={"bucket": bucket})
        for batch in rows.to_arrow_reader(BATCH):
            yield np.column_stack([column.to_numpy(zero_copy_only=False) for column in batch.columns])


@contextmanager
def summed(log: Path, reading: Reading) -> Iterator[Users]:
    """`log` summed by user, on disk and under the bound of memory, however many rows it has.

    Raises:
        LogError: there is no such log; it lacks a column or a bucket; or a column holds what it must not.
    """
    with (
        tempfile.TemporaryDirectory(prefix="trackrec-abtest-") as scratch,
        duckdb.connect(f"{scratch}/users.duckdb") as connection,
    ):
        connection.execute(f"SET memory_limit = '{reading.memory_limit_bytes}B'")
        yield _summed(connection, log, reading)


def _summed(connection: duckdb.DuckDBPyConnection, log: Path, reading: Reading) -> Users:
    if reading.control == reading.treatment:
        raise LogError(f"control and treatment are the same bucket, {reading.control!r}; name two")
    types = _opened(connection, log)
    has_clicks = "clicks" in types
    has_long_tail = reading.long_tail_items is not None or "long_tail" in types
    _check_columns(log, types, reading)
    tail = "FALSE"
    if reading.long_tail_items is not None:
        # Over all buckets, so that no bucket's own chance decides which items its lift is measured on.
        connection.execute(
            f"CREATE TABLE tail AS SELECT item_id FROM log GROUP BY item_id HAVING sum({_count('impressions', types)}) "
            "<= $most",
            {"most": reading.long_tail_items},
        )
        tail = "item_id IN (SELECT item_id FROM tail)"
    elif has_long_tail:
        tail = "long_tail"
    columns = [
        "CAST(user_id AS VARCHAR) AS user_id",
        f"{'CAST(bucket AS VARCHAR)' if 'bucket' in types else 'NULL'} AS bucket",
        *(f"{_count(name, types)} AS {name}" for name in COUNTED),
        f"{tail} AS tail",
        *(f"CAST({_quoted(name)} AS DOUBLE) AS {_quoted(_before(name))}" for name in reading.covariates),
    ]
    connection.execute(f"CREATE VIEW rows AS SELECT {', '.join(columns)} FROM log")
    rows = _checked_rows(connection, reading, types)
    _sum_by_user(connection, reading, has_bucket="bucket" in types)
    return Users(connection, _kept(connection, reading, rows, has_clicks, has_long_tail), reading.covariates)


def _opened(connection: duckdb.DuckDBPyConnection, log: Path) -> dict[str, str]:
    """Makes the view `log`; its columns' types by name."""
    files = sorted(log.rglob("*.parquet")) if log.is_dir() else [log]
    if not files or not files[0].is_file():
        raise LogError(f"{log} is no Parquet file and no folder with some; name the experiment's log")
    # In a file's name these are no pattern.
    names = [re.sub(r"[*?[]", r"[\g<0>]", str(path)).replace("'", "''") for path in files]
    listed = ", ".join(f"'{name}'" for name in names)
    try:
        connection.execute(f"CREATE VIEW log AS SELECT * FROM read_parquet([{listed}])")
    except duckdb.Error as error:
        raise LogError(f"{log} cannot be read as Parquet: {error}") from error
    described = connection.execute("DESCRIBE log").fetchall()
    return {name: kind for name, kind, *_ in described}


def _check_columns(log: Path, types: dict[str, str], reading: Reading) -> None:
    needed = ["user_id", "conversions", "revenue", *reading.covariates]
    needed += ["bucket"] if reading.experiment is None else []
    needed += ["item_id"] if reading.long_tail_items is not None else []
    if missing := [name for name in needed if name not in types]:
        salted = "; or give the salt that computes it" if missing == ["bucket"] else ""
        raise LogError(
            f"{log} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}{salted}. It has: {', '.join(types)}"
        )
    for name in (*COUNTED, *reading.covariates):
        if name in types and not _is_of(types[name], (*_NUMBERS, "DECIMAL")):
            raise LogError(f"column {name} of {log} is {types[name]}; make it a number")
    if not _is_of(types["user_id"], _IDS):
        raise LogError(f"column user_id of {log} is {types['user_id']}; make it text or a whole number")
    if reading.long_tail_items is None and types.get("long_tail", "BOOLEAN") != "BOOLEAN":
        raise LogError(f"column long_tail of {log} is {types['long_tail']}; make it true or false")


def _is_of(kind: str, kinds: tuple[str, ...]) -> bool:
    """`DECIMAL(18,2)` is of DECIMAL, the list `VARCHAR[]` is not of VARCHAR."""
    return kind.startswith(kinds) and not kind.endswith("]")


def _checked_rows(connection: duckdb.DuckDBPyConnection, reading: Reading, types: dict[str, str]) -> int:
    """How many rows there are, once all hold what they may."""
    bad = {"user_id": ("null", "user_id IS NULL"), "tail": ("null", "tail IS NULL")}
    if reading.experiment is None:
        bad["bucket"] = ("null", "bucket IS NULL")
    for name in COUNTED:
        wrong, says = f"{name} IS NULL OR NOT isfinite({name})", "null or not finite"
        if name != "revenue":
            wrong, says = f"{wrong} OR {name} < 0", f"{says}, or negative"
        bad[name] = (says, wrong)
    for covariate in reading.covariates:
        bad[_before(covariate)] = ("not finite", f"NOT isfinite({_quoted(_before(covariate))})")
    counts = ", ".join(f"count(*) FILTER ({wrong})" for _, wrong in bad.values())
    total, *found = connection.execute(f"SELECT count(*), {counts} FROM rows").fetchall()[0]
    for (name, (says, _)), count in zip(bad.items(), found, strict=True):
        if count:
            shown = {"tail": "item_id" if reading.long_tail_items is not None else "long_tail"}.get(name, name)
            fill = " (0 is what nothing counts as)" if name in COUNTED else ""
            raise LogError(f"{shown.removeprefix(_before(''))} is {says} in {count} of {total} rows; mend them{fill}")
    if not total:
        raise LogError("the log has no rows")
    return int(total)


def _sum_by_user(connection: duckdb.DuckDBPyConnection, reading: Reading, *, has_bucket: bool) -> None:
    """Makes the table `summed`, one row a user."""
    sums = [f"sum({name}) AS {name}" for name in COUNTED]
    sums += [f"coalesce(sum({name}) FILTER (tail), 0) AS {TAIL}{name}" for name in COUNTED]
    values = [_quoted(_before(name)) for name in reading.covariates]
    # Compared as well: a user with rows of both kinds has no one value.
    uneven = [f"min({value}) <> max({value}) OR count({value}) NOT IN (0, count(*))" for value in values]
    grouped = [
        "user_id",
        "min(bucket) AS logged",
        "min(bucket) <> max(bucket) AS in_two",
        *sums,
        *(f"min({value}) AS {value}" for value in values),
        *(f"{test} AS {_quoted(f'uneven_{name}')}" for name, test in zip(reading.covariates, uneven, strict=True)),
    ]
    connection.execute(f"CREATE TABLE summed AS SELECT {', '.join(grouped)} FROM rows GROUP BY user_id")
    for name in reading.covariates:
        [[count]] = connection.execute(f"SELECT count(*) FROM summed WHERE {_quoted(f'uneven_{name}')}").fetchall()
        if count:
            raise LogError(
                f"{name} has several values for {count} users; a covariate is of before the test, one value a user"
            )
    if reading.experiment is None:
        connection.execute("ALTER TABLE summed RENAME logged TO bucket")
        return
    experiment = reading.experiment
    names = {f"name_{number}": name for number, name in enumerate(experiment.shares)}
    cases = " ".join(f"WHEN slot < {end} THEN ${key}" for key, end in zip(names, experiment.ends, strict=True))
    connection.execute(
        f"CREATE TABLE placed AS SELECT *, CASE {cases} END AS bucket FROM (SELECT *, {SLOT_SQL} AS slot FROM summed)",
        {"salt": experiment.salt, **names},
    )
    connection.execute("DROP TABLE summed; ALTER TABLE placed RENAME TO summed")
    if has_bucket:
        [[count]] = connection.execute(
            # Serving says "" of a user outside the experiment.
            "SELECT count(*) FROM summed WHERE in_two OR nullif(logged, '') IS DISTINCT FROM bucket"
        ).fetchall()
        if count:
            raise LogError(
                f"the log has {count} users in another bucket than salt {experiment.salt!r} puts them; give the salt "
                "and shares that served them, or leave the salt out and go by the log"
            )


def _kept(
    connection: duckdb.DuckDBPyConnection, reading: Reading, rows: int, has_clicks: bool, has_long_tail: bool
) -> Found:
    """Makes the table `users`, of the two buckets alone."""
    counted = connection.execute(
        "SELECT CASE WHEN in_two THEN NULL ELSE bucket END AS place, coalesce(in_two, FALSE), count(*) FROM summed "
        "GROUP BY ALL ORDER BY place"
    ).fetchall()
    users = {place: count for place, _, count in counted if place is not None}
    compared = {"control": reading.control, "treatment": reading.treatment}
    if missing := [name for name in compared.values() if not users.get(name)]:
        raise LogError(
            f"the log has no user in bucket {' nor in '.join(map(repr, missing))}; it has: "
            + (", ".join(f"{name!r} ({count} users)" for name, count in users.items()) or "none")
        )
    which = "bucket IN ($control, $treatment) AND in_two IS NOT TRUE"
    values = [_quoted(_before(name)) for name in reading.covariates]
    found = connection.execute(
        f"SELECT {', '.join(['0', *(f'count(*) - count({v})' for v in values), *(f'count({v})' for v in values)])} "
        f"FROM summed WHERE {which}",
        compared,
    ).fetchall()[0][1:]
    without, known = found[: len(values)], found[len(values) :]
    for name, count in zip(reading.covariates, known, strict=True):
        if not count:
            raise LogError(f"no user of the two buckets has a value in {name}; leave this covariate out")
    filled = [f"coalesce({value}, avg({value}) OVER ()) AS {value}" for value in values]
    sums = [*COUNTED, *(TAIL + name for name in COUNTED)]
    connection.execute(
        f"CREATE TABLE users AS SELECT user_id, bucket, 1.0::DOUBLE AS users, {', '.join([*sums, *filled])} "
        f"FROM summed WHERE {which} ORDER BY bucket, user_id",
        compared,
    )
    in_two = sum(count for _, twice, count in counted if twice)
    in_none = sum(count for place, twice, count in counted if place is None and not twice)
    missing_values = dict(zip(reading.covariates, without, strict=True))
    return Found(rows, users, in_two, in_none, has_clicks, has_long_tail, missing_values)


def _count(name: str, types: dict[str, str]) -> str:
    """The column as a number; what an absent one stands for."""
    return f"CAST({name} AS DOUBLE)" if name in types else "1.0::DOUBLE" if name == "impressions" else "0.0::DOUBLE"


def _before(covariate: str) -> str:
    return f"before_{covariate}"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
