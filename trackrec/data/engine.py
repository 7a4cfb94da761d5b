"""The engines that Ibis expressions run on, and their results as the tables' Parquet files."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ibis.expr.types import Table

from trackrec import storage
from trackrec.data import schema
from trackrec.data_config import DataSettings
from trackrec.quantity import to_bytes

# Rows a row group: a row with a long history takes tens of KB, and a group is held in memory.
ROW_GROUP = 10_000


class EngineError(ValueError):
    """An engine that cannot be reached or started, or cannot see what it is to read; the message says what to do."""


class Engine(ABC):
    """Where expressions run. What an engine keeps on its own side is gone when it is closed."""

    name: str

    @abstractmethod
    def parquet(self, path: Path | str) -> Table:
        """A Parquet file of this machine (or several: `folder/*.parquet`) as an expression."""

    @abstractmethod
    def remote(self, uri: str, table: str) -> Table | None:
        """The table `table` (log, items) of the raw data at `uri`, which the engine itself reads; None without one.

        Raises:
            EngineError: this engine reads no such place.
        """

    @abstractmethod
    def kept(self, rows: Table) -> Table:
        """`rows`, computed once for all that follows."""

    @abstractmethod
    def fetched(self, rows: Table) -> list[dict[str, Any]]:
        """The result, for a few rows."""

    @abstractmethod
    def stored(self, rows: Table, directory: Path, table: str) -> Table:
        """Runs `rows` and writes it, in its order, as `directory`'s table, without holding it in memory.

        Returns:
            The table that was written, as an expression.

        Raises:
            SchemaError: `rows` is not shaped like the table.
        """

    @abstractmethod
    def close(self) -> None:
        """Removes what the engine kept on its own side."""

    def table(self, directory: Path, table: str) -> Table:
        """A published table as an expression, its schema checked first.

        Raises:
            NotPublishedError, CorruptError, SchemaError: as `schema.read`.
        """
        path = schema.path_of(directory, table)
        storage.verify(directory, path.name)
        schema.check(pq.read_schema(path), table, str(path))
        return self.parquet(path).select(*schema.TABLES[table].names)


@contextlib.contextmanager
def open_engine(settings: DataSettings, scratch: Path) -> Iterator[Engine]:
    """
    Args:
        scratch: a folder of this machine for what outgrows memory.

    Raises:
        EngineError: the engine is not installed, or does not answer.
    """
    engine: Engine
    if settings.engine == "duckdb":
        from trackrec.data.duckdb_engine import DuckDBEngine

        engine = DuckDBEngine(to_bytes(settings.memory_limit), scratch)
    else:
        try:
            if settings.engine == "spark":
                from trackrec.data.spark_engine import SparkEngine

                engine = SparkEngine(settings.spark, to_bytes(settings.memory_limit), scratch)
            else:
                from trackrec.data.bigquery_engine import BigQueryEngine, GoogleClient

                assert settings.bigquery is not None  # by its validator
                dataset = f"{settings.bigquery.project}.{settings.bigquery.dataset}"
                client = GoogleClient(settings.bigquery)
                engine = BigQueryEngine(client, dataset, to_bytes(settings.memory_limit), scratch)
        except ImportError as error:
            raise EngineError(
                f"engine {settings.engine!r} is not installed here ({error}); see docs/data.md, Engines"
            ) from error
    try:
        yield engine
    finally:
        engine.close()


def write(batches: Iterator[pa.RecordBatch], directory: Path, table: str, where: str) -> None:
    """Streams batches of the table's columns into its Parquet file.

    Raises:
        SchemaError: they are of other types.
    """
    target = schema.TABLES[table]
    with pq.ParquetWriter(schema.path_of(directory, table), target, compression="zstd") as writer:
        for batch in batches:
            schema.check(batch.schema, table, where)
            writer.write_table(pa.Table.from_batches([batch]).cast(target))
