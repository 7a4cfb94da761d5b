"""A company's own impression log, Parquet or CSV, with a declared column mapping.

    raw/log.parquet | raw/log.csv | raw/log/*.parquet    one row an impression
    raw/items.parquet | raw/items.csv                    one row an item (optional: else the log's own title column)

or `raw` is the log's file itself. A log that outgrows one machine is named by a URI that the engine itself reads: on a
Spark server Parquet files laid out in the same way, on BigQuery the tables `log` and `items` of a dataset.
"""

import contextlib
import csv
import glob
import itertools
from collections.abc import Iterator
from pathlib import Path

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _
from ibis.expr.types import BooleanValue, Column, IntegerValue, Table, Value
from ibis.formats.pyarrow import PyArrowType

from trackrec.config import ImpressionLog
from trackrec.data import raw as raw_files
from trackrec.data.engine import Engine, EngineError
from trackrec.data.raw import RawDataError
from trackrec.data.recipe import at_least, part_by_time, seconds

# A log in many files has no line order: ties break by what the rows say.
TIES = ("part", "item_id", "unrated", "rating", "label")
# Which record of a CSV file a row is, beside the log's own columns.
_RECORD = "__record"
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}
# Seconds from 1970 on: what lies beyond, or before, is another unit or no time at all.
_YEAR_10000 = 253_402_300_800
# Ratings are kept as 32-bit floats.
_LARGEST_RATING = 3.4e38


def tables(engine: Engine, raw: Path | str, log: ImpressionLog, scratch: Path) -> tuple[Table, Table]:
    """The log's rows, labelled and split, and its items, ready for `recipe.interactions` and `recipe.items_of`.

    Args:
        raw: a file or folder of this machine, or the URI of a log that the engine itself reads.

    Raises:
        RawDataError: a file or column is missing, a file is broken, or a row lacks a value or has a wrong one.
        EngineError: the engine cannot read the URI.
    """
    needed = [log.user_id, log.item_id, log.timestamp, *(name for name in (log.label, log.rating) if name)]
    shown = [log.item_title, *log.item_attributes]
    found = _found(engine, raw, "log", [*needed, *shown], scratch)
    if found is None:
        raise RawDataError(
            f"{raw}: expected log.parquet, log.csv, a folder log/ of Parquet files, or the log's file itself"
            if isinstance(raw, Path)
            else f"{raw}: {engine.name} finds no log there (docs/data.md, Engines)"
        )
    table, path = found
    _require(table, needed, path)
    rows = _rows(table, log)
    _refuse_faults(engine, rows, path)
    found = _found(engine, raw, "items", [log.item_id, *shown], scratch)
    if found is None:
        # A log need not have titles; a column that is named must be there.
        named = [log.item_title] * (log.item_title != ImpressionLog.model_fields["item_title"].default)
        _require(table, [*named, *log.item_attributes], path)
        # Of an item's titles in the log, the newest is shown.
        return rows, _items(table.mutate(line=_seconds_of(table[log.timestamp], log)), log)
    items, path = found
    _require(items, [log.item_id, *shown], path)
    return rows, _items(items.mutate(line=ibis.literal(0, "int64")), log)


@contextlib.contextmanager
def naming_damage(raw: Path | str) -> Iterator[None]:
    """Tells a failure inside as what it is where one of the log's Parquet files is damaged; the engine may not name it.

    Raises:
        RawDataError: such a file cannot be read to its end.
    """
    try:
        yield
    except (RawDataError, EngineError):
        raise
    except Exception as error:  # each engine has its own
        if isinstance(raw, str):
            raise
        paths = [raw] if raw.is_file() else [_find(raw, "log"), _find(raw, "items")]
        for file in (file for path in paths if path and path.suffix != ".csv" for file in _parquet_files(path)):
            try:
                for _ in pq.ParquetFile(file).iter_batches():
                    pass
            except (pa.ArrowException, OSError) as damage:
                raise RawDataError(f"{file}: damaged: {' '.join(str(damage).split())}; copy it again") from error
        raise


def _find(folder: Path, name: str) -> Path | None:
    for candidate in (folder / f"{name}.parquet", folder / f"{name}.csv", folder / name):
        if candidate.exists():
            return candidate
    return None


def _found(
    engine: Engine, raw: Path | str, name: str, used: list[str], scratch: Path
) -> tuple[Table, Path | str] | None:
    """The raw data's table `name`, and what a message calls it."""
    if isinstance(raw, str):
        table = engine.remote(raw, name)
        return None if table is None else (table, f"{raw} ({name})")
    path = _find(raw, name) if raw.is_dir() else raw if name == "log" and raw.is_file() else None
    return None if path is None else (_read(engine, path, used, scratch / f"{name}.parquet"), path)


def _read(engine: Engine, path: Path, used: list[str], staged: Path) -> Table:
    """The file or folder as a table; a CSV file goes through a Parquet file at `staged`."""
    if path.suffix == ".csv":
        _stage_csv(path, staged)
        return engine.parquet(staged)
    files = _parquet_files(path)
    if not files:
        raise RawDataError(f"{path}: no Parquet file in it")
    expected = _types(files[0], used)
    for file in files[1:]:
        for name, kind in _types(file, used).items():
            if kind != expected[name]:
                raise RawDataError(f"{file}: column {name!r} is {kind}, but {expected[name]} in {files[0]}")
    return engine.parquet(f"{glob.escape(str(path))}/*.parquet" if path.is_dir() else path)


def _parquet_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def _types(file: Path, columns: list[str]) -> dict[str, str]:
    """The types of a Parquet file's `columns`, as the engines tell them apart."""
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise RawDataError(f"{file}: not a whole Parquet file: {error}") from error
    return {
        name: str(PyArrowType.to_ibis(schema.field(name).type)) if name in schema.names else "missing"
        for name in columns
    }


def _stage_csv(path: Path, out: Path) -> None:
    """Copies a CSV file into Parquet, values as text, with the number of each `record` beside them, as `_RECORD`."""
    first = next(raw_files.lines(path, "utf-8"), None)
    if first is None:
        raise RawDataError(f"{path}:1: empty; expected a header")
    try:
        # Spreadsheets mark UTF-8 with a byte order mark.
        header = next(csv.reader([first[1].removeprefix("\ufeff")], strict=True))
    except csv.Error as error:
        raise RawDataError(f"{path}:1: no header of a CSV file: {error}") from error
    # The engines do not tell upper from lower case.
    if len({name.lower() for name in header}) != len(header):
        raise RawDataError(f"{path}:1: a column's name twice: {', '.join(header)}")
    # Found out, the columns would be those of a broken line as well; stated, every line is held to them.
    columns = dict.fromkeys(header, "VARCHAR")
    query = f"""SELECT row_number() OVER () AS {_RECORD}, * FROM read_csv(
        ?, columns = ?, header = false, skip = 1, auto_detect = false, delim = ',', quote = '"', escape = '"',
        comment = '', nullstr = '', strict_mode = true)"""
    try:
        with duckdb.connect() as database:
            raw_files.copy_to_parquet(database, query, [str(path), columns], out)
    except duckdb.Error as error:
        # The parser counts rows, a blank line as one.
        lines = _lines_of_rows(path, blank=True)
        raise RawDataError(raw_files.csv_fault(path, str(error), lines)) from error


def _lines_of_rows(path: Path, *, blank: bool) -> Iterator[int]:
    """The line on which each row of a CSV file begins, the header first: quoted fields may span lines.

    Args:
        blank: whether a blank line is a row too.
    """
    csv.field_size_limit(1 << 30)  # a field is as long as the engine lets it be
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file, skipinitialspace=True)
        line = 1
        for row in reader:
            if row or blank:
                yield line
            line = reader.line_num + 1


def _require(table: Table, columns: list[str], path: Path | str) -> None:
    found = [name for name in table.columns if name != _RECORD]
    missing = [name for name in columns if name not in found]
    if missing:
        where = f"{path}:1" if isinstance(path, Path) and path.suffix == ".csv" else f"{path}"
        raise RawDataError(
            f"{where}: no column {', '.join(map(repr, missing))}; it has {', '.join(found)}. "
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
    broken_rating = (table[log.rating].notnull() & ~_is_rating(rating)) if log.rating else ibis.literal(False)
    ids = {"user_id": table[log.user_id].cast("string"), "item_id": table[log.item_id].cast("string")}
    missing = [timestamp.isnull(), *((value.isnull() | (value == "")) for value in ids.values())]
    fault = broken_rating | ~label.isin([0.0, 1.0]).fill_null(False)
    for condition in missing:
        fault = fault | condition
    record = table[_RECORD] if _RECORD in table.columns else ibis.null("int64")
    values = {"timestamp": timestamp, "rating": rating, "label": label}
    # `unrated`: engines differ in whether null comes first or last.
    rows = table.select(**ids, **values, unrated=rating.isnull(), fault=fault, record=record)
    return rows.mutate(part=part_by_time(rows.timestamp, seconds(log.valid_from), seconds(log.test_from)))


def _seconds_of(column: Column, log: ImpressionLog) -> IntegerValue:
    """Whole seconds since 1970, UTC; null where the value cannot be read."""
    if column.type().is_timestamp() or column.type().is_date():
        seconds = column.cast("timestamp").epoch_seconds() if column.type().is_date() else column.epoch_seconds()
    elif log.timestamp_unit == "iso8601":
        seconds = column.cast("string").try_cast("timestamp('UTC')").epoch_seconds()
    else:
        seconds = column.try_cast("float64") / _PER_SECOND[log.timestamp_unit]
    # Before it is made an integer, as which not every number can be written.
    known = (seconds >= 0) & (seconds < _YEAR_10000)
    return known.ifelse(seconds, None).floor().cast("int64")


def _is_rating(value: Value) -> BooleanValue:
    return (value.abs() <= _LARGEST_RATING).fill_null(False)


def _refuse_faults(engine: Engine, rows: Table, path: Path | str) -> None:
    faults = rows.filter(rows.fault)
    first = engine.fetched(faults.order_by("record").limit(1))
    if first:
        count = engine.fetched(faults.agg(count=_.count()))[0]["count"]
        row = {name: first[0][name] for name in ("user_id", "item_id", "timestamp", "rating", "label")}
        where = f"{path}"
        if isinstance(path, Path) and (record := first[0]["record"]):
            where += f":{next(itertools.islice(_lines_of_rows(path, blank=False), record, None))}"
        raise RawDataError(
            f"{where}: a row without user, item or readable time (1970 - 9999), a label other than 0 and 1, or a "
            f"rating that is no number: {row} ({count} such rows)"
        )


def _items(table: Table, log: ImpressionLog) -> Table:
    title = table[log.item_title].cast("string") if log.item_title in table.columns else ibis.null("string")
    named = [name for name in log.item_attributes if name in table.columns]
    # With the column's name, since one value may stand in two columns.
    shown = [ibis.literal(f"{name}=") + table[name].cast("string") for name in named]
    attributes = ibis.array(shown) if named else ibis.null("array<string>")
    rows = table.select("line", item_id=table[log.item_id].cast("string"), title=title, attributes=attributes)
    return rows.mutate(attributes=rows.attributes.filter(lambda text: text.notnull()))
