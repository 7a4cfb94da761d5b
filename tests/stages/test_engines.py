"""Every engine gives DuckDB's rows, in its order: on an awkward log, and on MovieLens-100k."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlglot

from tests.data.bigquery_double import TranslatedBigQuery
from tests.data.ingesting import refused, run
from tests.data.raw_files import same_rows, write_ml_1m
from tests.data.spark_server import spark_connect_server
from trackrec import storage
from trackrec.config import ContextsSettings, ImpressionLog
from trackrec.data import bigquery_engine, schema
from trackrec.data.engine import EngineError, open_engine
from trackrec.data_config import DataSettings
from trackrec.fetch import fetch
from trackrec.serving_config import ActiveUsersSettings
from trackrec.stages import active_users, contexts

DAY = 86_400
LOG = ImpressionLog(
    label="liked",
    rating="stars",
    item_attributes=["brand", "line"],
    valid_from="2024-01-05",
    test_from="2024-01-08",
)
# Sampled by hash, both kinds, with and without limits.
CONTEXTS: list[dict[str, Any]] = [
    {"kind": "rolling", "history_length": 3, "max_train_contexts": 20, "max_examples_per_context": 1},
    {"kind": "snapshot", "snapshot_days": 2, "max_train_contexts": 5, "max_test_contexts": 2, "min_history": 1},
]
# By the last interaction and by a moment; with users left out for both reasons.
ACTIVE: list[dict[str, Any]] = [
    {"active_days": 8, "max_users": 3},
    {"active_days": 1, "as_of": "2024-01-02T12:00"},
]
TITLES = ["Amélie", "千と千尋の神隠し", "🦊 fox", 'it\'s "quoted"\nline', " ", None, "a:5.0:1", "Éa"]


def awkward_log() -> pa.Table:
    """Ties of a user and moment in all but one column, or in all; nulls wherever they may be; titles in all scripts."""
    draw = random.Random(0)
    rows = []
    for number in range(80):
        item = draw.choice(["ä", "Z", "z", "10", "9", "日", "a b"])
        moment = 1704067200 + DAY * draw.randrange(8) + draw.choice([0, 0, 1, DAY - 1])
        stars = draw.choice([None, 0.5, 3, 4.5, 5])
        row = (draw.choice(["u1", "u10", "u9", "Ü", "u 2"]), item, moment, draw.random() < 0.5, stars)
        title = draw.choice(TITLES)
        rows += [(*row, title, draw.choice([None, "Acme", "ÄCME"]), "x")] * draw.choice([1, 1, 2])
        if number % 5 == 0:
            rows.append((*row[:4], None if stars else 4, title, None, None))
    names = ["user_id", "item_id", "timestamp", "liked", "stars", "title", "brand", "line"]
    # What an item shows is its newest row's: one title and one brand for each item and moment.
    shown = {row[1:3]: row[5:] for row in rows}
    rows = [(*row[:5], *shown[row[1:3]]) for row in rows]
    return pa.table({name: [row[place] for row in rows] for place, name in enumerate(names)})


def judged(out: Path, tables: Path, data: DataSettings, **settings: Any) -> Path:
    given = ContextsSettings.model_validate({"domain": "movies", **settings})
    contexts.run(given, data, interactions=tables, items=tables, contexts=out, examples=out, seed=3)
    return out


def found_active(out: Path, tables: Path, data: DataSettings, **settings: Any) -> Path:
    shown: dict[str, Any] = {"domain": "movies", "history_length": 3}
    given = ActiveUsersSettings.model_validate(settings)
    active_users.run(given, data, interactions=tables, items=tables, users=out, seed=3, **shown)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def raw(folder: Path) -> Path:
    (folder / "raw").mkdir()
    pq.write_table(awkward_log(), folder / "raw" / "log.parquet")
    return folder / "raw"


@pytest.fixture(scope="module")
def expected(folder: Path, raw: Path) -> list[Path]:
    """DuckDB's tables: ingest's, then contexts' for each of `CONTEXTS` and active_users' for each of `ACTIVE`."""
    tables = run(folder / "duckdb", raw, "impressions", log=LOG.model_dump())
    return [
        tables,
        *(judged(folder / f"duckdb-{n}", tables, DataSettings(), **s) for n, s in enumerate(CONTEXTS)),
        *(found_active(folder / f"users-{n}", tables, DataSettings(), **s) for n, s in enumerate(ACTIVE)),
    ]


@pytest.fixture(scope="module")
def server(spark: None, folder: Path) -> Iterator[DataSettings]:
    """A Spark Connect server in another process."""
    (folder / "server").mkdir()
    with spark_connect_server(folder / "server") as url:
        yield DataSettings.model_validate(
            {"engine": "spark", "spark": {"remote": url, "scratch": str(folder / "shared")}}
        )


@pytest.fixture
def warehouse(monkeypatch: pytest.MonkeyPatch) -> TranslatedBigQuery:
    client = TranslatedBigQuery()
    monkeypatch.setattr(bigquery_engine, "GoogleClient", lambda settings: client)
    return client


BIGQUERY = DataSettings.model_validate({"engine": "bigquery", "bigquery": {"project": "p", "dataset": "scratch"}})


def check_rows(tmp_path: Path, raw: Path | str, data: DataSettings, expected: list[Path]) -> None:
    here, *later = expected
    judged_here, active_here = later[: len(CONTEXTS)], later[len(CONTEXTS) :]
    there = run(tmp_path / "tables", raw, "impressions", data, log=LOG.model_dump())
    for table in ("interactions", "items"):
        assert same_rows(here, there, table), table
    assert storage.read_manifest(here).facts == storage.read_manifest(there).facts
    for number, (settings, wanted) in enumerate(zip(CONTEXTS, judged_here, strict=True)):
        found = judged(tmp_path / str(number), there, data, **settings)
        for table in ("contexts", "examples"):
            assert same_rows(wanted, found, table), (settings, table)
        assert storage.read_manifest(wanted).facts == storage.read_manifest(found).facts
    for number, (settings, wanted) in enumerate(zip(ACTIVE, active_here, strict=True)):
        found = found_active(tmp_path / f"users-{number}", there, data, **settings)
        assert same_rows(wanted, found, "users"), settings
        assert storage.read_manifest(wanted).facts == storage.read_manifest(found).facts


def test_the_awkward_log_has_what_engines_differ_in(expected: list[Path]) -> None:
    rows = schema.rows(expected[0], "interactions")
    moments = [(row["user_id"], row["timestamp"], row["item_id"]) for row in rows]
    ratings = [row["rating"] for row in rows]
    tied = [(a, b) for a, b, x, y in zip(ratings, ratings[1:], moments, moments[1:], strict=False) if x == y]
    # Nulls come last.
    assert any(a is not None and b is None for a, b in tied) and not any(a is None and b is not None for a, b in tied)
    assert {"Amélie", "千と千尋の神隠し"} & {row["title"] for row in schema.rows(expected[0], "items")}
    assert all(storage.read_manifest(path).facts["dropped_by_sampling"] for path in expected[1:-1])
    assert storage.read_manifest(expected[-1]).facts["dropped_inactive"]


def test_a_spark_server_gives_identical_rows_and_is_left_clean(
    tmp_path: Path, raw: Path, server: DataSettings, expected: list[Path]
) -> None:
    check_rows(tmp_path, raw.as_uri(), server, expected)
    assert list(Path(server.spark.scratch or "").iterdir()) == []


def test_a_spark_server_gives_identical_rows_of_movielens_100k(tmp_path: Path, server: DataSettings) -> None:
    """Its files are checked here, and go to the server through the shared folder."""
    settings = {"history_length": 4, "max_train_contexts": 1000}
    here = run(tmp_path / "here", fetch("ml-100k"), "ml-100k", max_history=5)
    there = run(tmp_path / "there", fetch("ml-100k"), "ml-100k", server, max_history=5)
    for table in ("interactions", "items"):
        assert same_rows(here, there, table), table
    wanted = judged(tmp_path / "wanted", here, DataSettings(), **settings)
    found = judged(tmp_path / "found", here, server, **settings)
    for table in ("contexts", "examples"):
        assert same_rows(wanted, found, table), table


def test_bigquerys_sql_gives_identical_rows(
    tmp_path: Path, raw: Path, warehouse: TranslatedBigQuery, expected: list[Path]
) -> None:
    warehouse.load(raw / "log.parquet", "shop.web.log")
    check_rows(tmp_path, "bq://shop.web", BIGQUERY, expected)
    assert warehouse.tables == ["shop.web.log"]


def test_bigquerys_sql_keeps_to_what_bigquery_documents(
    tmp_path: Path, raw: Path, warehouse: TranslatedBigQuery, expected: list[Path]
) -> None:
    warehouse.load(raw / "log.parquet", "shop.web.log")
    check_rows(tmp_path, "bq://shop.web.log", BIGQUERY, expected)
    trees = [sqlglot.parse_one(statement, read="bigquery") for statement in warehouse.statements]
    for window in (window for tree in trees for window in tree.find_all(sqlglot.exp.Window)):
        assert not (window.find(sqlglot.exp.ArrayAgg) and window.find(sqlglot.exp.IgnoreNulls))
        assert "NULLS LAST" not in window.sql(dialect="bigquery")
    arrays = [array for tree in trees for array in tree.find_all(sqlglot.exp.Array)]
    selected = [array.expressions[0] for array in arrays if array.expressions and array.find(sqlglot.exp.Unnest)]
    assert selected and all(select.args.get("order") for select in selected)
    assert not any("GENERATE_ARRAY" in statement for statement in warehouse.statements)
    assert any(tree.find(sqlglot.exp.ArrayAgg) for tree in trees)


def test_ml_1m_goes_to_bigquery_as_files(tmp_path: Path, warehouse: TranslatedBigQuery) -> None:
    raw = write_ml_1m(tmp_path / "raw")
    here, there = run(tmp_path / "here", raw), run(tmp_path / "there", raw, data=BIGQUERY)
    assert same_rows(here, there, "interactions") and same_rows(here, there, "items")


@pytest.mark.parametrize("kind", ["spark", "bigquery"])
def test_a_log_that_is_not_there_or_broken_is_refused(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, raw: Path
) -> None:
    lacking = awkward_log().drop_columns("stars")
    faulty = pa.concat_tables([awkward_log(), awkward_log().slice(0, 1).set_column(0, "user_id", pa.array([""]))])
    (tmp_path / "lacking").mkdir()
    (tmp_path / "faulty").mkdir()
    pq.write_table(lacking, tmp_path / "lacking" / "log.parquet")
    pq.write_table(faulty, tmp_path / "faulty" / "log.parquet")
    if kind == "spark":
        data, base = request.getfixturevalue("server"), f"file://{tmp_path}/"
    else:
        warehouse: TranslatedBigQuery = request.getfixturevalue("warehouse")
        for name in ("lacking", "faulty"):
            warehouse.load(tmp_path / name / "log.parquet", f"shop.{name}.log")
        data, base = BIGQUERY, "bq://shop."
    settings = {"data": data, "log": LOG.model_dump()}
    refused(tmp_path, f"none: {kind} finds no log there", "impressions", f"{base}none", **settings)
    refused(
        tmp_path, r"lacking \(log\): no column 'stars'; it has user_id", "impressions", f"{base}lacking", **settings
    )
    refused(tmp_path, r"faulty \(log\): a row without user.*\(1 such", "impressions", f"{base}faulty", **settings)


def opened(data: DataSettings, folder: Path) -> None:
    with open_engine(data, folder):
        raise AssertionError("it opened")


def test_a_server_that_does_not_answer_is_one_clear_line(tmp_path: Path, spark: None) -> None:
    given = {"engine": "spark", "spark": {"remote": "sc://127.0.0.1:9", "scratch": str(tmp_path)}}
    with pytest.raises(EngineError, match=r"^sc://127\.0\.0\.1:9: no Spark Connect server answers there \(.*refused"):
        opened(DataSettings.model_validate(given), tmp_path)


def test_a_folder_that_the_server_does_not_see_is_one_clear_line(
    tmp_path: Path, server: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same path is another folder in each process.
    monkeypatch.chdir(tmp_path)
    given = server.model_dump() | {"spark": {"remote": server.spark.remote, "scratch": "file:///proc/self/cwd/mine"}}
    with pytest.raises(EngineError, match=r"Spark does not see file:///proc.*Set `data\.spark\.scratch` to a folder"):
        opened(DataSettings.model_validate(given), tmp_path)
    assert list((tmp_path / "mine").iterdir()) == []


def test_an_engine_in_the_process_reads_no_uri(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"gs://shop/log: DuckDB reads files of this machine; copy it here"):
        run(tmp_path / "out", "gs://shop/log", "impressions", log=LOG.model_dump())


def test_bigquery_without_credentials_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(EngineError, match=r"^BigQuery: .*none\.json"):
        opened(BIGQUERY, tmp_path)
