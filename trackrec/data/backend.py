"""The engines the Ibis expressions run on, and writing their results with the tables' schemas."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.backends import BaseBackend
from ibis.expr.types import Table

from trackrec import storage
from trackrec.data import schema

Engine = Literal["duckdb", "spark"]
# Rows a row group: a row with a long history takes tens of KB, and a group is held in memory.
_ROW_GROUP = 10_000
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}i": 2 ** (10 * power) for power, unit in enumerate("KMGT", start=1)}


def to_bytes(quantity: str) -> int:
    """Bytes of a Kubernetes memory quantity: `to_bytes("8Gi") == 8 * 2**30`.

    Raises:
        ValueError: not a quantity of memory.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]i?|)", quantity)
    if not match:
        raise ValueError(f"{quantity!r} is not a quantity of memory; write e.g. 8Gi")
    return int(float(match.group(1)) * _UNITS[match.group(2)])


@contextlib.contextmanager
def connect(engine: Engine, memory_limit: str, scratch: Path) -> Iterator[BaseBackend]:
    """An engine that spills to `scratch` beyond `memory_limit`.

    Spark: the session the process already has (`spark-submit` on a cluster), else a local one, which stays open.
    """
    limit = to_bytes(memory_limit)
    if engine == "spark":
        yield _spark(limit, scratch)
        return
    connection = ibis.duckdb.connect(memory_limit=f"{limit}B", temp_directory=str(scratch / "spill"))
    # As Spark's session has it: a moment that names no zone is UTC.
    connection.raw_sql("SET TimeZone = 'UTC'")
    try:
        yield connection
    finally:
        connection.disconnect()


def _spark(memory_limit_bytes: int, scratch: Path) -> BaseBackend:
    from pyspark.sql import SparkSession

    settings = {
        "spark.driver.memory": f"{memory_limit_bytes >> 20}m",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.warehouse.dir": str(scratch / "spark-warehouse"),
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
    }
    builder = SparkSession.builder.appName("trackrec")
    for key, value in settings.items():
        builder = builder.config(key, value)
    return ibis.pyspark.connect(builder.getOrCreate())


def write(connection: BaseBackend, rows: Table, directory: Path, table: str, scratch: Path) -> None:
    """Runs `rows` and writes it, in its order, as the table's Parquet file, without holding it in memory.

    Raises:
        SchemaError: `rows` is not shaped like the table.
    """
    target = schema.TABLES[table]
    with pq.ParquetWriter(schema.path_of(directory, table), target, compression="zstd") as writer:
        for batch in _batches(connection, rows.select(*target.names), scratch / f"{table}.parts"):
            schema.check(batch.schema, table, f"the result of {connection.name}")
            writer.write_table(pa.Table.from_batches([batch]).cast(target))


def _batches(connection: BaseBackend, rows: Table, parts: Path) -> Iterator[pa.RecordBatch]:
    if connection.name == "duckdb":
        # Ibis's own to_pyarrow_batches calls a method that DuckDB 2 no longer has.
        yield from connection.con.sql(connection.compile(rows)).to_arrow_reader(_ROW_GROUP)
        return
    # Spark would hand over the whole result at once; its files, named in the order of the sort, can be streamed.
    connection.to_parquet(rows, parts, mode="overwrite")
    for part in sorted(parts.glob("part-*")):
        yield from pq.ParquetFile(part).iter_batches(_ROW_GROUP)
    shutil.rmtree(parts)


def read(connection: BaseBackend, directory: Path, table: str) -> Table:
    """A published table as an expression, its schema checked first.

    Raises:
        NotPublishedError, CorruptError, SchemaError: as `schema.read`.
    """
    path = schema.path_of(directory, table)
    storage.verify(directory, path.name)
    schema.check(pq.read_schema(path), table, str(path))
    return connection.read_parquet(path).select(*schema.TABLES[table].names)
