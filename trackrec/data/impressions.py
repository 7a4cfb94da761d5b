"""A company's own impression log, Parquet or CSV, with a declared column mapping.

    raw/log.parquet | raw/log.csv | raw/log/*.parquet    one row an impression
    raw/items.parquet | raw/items.csv                    one row an item (optional: else the log's own title column)

or `raw` is the log's file itself. Parquet is read by the engine where it lies, so a log may outgrow one machine.
"""

import csv
from pathlib import Path

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.backends import BaseBackend
from ibis.expr.types import BooleanValue, Column, Table, Value

from trackrec.config import ImpressionLog
from trackrec.data import raw as raw_files
from trackrec.data.raw import RawDataError
from trackrec.data.recipe import at_least, part_by_time, seconds

# A log in many files has no line order: ties break by what the rows say.
TIES = ("part", "item_id", "rating", "label")
# Where a row of a CSV file comes from, beside the log's own columns.
_LINE = "__line"
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}


def tables(connection: BaseBackend, raw: Path, log: ImpressionLog, scratch: Path) -> tuple[Table, Table]:
    """The log's rows, labelled and split, and its items, ready for `recipe.interactions` and `recipe.items_of`.

    Raises:
        RawDataError: a file or column is missing, a file is broken, or a row lacks a value or has a wrong one.
    """
    path = raw if raw.is_file() else _find(raw, "log")
    if path is None:
        raise RawDataError(
            f"{raw}: expected log.parquet, log.csv, a folder log/ of Parquet files, or the log's file itself"
        )
    table = _read(connection, path, scratch)
    needed = [log.user_id, log.item_id, log.timestamp, *(name for name in (log.label, log.rating) if name)]
    _require(table, needed, path)
    rows = _rows(table, log)
    _refuse_faults(rows, path)
    items_path = None if raw.is_file() else _find(raw, "items")
    if items_path is None:
        # Of an item's titles in the log, the newest is shown.
        return rows, _items(table.mutate(line=_seconds_of(table[log.timestamp], log)), log)
    items = _read(connection, items_path, scratch)
    _require(items, [log.item_id, log.item_title, *log.item_attributes], items_path)
    return rows, _items(items.mutate(line=ibis.literal(0, "int64")), log)


def _find(folder: Path, name: str) -> Path | None:
    for candidate in (folder / f"{name}.parquet", folder / f"{name}.csv", folder / name):
        if candidate.exists():
            return candidate
    return None


def _read(connection: BaseBackend, path: Path, scratch: Path) -> Table:
    if path.suffix == ".csv":
        path = _stage_csv(path, scratch / f"{path.stem}.parquet")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise RawDataError(f"{path}: no Parquet file in it")
    for file in files:
        try:
            pq.read_schema(file)
        except pa.ArrowInvalid as error:
            raise RawDataError(f"{file}: not a whole Parquet file: {error}") from error
    return connection.read_parquet(path / "*.parquet" if path.is_dir() else path)


def _stage_csv(path: Path, out: Path) -> Path:
    """Copies a CSV file into Parquet, values as text, with each record's `line` beside them, as `_LINE`."""
    header = next(csv.reader([next(raw_files.lines(path, "utf-8"), (1, ""))[1]]), [])
    if len(set(header)) != len(header):
        raise RawDataError(f"{path}:1: a column's name twice: {', '.join(header)}")
    # Found out, the columns would be those of a broken line as well; stated, every line is held to them.
    columns = dict.fromkeys(header, "VARCHAR")
    query = f"""SELECT row_number() OVER () + 1 AS {_LINE}, * FROM read_csv(
        ?, columns = ?, header = false, skip = 1, auto_detect = false, delim = ',', quote = '"', escape = '"',
        comment = '', nullstr = '', strict_mode = true)"""
    try:
        with duckdb.connect() as database:
            database.execute(f"COPY ({query}) TO '{out}' (FORMAT parquet)", [str(path), columns])
    except duckdb.Error as error:
        raise RawDataError(raw_files.csv_fault(path, str(error))) from error
    return out


def _require(table: Table, columns: list[str], path: Path) -> None:
    found = [name for name in table.columns if name != _LINE]
    missing = [name for name in columns if name not in found]
    if missing:
        raise RawDataError(
            f"{path}:1: no column {', '.join(map(repr, missing))}; it has {', '.join(found)}. "
            "Map the columns in `ingest.log`."
        )


def _rows(table: Table, log: ImpressionLog) -> Table:
    """The mapped columns, typed; what cannot be read is null, and `fault` says that a row must be refused."""
    timestamp = _seconds_of(table[log.timestamp], log)
    rating = table[log.rating].try_cast("float64") if log.rating else ibis.null("float64")
    if log.label:
        column = table[log.label]
        label = column.cast("float64") if column.type().is_boolean() else column.try_cast("float64")
    else:
        label = at_least(rating, log.liked_from or 0).cast("float64")
    broken_rating = (table[log.rating].notnull() & ~_is_number(rating)) if log.rating else ibis.literal(False)
    ids = {"user_id": table[log.user_id].cast("string"), "item_id": table[log.item_id].cast("string")}
    missing = [timestamp.isnull(), *((value.isnull() | (value == "")) for value in ids.values())]
    fault = broken_rating | ~label.isin([0.0, 1.0]).fill_null(False)
    for condition in missing:
        fault = fault | condition
    line = table[_LINE] if _LINE in table.columns else ibis.null("int64")
    rows = table.select(**ids, timestamp=timestamp, rating=rating, label=label, fault=fault, line=line)
    return rows.mutate(part=part_by_time(rows.timestamp, seconds(log.valid_from), seconds(log.test_from)))


def _seconds_of(column: Column, log: ImpressionLog) -> Value:
    """Whole seconds since 1970, UTC; null where the value cannot be read."""
    if column.type().is_timestamp():
        return column.epoch_seconds().cast("int64")
    if log.timestamp_unit == "iso8601":
        return column.cast("string").try_cast("timestamp('UTC')").epoch_seconds().cast("int64")
    number = column.try_cast("float64")
    return (
        _is_number(number)
        .ifelse((number / _PER_SECOND[log.timestamp_unit]).floor(), ibis.null("float64"))
        .cast("int64")
    )


def _is_number(value: Value) -> BooleanValue:
    return (value.notnull() & ~value.isnan() & ~value.isinf()).fill_null(False)


def _refuse_faults(rows: Table, path: Path) -> None:
    faults = rows.filter(rows.fault)
    first = faults.order_by("line").limit(1).to_pyarrow().to_pylist()
    if first:
        count = faults.count().to_pyarrow().as_py()
        row = {name: value for name, value in first[0].items() if name not in ("fault", "line", "part")}
        where = f"{path}:{first[0]['line']}" if first[0]["line"] else f"{path}"
        raise RawDataError(
            f"{where}: a row without user, item or readable time, a label other than 0 and 1, or a rating that is no "
            f"number: {row} ({count} such rows)"
        )


def _items(table: Table, log: ImpressionLog) -> Table:
    title = table[log.item_title].cast("string") if log.item_title in table.columns else ibis.null("string")
    named = [name for name in log.item_attributes if name in table.columns]
    attributes = ibis.array([table[name].cast("string") for name in named]) if named else ibis.null("array<string>")
    rows = table.select("line", item_id=table[log.item_id].cast("string"), title=title, attributes=attributes)
    return rows.mutate(attributes=rows.attributes.filter(lambda text: text.notnull()))
