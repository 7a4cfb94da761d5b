"""The users' table as the job reads it: checked, in order, a block of rows at a time, however large it is."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trackrec import storage
from trackrec.data import schema
from trackrec.shards import WHOLE, Shard

log = logging.getLogger(__name__)

_TABLE = "users"
_ROWS_AT_ONCE = 4096
# A sorted copy that no job has begun with for so long is in use by none.
_KEPT_SECONDS = 7 * 86_400
# Bytes that are read of a column at once. Without a limit a whole row group is held, which may be the whole table.
_BUFFER = 1 << 20


class UsersError(ValueError):
    """A users' table that cannot be used; the message says what is wrong with which file or user."""


@dataclass(frozen=True)
class Users:
    """A table ordered strictly by `user_id`, in one or more files."""

    files: tuple[Path, ...]
    rows: int
    # Of what the user gave, whatever was sorted of it.
    content_hash: str

    def num_blocks(self, block_rows: int) -> int:
        return -(-self.rows // block_rows)

    def check_domain(self, domain: str) -> None:
        """
        Args:
            domain: what the generator was aligned on. Some users may be of another; they get a status.

        Raises:
            UsersError: all are of another.
        """
        for file in self.files:
            with _open(file) as opened:
                for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=["domain"]):
                    if pc.any(pc.equal(batch.column(0).cast(pa.string()), domain)).as_py():
                        return
        raise UsersError(
            f"{self.files[0]}: no user is of the domain {domain!r}, which the generator was aligned on: make the "
            "users' table for this generator, or serve the generator of their domain"
        )

    def blocks(self, block_rows: int, shard: Shard = WHOLE, skip: Sequence[int] = ()) -> Iterator[tuple[int, pa.Table]]:
        """Blocks k with k % `shard.of` == `shard.number` that are not in `skip`: k, and rows [k*block_rows, ...).

        Row groups without a wanted row are not read.
        """
        skipped = set(skip)
        start = 0
        waiting: list[pa.Table] = []
        for file in self.files:
            with _open(file) as opened:
                for group in range(opened.num_row_groups):
                    rows = opened.metadata.row_group(group).num_rows
                    first, last = start // block_rows, (start + rows - 1) // block_rows
                    if not any(_wanted(block, shard, skipped) for block in range(first, last + 1)):
                        start += rows
                        continue
                    for batch in opened.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=_columns()):
                        table = pa.Table.from_batches([batch]).cast(schema.TABLES[_TABLE])
                        while table.num_rows:
                            block, at = divmod(start, block_rows)
                            piece = table.slice(0, block_rows - at)
                            table = table.slice(piece.num_rows)
                            start += piece.num_rows
                            if not _wanted(block, shard, skipped):
                                continue
                            waiting.append(piece)
                            if start % block_rows == 0 or start == self.rows:
                                yield block, pa.concat_tables(waiting).combine_chunks()
                                waiting = []


def open_users(path: Path, work: Path) -> Users:
    """
    Args:
        path: a published directory with table `users`, a Parquet file, or a folder of such.
        work: where a table that is not in order is sorted, out of memory; needs DuckDB.

    Raises:
        UsersError: no table, an empty one, a user twice or without an id, or no order and no DuckDB.
        SchemaError: the columns are not those of table `users`.
        CorruptError: a published file has changed.
    """
    files = _files(path)
    content = storage.content_hash(path)
    for file in files:
        schema.check(pq.read_schema(file), _TABLE, str(file))
    if not _in_order(files):
        files = [_sorted(files, work / f"users-{content[:16]}.parquet")]
        if not _in_order(files):
            raise UsersError(f"{path}: could not be sorted by user_id; sort it before")
    rows = sum(pq.read_metadata(file).num_rows for file in files)
    if not rows:
        raise UsersError(f"{path} holds no users; see that active users were found")
    return Users(tuple(files), rows, content)


def day(path: Path) -> str:
    """The users' moment's day, UTC, as YYYY-MM-DD; of users of several moments, the last one's.

    Args:
        path: as of `open_users`.

    Raises:
        SchemaError, UsersError, CorruptError: as `open_users`.
    """
    last: int | None = None
    for file in _files(path):
        schema.check(pq.read_schema(file), _TABLE, str(file))
        with _open(file) as opened:
            for batch in opened.iter_batches(_ROWS_AT_ONCE * 16, columns=["as_of"]):
                moment = pc.max(batch.column(0)).as_py()
                last = moment if last is None or (moment is not None and moment > last) else last
    if last is None:
        raise UsersError(f"{path}: no user has a moment `as_of`; name the date to write (--dt)")
    return datetime.fromtimestamp(last, UTC).date().isoformat()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / storage.MANIFEST).is_file():
        file = schema.path_of(path, _TABLE)
        storage.verify(path, file.name)
        return [file]
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else []
    if not files:
        raise UsersError(
            f"{path}: no Parquet file is there; give the output of active_users, or a file of such a table"
        )
    return files


def _in_order(files: Sequence[Path]) -> bool:
    """Whether the ids ascend; those of neighbours are compared, so the table is read once and never held.

    Raises:
        UsersError: a user is there twice in a row, or has no id.
    """
    last: str | None = None
    for file in files:
        with _open(file) as opened:
            for batch in opened.iter_batches(_ROWS_AT_ONCE * 16, columns=["user_id"]):
                ids = batch.column(0).cast(pa.string())
                if ids.null_count:
                    raise UsersError(f"{file}: a row has no user_id; leave it out")
                try:
                    ids.validate(full=True)
                except pa.ArrowInvalid as error:
                    raise UsersError(f"{file}: a user_id is no UTF-8; leave it out ({error})") from error
                if last is not None:
                    ids = pa.concat_arrays([pa.array([last], pa.string()), ids])
                if len(ids) > 1:
                    before, after = ids[:-1], ids[1:]
                    if pc.any(pc.greater(before, after)).as_py():
                        return False
                    same = pc.equal(before, after)
                    if pc.any(same).as_py():
                        twice = before.filter(same)[0].as_py()
                        raise UsersError(f"{file}: user {twice!r} is there twice; keep one row a user")
                last = ids[-1].as_py() if len(ids) else last
    return True


def _sorted(files: Sequence[Path], target: Path) -> Path:
    """A sorted copy, made once for each content: pods of one machine share it, so none can delete it at its end."""
    with suppress(FileNotFoundError):
        os.utime(target)  # in use
    for left in target.parent.glob("*users-*.parquet*"):
        with suppress(FileNotFoundError):  # another pod was first
            if time.time() - left.stat().st_mtime > _KEPT_SECONDS:
                left.unlink()
    if target.is_file():
        return target
    try:
        import duckdb
    except ImportError as error:
        raise UsersError(
            f"{files[0]}: the users are not ordered by user_id, and DuckDB, which would sort them, is not installed; "
            "sort them, or `pip install 'trackrec[data]'`"
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    # One process sorts, others wait for it; a kill lets go.
    with target.with_name(f".{target.name}-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            log.info("sorting %s by user_id", files[0])
            waiting = target.with_name(f".{target.name}-part")
            spill = str(target.with_name(f".{target.name}-spill"))
            with duckdb.connect(config={"temp_directory": spill, "memory_limit": "1GB"}) as connection:
                connection.execute("SET preserve_insertion_order = false")
                source = connection.read_parquet([str(file) for file in files])  # noqa: F841 (the query names it)
                name = str(waiting).replace("'", "''")
                connection.execute(
                    f"COPY (SELECT {', '.join(_columns())} FROM source ORDER BY user_id) TO '{name}' "
                    "(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 20000)"
                )
            waiting.replace(target)
    return target


def _open(file: Path) -> pq.ParquetFile:
    return pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)


def _columns() -> list[str]:
    return schema.TABLES[_TABLE].names


def _wanted(block: int, shard: Shard, skip: set[int]) -> bool:
    return block % shard.of == shard.number and block not in skip
