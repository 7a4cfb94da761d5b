"""Spark: a server reached by Spark Connect, the session the process already has, or a local one."""

import os
import posixpath
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ibis
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from ibis import util
from ibis.expr.types import Table
from pyspark.errors import AnalysisException, PySparkException

from trackrec.data import schema
from trackrec.data.engine import ROW_GROUP, Engine, EngineError, write
from trackrec.data_config import SparkSettings

TOKEN_ENV = "SPARK_CONNECT_TOKEN"
_PORT = 15002
_CONNECT_TIMEOUT_S = 10
# What Spark says of a path where there is nothing to read.
_NOTHING_THERE = ("PATH_NOT_FOUND", "UNABLE_TO_INFER_SCHEMA")


class SparkEngine(Engine):
    """Tables go to a server, and come back, as Parquet files in a folder that both see.

    Not through the connection, which holds a table whole in memory. Their part files are named in the order of a sort,
    so a result is streamed in its order.
    """

    name = "spark"

    def __init__(self, settings: SparkSettings, memory_limit_bytes: int, scratch: Path) -> None:
        """
        Raises:
            EngineError: the server does not answer, or does not see the shared folder.
        """
        if settings.application is not None:
            raise EngineError("`data.spark.application` is for a pipeline on a cluster; here, name a `remote` server")
        self._is_server = settings.remote is not None
        folder = f"{str(settings.scratch or scratch).rstrip('/')}/trackrec-{uuid.uuid4().hex}"
        # `_folder` is what this process calls it, `_uri` what Spark does.
        self._files, self._folder = _file_system(folder)
        self._uri = folder if "://" in folder else f"file://{self._folder}"
        self._session = _connected(settings.remote) if settings.remote else _local(memory_limit_bytes, scratch)
        self._connection = ibis.pyspark.connect(self._session)
        if self._is_server:
            self._check_folder()

    def parquet(self, path: Path | str) -> Table:
        if not self._is_server:
            return self._connection.read_parquet(path)
        name = util.gen_name("given")
        self._files.create_dir(f"{self._folder}/{name}")
        for file in sorted(Path(path).parent.glob(Path(path).name)):
            pafs.copy_files(str(file), f"{self._folder}/{name}/{file.name}", pafs.LocalFileSystem(), self._files)
        return self._connection.read_parquet(f"{self._uri}/{name}")

    def remote(self, uri: str, table: str) -> Table | None:
        if not self._is_server:
            raise EngineError(f"{uri}: Spark in this process reads files of this machine; copy it here")
        uri = uri.rstrip("/")
        places = [f"{uri}/{table}.parquet", f"{uri}/{table}"]
        if uri.endswith(".parquet"):
            places = [uri] if table == "log" else []
        for place in places:
            try:
                return self._connection.read_parquet(place)
            except AnalysisException as error:
                if error.getCondition() not in _NOTHING_THERE:
                    raise EngineError(f"{place}: Spark cannot read it: {_first_line(error)}") from error
            except PySparkException as error:
                raise EngineError(f"{place}: Spark cannot read it: {_first_line(error)}") from error
        return None

    def kept(self, rows: Table) -> Table:
        return self._connection.read_parquet(f"{self._uri}/{self._written(rows)}")

    def fetched(self, rows: Table) -> list[dict[str, Any]]:
        return rows.to_pyarrow().to_pylist()

    def stored(self, rows: Table, directory: Path, table: str) -> Table:
        name = self._written(rows.select(*schema.TABLES[table].names))
        write(self._parts(name), directory, table, "the result of Spark")
        return self._connection.read_parquet(f"{self._uri}/{name}")

    def close(self) -> None:
        if self._files.get_file_info(self._folder).type == pafs.FileType.Directory:
            self._files.delete_dir(self._folder)
        if self._is_server:
            self._session.stop()

    def _written(self, rows: Table) -> str:
        name = util.gen_name("written")
        self._connection.to_parquet(rows, f"{self._uri}/{name}")
        return name

    def _parts(self, name: str) -> Iterator[pa.RecordBatch]:
        files = self._files.get_file_info(pafs.FileSelector(f"{self._folder}/{name}"))
        for path in sorted(file.path for file in files if posixpath.basename(file.path).startswith("part-")):
            with self._files.open_input_file(path) as file:
                yield from pq.ParquetFile(file).iter_batches(ROW_GROUP)

    def _check_folder(self) -> None:
        self._files.create_dir(self._folder)
        probe = f"{self._folder}/probe.parquet"
        with self._files.open_output_stream(probe) as file:
            pq.write_table(pa.table({"seen": [1]}), file)
        try:
            self.fetched(self._connection.read_parquet(f"{self._uri}/probe.parquet"))
        except PySparkException as error:
            self._files.delete_dir(self._folder)
            raise EngineError(
                f"Spark does not see {self._uri}: {_first_line(error)}. Set `data.spark.scratch` to a folder that both "
                "see: a bucket, or a volume that Spark's pods mount at the same path"
            ) from error


def _file_system(folder: str) -> tuple[pafs.FileSystem, str]:
    try:
        return pafs.FileSystem.from_uri(folder if "://" in folder else Path(folder).resolve().as_uri())
    except (pa.ArrowException, OSError) as error:
        raise EngineError(f"`data.spark.scratch`: {folder}: {error}") from error


def _connected(url: str) -> Any:
    """A session of its own on a Spark Connect server."""
    from pyspark.sql.connect.session import SparkSession

    server = urlsplit(url)
    # Spark's client would go on trying for ten minutes.
    try:
        socket.create_connection((server.hostname, server.port or _PORT), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise EngineError(f"{url}: no Spark Connect server answers there ({error}); see `data.spark.remote`") from error
    if token := os.environ.get(TOKEN_ENV):
        url = f"{url.rstrip('/')}{'' if ';' in url else '/'};token={token}"
    try:
        session = SparkSession.builder.remote(url).create()
        session.version  # noqa: B018  asks the server
    except (PySparkException, ValueError) as error:
        raise EngineError(f"{server.netloc}: Spark Connect refuses: {_first_line(error)}") from error
    return session


def _local(memory_limit_bytes: int, scratch: Path) -> Any:
    """The session the process already has (`spark-submit`), else a local one, which stays open."""
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
    return builder.getOrCreate()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
