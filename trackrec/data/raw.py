"""Reading raw text files strictly: whatever is wrong is reported with file and line.

Readers copy raw input, checked, into Parquet tables of one shape, so that the recipes see only sound rows:

    ratings: line (in the raw file, from 1), user_id, item_id, rating, timestamp (s, UTC)
    items:   line, item_id, title (null where the source has none), attributes (list of text)
"""

import contextlib
import gzip
import itertools
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

ITEMS = pa.schema(
    [
        ("line", pa.int64()),
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("attributes", pa.list_(pa.string())),
    ]
)
# A line of a text file is far shorter; a file without line ends is no text file.
_LONGEST_LINE = 1 << 20
# MovieLens has half stars at the finest, and opened in 1997: what lies outside is a digit too few or too many.
_RATINGS = (0.5, 5.0)
_TIMES = (788_918_400, 4_102_444_800)  # 1995 and 2100


class RawDataError(ValueError):
    """Raw input that is missing, truncated, mis-encoded or misshapen; the message starts with file and line."""


@contextlib.contextmanager
def scratch_database(memory_limit_bytes: int, scratch: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB that spills to `scratch` beyond `memory_limit_bytes`."""
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{memory_limit_bytes}B",
        "temp_directory": str(scratch / "spill"),
    }
    with duckdb.connect(config=config) as connection:
        yield connection


def find(raw: Path, name: str) -> Path:
    """The file `name` in the folder `raw`.

    Raises:
        RawDataError: there is none.
    """
    if not (raw / name).is_file():
        found = sorted(path.name for path in raw.iterdir()) if raw.is_dir() else []
        raise RawDataError(f"{raw}: expected a folder with {name}; found {', '.join(found) or 'no such folder'}")
    return raw / name


def unzip(archive: Path, members: list[str], out: Path) -> None:
    """Extracts `members` into `out`, flat; zipfile checks every member's checksum.

    Raises:
        RawDataError: the archive is truncated, damaged, or lacks a member.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as file:
            for member in members:
                (out / Path(member).name).write_bytes(file.read(member))
    except KeyError as error:
        raise RawDataError(f"{archive}: {error.args[0]}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise RawDataError(f"{archive}: damaged or truncated: {error}; download it again") from error


def lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line, without its line end.

    Raises:
        RawDataError: a line has no line end, is not in `encoding`, is blank, or holds control characters.
    """
    with path.open("rb") as file:
        for number, data in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), start=1):
            if not data.endswith(b"\n"):
                raise _cut_off(path, number)
            try:
                text = data.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise RawDataError(f"{path}:{number}: not {encoding}: {error.reason}") from error
            # Every byte string is latin-1, so a file in another encoding shows only by what its bytes would mean.
            if encoding == "latin-1" and (not data.isascii() and _is_utf8(data)):
                raise RawDataError(f"{path}:{number}: UTF-8, but this format is latin-1; use the file as distributed")
            if re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", text):
                raise RawDataError(f"{path}:{number}: control characters; is this text in {encoding}?")
            if not text.strip():
                raise RawDataError(f"{path}:{number}: blank line")
            yield number, text


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def stage_ratings(
    database: duckdb.DuckDBPyConnection, path: Path, delimiter: str, header: str | None, out: Path
) -> None:
    """Copies a text file of (user_id, item_id, rating, timestamp) into a `ratings` Parquet file, ids as integers.

    Raises:
        RawDataError: another header, a wrong field count, an empty or non-numeric field, a rating or time that
            MovieLens cannot have, a blank line, a last line without its end, or no row.
    """
    if header is not None:
        found = next(lines(path, "utf-8"), (1, ""))[1]
        if found != header:
            raise RawDataError(f"{path}:1: expected the header {header!r}, found {found!r}")
    first = 1 if header is None else 2
    expected = _count_lines(path) - first + 1
    columns = "{user_id: 'BIGINT', item_id: 'BIGINT', rating: 'DOUBLE', timestamp: 'BIGINT'}"
    try:
        database.execute(
            f"""CREATE OR REPLACE TEMP TABLE ratings AS
            SELECT row_number() OVER () + {first - 1} AS line, *
            FROM read_csv(?, delim = ?, header = false, skip = {first - 1}, columns = {columns}, auto_detect = false,
                          quote = '', escape = '', comment = '', strict_mode = true)""",
            [str(path), delimiter],
        )
    except duckdb.Error as error:
        raise RawDataError(csv_fault(path, str(error), itertools.count(1))) from error
    # The parser skips blank lines, and every later line number would be off.
    count = database.execute("SELECT count(*) FROM ratings").fetchall()[0][0]
    if count != expected:
        for _ in lines(path, "latin-1"):
            pass
        raise RawDataError(f"{path}: {count} ratings on {expected} lines")
    if not count:
        raise RawDataError(f"{path}:{first}: no ratings in it")
    faults = database.execute(
        """SELECT line, user_id, item_id, rating, timestamp FROM ratings
        WHERE (user_id IS NOT NULL AND item_id IS NOT NULL AND rating BETWEEN ? AND ? AND timestamp BETWEEN ? AND ?)
            IS NOT TRUE
        ORDER BY line LIMIT 1""",
        [*_RATINGS, *_TIMES],
    ).fetchall()
    if faults:
        line, *row = faults[0]
        raise RawDataError(
            f"{path}:{line}: an empty field, a rating outside 0.5 - 5, or a time outside 1995 - 2100: {row}"
        )
    copy_to_parquet(database, "FROM ratings", [], out)
    database.execute("DROP TABLE ratings")


def stage_items(items: list[dict[str, object]], out: Path) -> None:
    """Writes an `items` Parquet file."""
    pq.write_table(pa.Table.from_pylist(items, schema=ITEMS), out)


def stage_json(
    database: duckdb.DuckDBPyConnection, path: Path, columns: dict[str, str], query: str, required: str, out: Path
) -> None:
    """Copies gzipped JSON lines into Parquet, out of core.

    Args:
        columns: the keys to read and their SQL types.
        query: SQL over `{source}`, which has `line` and the columns.
        required: a condition every row must meet, over the query's columns.

    Raises:
        RawDataError: truncated or not gzip, a line that is no JSON object, a value of the wrong type, or a row that
            does not meet `required`.
    """
    # row_number() over a scan follows the file's order.
    spec = ", ".join(f"{name}: '{kind}'" for name, kind in columns.items())
    source = (
        f"(SELECT row_number() OVER () AS line, * FROM read_json(?, format = 'newline_delimited', "
        f"compression = 'gzip', columns = {{{spec}}}))"
    )
    try:
        copy_to_parquet(database, query.format(source=source), [str(path)], out)
    except duckdb.Error as error:
        raise RawDataError(_json_fault(path, str(error))) from error
    faults = database.execute(
        f"SELECT min(line), count(*) FROM read_parquet(?) WHERE ({required}) IS NOT TRUE", [str(out)]
    ).fetchall()
    if faults[0][1]:
        raise RawDataError(
            f"{path}:{faults[0][0]}: lacks a value (and {faults[0][1] - 1} more lines); needed: {required}"
        )


def copy_to_parquet(database: duckdb.DuckDBPyConnection, query: str, parameters: list[object], out: Path) -> None:
    """Streams a query's rows into a Parquet file."""
    # COPY takes no parameter for its target.
    target = str(out).replace("'", "''")
    database.execute(f"COPY ({query}) TO '{target}' (FORMAT parquet)", parameters)


def _count_lines(path: Path) -> int:
    """
    Raises:
        RawDataError: the last line has no line end.
    """
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            count, last = count + block.count(b"\n"), block[-1:]
    if last != b"\n":
        raise _cut_off(path, count + 1)
    return count


def _cut_off(path: Path, line: int) -> RawDataError:
    return RawDataError(f"{path}:{line}: cut off: the line has no end; download it again")


def csv_fault(path: Path, message: str, lines: Iterator[int]) -> str:
    """DuckDB's complaint about a text file, as `file:line: what`; its row k begins on the k-th of `lines`."""
    row = re.search(r"Line: (\d+)", message)
    # The parser's advice is about its own options; the first lines say what is wrong.
    what = message.split("Possible")[0].split("\n\n")[0].replace("\n", "; ")
    if not row:
        return f"{path}: {what}"
    line = next(itertools.islice(lines, int(row.group(1)) - 1, None), row.group(1))
    return f"{path}:{line}: {what}"


def _json_fault(path: Path, message: str) -> str:
    """DuckDB's line can be one off for malformed JSON, so the fault is looked for around it."""
    found = re.search(r"in line (\d+)", message)
    what = message.split("\n")[0]
    if not found:
        return f"{path}: {what}; if it is cut short, download it again"
    near = int(found.group(1))
    with gzip.open(path, "rb") as file:
        for number, line in itertools.islice(enumerate(file, start=1), max(near - 2, 0), near + 1):
            try:
                json.loads(line)
            except ValueError as error:
                return f"{path}:{number}: not JSON: {error}"
    return f"{path}:{near}: {what}"
