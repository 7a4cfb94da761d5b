"""BigQuery: expressions run there as SQL; this process sends it tables and fetches results."""

import contextlib
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import google.auth
import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from google.api_core.exceptions import GoogleAPIError, NotFound
from google.auth.exceptions import GoogleAuthError
from google.cloud import bigquery
from google.cloud.bigquery_storage import BigQueryReadClient
from ibis.backends.bigquery.datatypes import BigQuerySchema
from ibis.expr.types import Table

from trackrec.data import schema
from trackrec.data.bigquery_sql import compiled
from trackrec.data.duckdb_engine import DuckDBEngine
from trackrec.data.engine import Engine, EngineError, write
from trackrec.data_config import BigQuerySettings

# A killed stage leaves its intermediate tables to BigQuery.
_EXPIRY = timedelta(days=1)


class Client(Protocol):
    """All that is asked of BigQuery; a table's name is `project.dataset.table`."""

    def columns(self, table: str) -> ibis.Schema | None:
        """The table's columns, None if there is no such table."""

    def load(self, file: Path, table: str) -> None:
        """Appends a Parquet file of this machine to a table, which is made where there is none."""

    def create(self, table: str, query: str) -> None:
        """Makes a table of a query's result."""

    def results(self, query: str) -> Iterator[pa.RecordBatch]:
        """The rows of a query, in no order."""

    def drop(self, table: str) -> None:
        """Deletes a table."""


class BigQueryEngine(Engine):
    """Results are ordered here, by DuckDB: BigQuery sorts a whole result on one machine, and then only a small one."""

    name = "bigquery"

    def __init__(self, client: Client, dataset: str, memory_limit_bytes: int, scratch: Path) -> None:
        """
        Args:
            dataset: `project.dataset` of the intermediate tables.
        """
        self._client = client
        self._prefix = f"{dataset}.trackrec_{uuid.uuid4().hex}"
        self._scratch = scratch
        self._here = DuckDBEngine(memory_limit_bytes, scratch)
        self._made: list[str] = []

    def parquet(self, path: Path | str) -> Table:
        table = self._new()
        for file in sorted(Path(path).parent.glob(Path(path).name)):
            self._client.load(file, table)
        return self._known(table)

    def remote(self, uri: str, table: str) -> Table | None:
        parts = uri.removeprefix("bq://").split(".")
        if not uri.startswith("bq://") or len(parts) not in (2, 3):
            raise EngineError(f"{uri}: BigQuery reads bq://PROJECT.DATASET, or bq://PROJECT.DATASET.TABLE of the log")
        if len(parts) == 3 and table != "log":
            return None
        name = ".".join((*parts, table)[:3])
        return None if self._client.columns(name) is None else self._known(name)

    def kept(self, rows: Table) -> Table:
        table = self._new()
        self._client.create(table, compiled(rows))
        return self._known(table)

    def fetched(self, rows: Table) -> list[dict[str, Any]]:
        return [row for batch in self._client.results(compiled(rows)) for row in batch.to_pylist()]

    def stored(self, rows: Table, directory: Path, table: str) -> Table:
        # An ORDER BY inside a table's query says nothing, and costs.
        there = self.kept(rows.select(*schema.TABLES[table].names))
        unordered = self._scratch / f"{table}.unordered.parquet"
        with pq.ParquetWriter(unordered, schema.TABLES[table], compression="zstd") as writer:
            for batch in self._client.results(compiled(there)):
                writer.write_table(pa.Table.from_batches([batch]).cast(schema.TABLES[table]))
        ordered = self._here.parquet(unordered).order_by(*schema.ORDER[table])
        write(self._here.batches(ordered), directory, table, "the result of BigQuery")
        unordered.unlink()
        return there

    def close(self) -> None:
        self._here.close()
        for table in self._made:
            self._client.drop(table)

    def _new(self) -> str:
        self._made.append(f"{self._prefix}_{len(self._made)}")
        return self._made[-1]

    def _known(self, table: str) -> Table:
        project, dataset, name = table.split(".")
        columns = self._client.columns(table)
        if columns is None:
            raise EngineError(f"{table}: BigQuery has no such table")
        return ibis.table(columns, name=name, catalog=project, database=dataset)


class GoogleClient:
    """BigQuery itself, with the credentials of the environment (workload identity in a pod)."""

    def __init__(self, settings: BigQuerySettings) -> None:
        """
        Raises:
            EngineError: there are no credentials.
        """
        with _telling():
            credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
            self._client = bigquery.Client(settings.project, credentials, location=settings.location)
            self._reader = BigQueryReadClient(credentials=credentials)

    def columns(self, table: str) -> ibis.Schema | None:
        with _telling():
            try:
                return BigQuerySchema.to_ibis(self._client.get_table(table).schema)
            except NotFound:
                return None

    def load(self, file: Path, table: str) -> None:
        config = bigquery.LoadJobConfig(source_format=bigquery.SourceFormat.PARQUET)
        config.parquet_options = bigquery.ParquetOptions()
        # Else a list becomes a record of records.
        config.parquet_options.enable_list_inference = True
        with _telling(), file.open("rb") as data:
            self._client.load_table_from_file(data, table, job_config=config).result()
            made = self._client.get_table(table)
            made.expires = datetime.now(UTC) + _EXPIRY
            self._client.update_table(made, ["expires"])

    def create(self, table: str, query: str) -> None:
        hours = int(_EXPIRY.total_seconds() // 3600)
        expiry = f"expiration_timestamp = TIMESTAMP_ADD(CURRENT_TIMESTAMP(), INTERVAL {hours} HOUR)"
        with _telling():
            self._client.query_and_wait(f"CREATE TABLE `{table}` OPTIONS ({expiry}) AS\n{query}")

    def results(self, query: str) -> Iterator[pa.RecordBatch]:
        with _telling():
            yield from self._client.query_and_wait(query).to_arrow_iterable(self._reader)

    def drop(self, table: str) -> None:
        with _telling():
            self._client.delete_table(table, not_found_ok=True)


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    try:
        yield
    except (GoogleAPIError, GoogleAuthError) as error:
        raise EngineError(f"BigQuery: {str(error).splitlines()[0]}") from error
