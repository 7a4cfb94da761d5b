"""The tables' columns, once. A reader checks the schema before the first row.

A context is u_i: a user's history at a moment. An example is (u_i, i_i, y_i). `label` is 1 for liked (y = Yes), else 0.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trackrec import storage

_EARLIER_ITEM = pa.struct([("item_id", pa.string()), ("rating", pa.float32()), ("label", pa.int8())])
# A history as the prompt shows it: the title with its year, oldest first.
_SHOWN_ITEM = pa.struct([("title", pa.string()), ("rating", pa.float32()), ("label", pa.int8())])
# Both: what a prompt shows and what a ranker reads.
_EARLIER_SHOWN_ITEM = pa.struct([("item_id", pa.string()), *_SHOWN_ITEM])

TABLES: dict[str, pa.Schema] = {
    "interactions": pa.schema(
        [
            ("row_id", pa.int64()),
            ("split", pa.string()),
            ("user_id", pa.string()),
            ("item_id", pa.string()),
            ("label", pa.int8()),
            ("rating", pa.float32()),
            # Seconds since 1970, UTC.
            ("timestamp", pa.int64()),
            # The user's earlier interactions inside the window, oldest first.
            ("history", pa.list_(_EARLIER_ITEM)),
        ]
    ),
    "items": pa.schema([("item_id", pa.string()), ("title", pa.string()), ("attributes", pa.list_(pa.string()))]),
    "contexts": pa.schema(
        [
            # Hash of the domain and the history as rendered.
            ("context_id", pa.string()),
            # The earliest user and moment with this history; `split` is the earliest split that uses it.
            ("user_id", pa.string()),
            ("as_of", pa.int64()),
            ("split", pa.string()),
            ("domain", pa.string()),
            ("history", pa.list_(_SHOWN_ITEM)),
        ]
    ),
    "examples": pa.schema(
        [
            ("row_id", pa.int64()),
            ("split", pa.string()),
            ("context_id", pa.string()),
            ("user_id", pa.string()),
            ("item_id", pa.string()),
            ("title", pa.string()),
            ("label", pa.int8()),
            # Train rows of the user and of the item, over the whole train split: warm, cold and long-tail slices.
            ("user_train_rows", pa.int32()),
            ("item_train_rows", pa.int32()),
            # The baseline: the item's smoothed share of liked train rows. Null on train rows, whose label it holds.
            ("item_mean", pa.float64()),
        ]
    ),
    "recots": pa.schema(
        [
            ("context_id", pa.string()),
            # 0…N-1; greedy and recorded RecCoTs: 0.
            ("sample", pa.int32()),
            ("text", pa.string()),
            ("num_tokens", pa.int32()),
            # "stop" or "length".
            ("finish_reason", pa.string()),
            # What wrote it: a model's content hash, or the teacher's name.
            ("model", pa.string()),
        ]
    ),
    "rewards": pa.schema(
        [
            ("context_id", pa.string()),
            ("row_id", pa.int64()),
            ("sample", pa.int32()),
            # Normalised over {Yes, No}, so p_yes + p_no = 1.
            ("p_yes", pa.float64()),
            ("p_no", pa.float64()),
            # r_ij (eq. 1).
            ("reward", pa.float64()),
        ]
    ),
    "preferences": pa.schema(
        [
            ("context_id", pa.string()),
            ("chosen", pa.string()),
            ("rejected", pa.list_(pa.string())),
            ("chosen_reward", pa.float64()),
            ("rejected_rewards", pa.list_(pa.float64())),
            # Whether the text ended by itself ("stop"); one cut at the limit has no end-of-sequence token to learn.
            ("chosen_finished", pa.bool_()),
            ("rejected_finished", pa.list_(pa.bool_())),
        ]
    ),
    "predictions": pa.schema([("row_id", pa.int64()), ("score", pa.float64())]),
    # e^p (eq. 7): one vector a context, all of one width.
    "vectors": pa.schema([("context_id", pa.string()), ("vector", pa.list_(pa.float32()))]),
    # Whom the batch job writes features for, ordered by `user_id`, one row a user.
    "users": pa.schema(
        [
            ("user_id", pa.string()),
            # The job's moment: the history ends before it.
            ("as_of", pa.int64()),
            ("domain", pa.string()),
            ("history", pa.list_(_EARLIER_SHOWN_ITEM)),
        ]
    ),
    # What the batch job's pods did, one row a pod; `there` counts the files that an earlier try of it had finished.
    "feature_shards": pa.schema(
        [
            ("shard", pa.int32()),
            ("there", pa.int64()),
            ("rows", pa.int64()),
            ("copied", pa.int64()),
            ("generated", pa.int64()),
        ]
    ),
    # A ranker's P(liked), under each of its seeds.
    "ranked": pa.schema([("row_id", pa.int64()), ("seed", pa.int32()), ("score", pa.float64())]),
}

# What the rows of a data stage's table are ordered by.
ORDER = {
    "interactions": ["row_id"],
    "items": ["item_id"],
    "contexts": ["as_of", "context_id"],
    "examples": ["row_id"],
    "users": ["user_id"],
}


_COMPRESSION = "zstd"
# Rows; a table's bytes follow from its rows alone, so nothing but this cuts it into groups.
_ROW_GROUP = 1 << 20


class SchemaError(ValueError):
    """A table that lacks a column or has it in another type; the message names file, column and both types."""


def path_of(directory: Path, table: str) -> Path:
    return Path(directory) / f"{table}.parquet"


def check(schema: pa.Schema, table: str, where: str) -> None:
    """
    Raises:
        SchemaError: `schema` is not the table's.
    """
    for column in TABLES[table]:
        index = schema.get_field_index(column.name)
        if index < 0:
            raise SchemaError(f"{where}: column {column.name!r} of table {table!r} is missing; found {schema.names}")
        # Parquet writers name a list's element differently; the types are what counts.
        if not _same_type(schema.field(index).type, column.type):
            found = schema.field(index).type
            raise SchemaError(f"{where}: column {column.name!r} of table {table!r} is {found}, expected {column.type}")


def read(
    directory: Path, table: str, columns: list[str] | None = None, of_contexts: Collection[str] | None = None
) -> pa.Table:
    """A published table, its schema checked first.

    Args:
        of_contexts: only the rows of these contexts; the others are left out as the file is read.

    Raises:
        NotPublishedError: the directory has no manifest, so it may be half written.
        CorruptError: the file is missing, or was changed since it was published.
        SchemaError: the file's columns are not the table's.
    """
    path = path_of(directory, table)
    storage.verify(directory, path.name)
    check(pq.read_schema(path), table, str(path))
    kept = None if of_contexts is None else pc.field("context_id").isin(pa.array(sorted(of_contexts), pa.string()))
    return pq.read_table(path, columns=columns or TABLES[table].names, filters=kept)


def rows(
    directory: Path, table: str, columns: list[str] | None = None, of_contexts: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """`read` as dictionaries."""
    return read(directory, table, columns, of_contexts).to_pylist()


def write(directory: Path, table: str, data: pa.Table | Iterable[dict[str, Any]]) -> int:
    """Writes `data` with the table's schema and returns the number of rows."""
    schema = TABLES[table]
    content = data if isinstance(data, pa.Table) else pa.Table.from_pylist(list(data), schema=schema)
    content = content.select(schema.names).cast(schema)
    pq.write_table(content, path_of(directory, table), row_group_size=_ROW_GROUP, compression=_COMPRESSION)
    return content.num_rows


def join(parts: Sequence[Path], directory: Path, table: str) -> int:
    """Writes published parts of a table one after the other, as `write` would write their rows; returns their number.

    Memory holds a row group or two, however many rows there are.

    Raises:
        NotPublishedError, CorruptError, SchemaError: of a part, see `read`.
    """
    schema = TABLES[table]
    with pq.ParquetWriter(path_of(directory, table), schema, compression=_COMPRESSION) as writer:
        waiting, joined = schema.empty_table(), 0
        for part in parts:
            path = path_of(part, table)
            storage.verify(part, path.name)
            check(pq.read_schema(path), table, str(path))
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=schema.names):
                    rows = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
                    waiting, joined = pa.concat_tables([waiting, rows]), joined + rows.num_rows
                    while waiting.num_rows >= _ROW_GROUP:
                        writer.write_table(waiting.slice(0, _ROW_GROUP).combine_chunks())
                        waiting = waiting.slice(_ROW_GROUP)
        if waiting.num_rows or not joined:
            writer.write_table(waiting.combine_chunks())
    return joined


def _same_type(found: pa.DataType, expected: pa.DataType) -> bool:
    if pa.types.is_list(expected):
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        return is_list and _same_type(found.value_type, expected.value_type)
    if pa.types.is_struct(expected):
        return (
            pa.types.is_struct(found)
            and [field.name for field in found] == [field.name for field in expected]
            and all(_same_type(a.type, b.type) for a, b in zip(found, expected, strict=True))
        )
    return found == expected or (pa.types.is_string(expected) and pa.types.is_large_string(found))
