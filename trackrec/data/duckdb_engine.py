"""DuckDB in the process, spilling to disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
from ibis import util
from ibis.expr.types import Table

from trackrec.data import schema
from trackrec.data.engine import ROW_GROUP, Engine, EngineError, write


class DuckDBEngine(Engine):
    name = "duckdb"

    def __init__(self, memory_limit_bytes: int, scratch: Path) -> None:
        self._scratch = scratch
        self._connection = ibis.duckdb.connect(
            memory_limit=f"{memory_limit_bytes}B", temp_directory=str(scratch / "spill")
        )
        # As Spark's session has it: a moment that names no zone is UTC.
        self._connection.raw_sql("SET TimeZone = 'UTC'")

    def parquet(self, path: Path | str) -> Table:
        return self._connection.read_parquet(path)

    def remote(self, uri: str, table: str) -> Table | None:
        raise EngineError(f"{uri}: DuckDB reads files of this machine; copy it here, or set another `data.engine`")

    def kept(self, rows: Table) -> Table:
        path = self._scratch / f"{util.gen_name('kept')}.parquet"
        self._connection.to_parquet(rows, path)
        return self._connection.read_parquet(path)

    def fetched(self, rows: Table) -> list[dict[str, Any]]:
        return rows.to_pyarrow().to_pylist()

    def stored(self, rows: Table, directory: Path, table: str) -> Table:
        write(self.batches(rows.select(*schema.TABLES[table].names)), directory, table, "the result of DuckDB")
        return self._connection.read_parquet(schema.path_of(directory, table))

    def batches(self, rows: Table) -> Iterator[pa.RecordBatch]:
        """The result in its order, a row group at a time."""
        # Ibis's own to_pyarrow_batches calls a method that DuckDB 2 no longer has.
        return self._connection.con.sql(self._connection.compile(rows)).to_arrow_reader(ROW_GROUP)

    def close(self) -> None:
        self._connection.disconnect()
