"""BigQuery's place taken by DuckDB: each statement is parsed as BigQuery's SQL and translated."""

from collections.abc import Iterator
from pathlib import Path

import duckdb
import ibis
import pyarrow as pa
import sqlglot


class TranslatedBigQuery:
    """`trackrec.data.bigquery_engine.Client` over tables in memory; `statements` are what BigQuery would be sent."""

    def __init__(self) -> None:
        self.database = duckdb.connect(":memory:", config={"threads": 1})
        # A function of BigQuery's that the translation does not know.
        self.database.execute("CREATE MACRO ieee_divide(x, y) AS x / y")
        self.statements: list[str] = []

    @property
    def tables(self) -> list[str]:
        return [row[0] for row in self.database.execute("SELECT table_name FROM duckdb_tables()").fetchall()]

    def columns(self, table: str) -> ibis.Schema | None:
        if table not in self.tables:
            return None
        empty = self.database.sql(f'SELECT * FROM "{table}" LIMIT 0').to_arrow_table()
        return ibis.Schema.from_pyarrow(empty.schema)

    def load(self, file: Path, table: str) -> None:
        source = self.database.read_parquet(str(file))
        # BigQuery has one integer and one floating-point type.
        names = {"TINYINT": "BIGINT", "INTEGER": "BIGINT", "FLOAT": "DOUBLE"}
        columns = []
        for name, kind in zip(source.columns, source.types, strict=True):
            wide = str(kind)
            for narrow, type_ in names.items():
                wide = wide.replace(narrow, type_)
            columns.append(f'CAST("{name}" AS {wide}) AS "{name}"')
        selected = source.project(", ".join(columns))
        if table in self.tables:
            selected.insert_into(f'"{table}"')
        else:
            selected.create(f'"{table}"')

    def create(self, table: str, query: str) -> None:
        self.database.execute(f'CREATE TABLE "{table}" AS {self._translated(query)}')

    def results(self, query: str) -> Iterator[pa.RecordBatch]:
        found = self.database.sql(self._translated(query))
        # DuckDB sums integers to 128 bits.
        kinds = {"HUGEINT": "BIGINT"}
        names = [(name, str(kind)) for name, kind in zip(found.columns, found.types, strict=True)]
        found = found.project(
            ", ".join(f'CAST("{name}" AS {kinds.get(kind, kind)}) AS "{name}"' for name, kind in names)
        )
        yield from found.to_arrow_table().to_batches()

    def drop(self, table: str) -> None:
        self.database.execute(f'DROP TABLE "{table}"')

    def _translated(self, query: str) -> str:
        self.statements.append(query)
        tree = sqlglot.parse_one(query, read="bigquery")
        for table in tree.find_all(sqlglot.exp.Table):
            if table.catalog:
                # DuckDB's one database holds them under their whole names.
                name = f"{table.catalog}.{table.db}.{table.name}"
                table.set("this", sqlglot.exp.to_identifier(name, quoted=True))
                table.set("db", None)
                table.set("catalog", None)
        # Both number an array's elements, BigQuery from 0 and DuckDB from 1, which the translation forgets.
        numbers = {unnest.args["offset"].name for unnest in tree.find_all(sqlglot.exp.Unnest) if unnest.args["offset"]}
        for column in list(tree.find_all(sqlglot.exp.Column)):
            if column.name in numbers:
                column.replace(sqlglot.exp.paren(column.copy() - 1))
        return tree.sql(dialect="duckdb")
