"""A company's own impression log: what is read, and what is refused."""

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.data.ingesting import refused, run
from tests.data.raw_files import read_rows, same_rows, write_csv
from trackrec import storage
from trackrec.cli import app
from trackrec.config import ImpressionLog
from trackrec.data import schema
from trackrec.data.raw import RawDataError
from trackrec.data_config import DataSettings

LOG = ImpressionLog(label="clicked", rating="stars", valid_from="2024-01-02", test_from="2024-01-03T00:00:00+00:00")
DAY_1, DAY_2, DAY_3 = 1704067200, 1704153600, 1704240000  # 2024-01-01 … 03 UTC
LOG_HEADER = ["user_id", "item_id", "timestamp", "clicked", "stars", "title"]
LOG_ROWS = [
    ["u2", "b", DAY_1 + 5, 1, 4.5, "Old name"],
    ["u10", "a", DAY_2 - 1, 0, "", ""],
    ["u2", "b", DAY_2, 0, 1, "New name"],
    ["u2", "a", DAY_3, 1, "", ""],
]


def impressions(out: Path, raw: Path, log: ImpressionLog = LOG, **settings: Any) -> Path:
    return run(out, raw, "impressions", log=log.model_dump(), **settings)


def parquet_log() -> pa.Table:
    return pa.table(
        {
            "user_id": ["u2", "u10", "u2", "u2"],
            "item_id": ["b", "a", "b", "a"],
            "timestamp": [row[2] for row in LOG_ROWS],
            "clicked": pa.array([True, False, False, True]),
            "stars": pa.array([4.5, None, 1, None], pa.float32()),
            "title": ["Old name", None, "New name", None],
        }
    )


@pytest.mark.parametrize("form", ["csv", "parquet", "parts", "file"])
def test_impression_log(tmp_path: Path, form: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    table = parquet_log()
    if form == "csv":
        write_csv(raw / "log.csv", LOG_HEADER, LOG_ROWS)
    elif form == "parts":
        (raw / "log").mkdir()
        pq.write_table(table.slice(0, 2), raw / "log" / "0.parquet")
        pq.write_table(table.slice(2), raw / "log" / "1.parquet")
    else:
        pq.write_table(table, raw / "log.parquet")
    out = impressions(tmp_path / "out", raw / "log.parquet" if form == "file" else raw)
    assert read_rows(out) == [
        ("train", "u10", "a", 0, None, DAY_2 - 1, []),
        ("train", "u2", "b", 1, 4.5, DAY_1 + 5, []),
        ("valid", "u2", "b", 0, 1.0, DAY_2, [("b", 4.5, 1)]),
        ("test", "u2", "a", 1, None, DAY_3, [("b", 4.5, 1), ("b", 1.0, 0)]),
    ]
    # The newest title counts; an item without one goes by its id.
    assert [(row["item_id"], row["title"]) for row in schema.rows(out, "items")] == [("a", "a"), ("b", "New name")]


@pytest.mark.parametrize("name", ["it's.csv", "a [b] *.csv", "it's a.parquet", "log's"])
def test_a_log_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "it's [w]ork"))
    if name.endswith(".csv"):
        raw = write_csv(tmp_path / "o'raw" / name, LOG_HEADER, LOG_ROWS)
    elif name.endswith(".parquet"):
        raw = tmp_path / name
        pq.write_table(parquet_log(), raw)
    else:
        raw = tmp_path / f"{name} [b] *"
        (raw / "log").mkdir(parents=True)
        pq.write_table(parquet_log(), raw / "log" / "it's [a] *.parquet")
    assert len(read_rows(impressions(tmp_path / "out", raw))) == 4


def test_a_spreadsheets_csv_is_read(tmp_path: Path) -> None:
    """A byte order mark, and no end of the last line."""
    log = write_csv(tmp_path / "raw" / "log.csv", LOG_HEADER, LOG_ROWS)
    log.write_bytes(b"\xef\xbb\xbf" + log.read_bytes().rstrip())
    assert len(read_rows(impressions(tmp_path / "out", tmp_path / "raw"))) == 4


def test_pandas_unnamed_index_column_does_no_harm(tmp_path: Path) -> None:
    write_csv(tmp_path / "raw" / "log.csv", ["", *LOG_HEADER], [[i, *row] for i, row in enumerate(LOG_ROWS)])
    assert len(read_rows(impressions(tmp_path / "out", tmp_path / "raw"))) == 4


def test_spark_gives_identical_rows(tmp_path: Path, spark: None) -> None:
    write_csv(tmp_path / "raw" / "log.csv", LOG_HEADER, LOG_ROWS)
    here = impressions(tmp_path / "duckdb", tmp_path / "raw")
    there = impressions(tmp_path / "spark", tmp_path / "raw", data=DataSettings(engine="spark"))
    for table in ("interactions", "items"):
        assert same_rows(here, there, table), table


def test_impression_log_with_an_items_file_and_a_rating_threshold(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    moments = ["2024-01-01T01:00:00+01:00", "2024-01-02T00:00:00Z", "2024-01-03 00:00:00"]
    rows = [["u", item, moment, stars] for item, moment, stars in zip("abc", moments, [3.5, 3, 4], strict=True)]
    write_csv(raw / "log.csv", ["who", "what", "when", "stars"], rows)
    write_csv(
        raw / "items.csv",
        ["what", "name", "genre", "year"],
        [["a", "Alpha, the first", "x", "1999"], ["b", "Beta", "", "2000"]],
    )
    log = ImpressionLog(
        user_id="who",
        item_id="what",
        timestamp="when",
        timestamp_unit="iso8601",
        rating="stars",
        liked_from=3.5,
        item_title="name",
        item_attributes=["genre", "year"],
        valid_from="2024-01-02",
        test_from="2024-01-03",
    )
    out = impressions(tmp_path / "out", raw, log)
    found = [(row[0], row[2], row[3], row[5]) for row in read_rows(out)]
    assert found == [("train", "a", 1, DAY_1), ("valid", "b", 0, DAY_2), ("test", "c", 1, DAY_3)]
    assert schema.rows(out, "items") == [
        {"item_id": "a", "title": "Alpha, the first", "attributes": ["genre=x", "year=1999"]},
        {"item_id": "b", "title": "Beta", "attributes": ["year=2000"]},
        {"item_id": "c", "title": "c", "attributes": []},
    ]


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 1_000), ("us", 1_000_000)])
def test_timestamp_units(tmp_path: Path, unit: str, factor: int) -> None:
    rows = [["u", "a", DAY_1 * factor + (factor - 1), 1, "", ""]]
    write_csv(tmp_path / "raw" / "log.csv", LOG_HEADER, rows)
    log = ImpressionLog.model_validate(LOG.model_dump() | {"timestamp_unit": unit})
    assert read_rows(impressions(tmp_path / "out", tmp_path / "raw", log))[0][5] == DAY_1


@pytest.mark.parametrize("kind", [pa.timestamp("ms", "UTC"), pa.timestamp("us"), pa.date32()], ids=str)
def test_a_parquet_logs_times_and_dates(tmp_path: Path, kind: pa.DataType) -> None:
    table = parquet_log()
    moments = table["timestamp"].cast(pa.timestamp("s")).cast(kind)
    pq.write_table(table.set_column(2, "timestamp", moments), tmp_path / "log.parquet")
    expected = [row[2] // 86_400 * 86_400 if kind == pa.date32() else row[2] for row in LOG_ROWS]
    found = read_rows(impressions(tmp_path / "out", tmp_path / "log.parquet"))
    assert sorted(row[5] for row in found) == sorted(expected)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (["u", "a", DAY_1, 2, 1, ""], r"log\.csv:6: .*label"),
        (["u", "a", DAY_1, "", 1, ""], r"log\.csv:6: .*label"),
        (["u", "a", "yesterday", 1, 1, ""], r"log\.csv:6: .*time"),
        (["u", "a", "1e300", 1, 1, ""], r"log\.csv:6: .*time"),
        (["u", "a", "-1e300", 1, 1, ""], r"log\.csv:6: .*time"),
        (["u", "a", "nan", 1, 1, ""], r"log\.csv:6: .*time"),
        (["u", "a", -1, 1, 1, ""], r"log\.csv:6: .*time"),
        # Milliseconds, where seconds are said.
        (["u", "a", DAY_1 * 1000, 1, 1, ""], r"log\.csv:6: .*time"),
        (["", "a", DAY_1, 1, 1, ""], r"log\.csv:6: .*user"),
        (["u", "a", DAY_1, 1, "good", ""], r"log\.csv:6: .*rating"),
        (["u", "a", DAY_1, 1, "nan", ""], r"log\.csv:6: .*rating"),
        (["u", "a", DAY_1, 1, "1e300", ""], r"log\.csv:6: .*rating"),
        (["u", "a", DAY_1, 1], r"log\.csv:6: .*Columns"),
        (["u", "a", DAY_1, 1, 1, "", "more"], r"log\.csv:6: .*Columns"),
    ],
)
def test_broken_impression_is_named(tmp_path: Path, row: list[Any], match: str) -> None:
    write_csv(tmp_path / "raw" / "log.csv", LOG_HEADER, [*LOG_ROWS, row])
    refused(tmp_path, match, "impressions", tmp_path / "raw", log=LOG.model_dump())


@pytest.mark.parametrize("moment", ["infinity", "1969-12-31T23:59:59Z", "290000-01-01", "2024-13-01"])
def test_a_date_out_of_range_is_no_readable_time(tmp_path: Path, moment: str) -> None:
    write_csv(
        tmp_path / "raw" / "log.csv", LOG_HEADER, [["u", "a", "2024-01-01", 1, "", ""], ["u", "a", moment, 1, "", ""]]
    )
    log = LOG.model_dump() | {"timestamp_unit": "iso8601"}
    refused(tmp_path, r"log\.csv:3: .*time", "impressions", tmp_path / "raw", log=log)


@pytest.mark.parametrize(
    "row", [["u", "a", "yesterday", 1, 1, ""], ["u", "a", DAY_1, 1], ["u", "a", DAY_1, 1, 1, "\udcff"]]
)
def test_a_broken_row_is_named_by_its_line_whatever_came_before(tmp_path: Path, row: list[Any]) -> None:
    log = tmp_path / "raw" / "log.csv"
    log.parent.mkdir()
    with log.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(LOG_HEADER)
        # Lines 2 - 4, then a blank one.
        writer.writerow(["u", "a", DAY_1, 1, 1, 'A title,\nof "three"\nlines'])
        file.write("\r\n")
        writer.writerow(row)
    refused(tmp_path, r"log\.csv:6: ", "impressions", tmp_path / "raw", log=LOG.model_dump())


def test_a_log_in_files_that_differ_is_refused(tmp_path: Path) -> None:
    raw, settings = tmp_path / "raw", {"log": LOG.model_dump()}
    (raw / "log").mkdir(parents=True)
    sound = parquet_log()
    pq.write_table(sound, raw / "log" / "0.parquet")
    strings = sound.set_column(2, "timestamp", sound["timestamp"].cast(pa.string()))
    for other, match in [
        (strings, "column 'timestamp' is string, but int64 in"),
        (sound.drop_columns(["title"]), "column 'title' is missing, but string in"),
    ]:
        pq.write_table(other, raw / "log" / "1.parquet")
        refused(tmp_path, rf"log/1\.parquet: {match} .*log/0\.parquet", "impressions", raw, **settings)
    # How Arrow holds a string, and what the mapping does not name, makes no difference.
    same = sound.set_column(5, "title", sound["title"].cast(pa.large_string()))
    same = same.set_column(0, "user_id", same["user_id"].dictionary_encode())
    pq.write_table(same.append_column("more", sound["clicked"]), raw / "log" / "1.parquet")
    assert len(read_rows(impressions(tmp_path / "out", raw))) == 8


@pytest.mark.parametrize("column", ["clicked", "title"])
def test_damaged_pages_are_refused_with_the_file(tmp_path: Path, column: str) -> None:
    raw = tmp_path / "raw"
    (raw / "log").mkdir(parents=True)
    table = pa.concat_tables([parquet_log()] * 500)
    for number in range(2):
        pq.write_table(table, raw / "log" / f"{number}.parquet", compression="zstd", use_dictionary=False)
    file = raw / "log" / "1.parquet"
    place = pq.read_metadata(file).row_group(0).column(table.column_names.index(column))
    with file.open("r+b") as data:
        # The page's body; its header is a few dozen bytes.
        data.seek(place.data_page_offset + place.total_compressed_size // 2)
        data.write(b"\xff" * (place.total_compressed_size // 2))
    refused(tmp_path, r"log/1\.parquet: damaged: .*copy it again", "impressions", raw, log=LOG.model_dump())


def test_broken_impression_files_are_named(tmp_path: Path) -> None:
    raw, settings = tmp_path / "raw", {"log": LOG.model_dump()}
    raw.mkdir()
    refused(tmp_path, r"expected log\.parquet, log\.csv", "impressions", raw, **settings)
    write_csv(raw / "log.csv", ["user_id", "item_id", "timestamp"], [["u", "i", "1"]])
    refused(tmp_path, r"log\.csv:1: no column 'clicked', 'stars'; it has", "impressions", raw, **settings)
    with (raw / "log.csv").open("wb") as file:
        file.write(",".join(LOG_HEADER).encode() + b"\nu,a,1704067200,1,1,x\nu,a,1704067200,1,1,\xff\xfe\n")
    refused(tmp_path, r"log\.csv:3: ", "impressions", raw, **settings)
    (raw / "log.csv").write_bytes(b"")
    refused(tmp_path, r"log\.csv:1: empty; expected a header", "impressions", raw, **settings)
    (raw / "log.csv").write_text('user_id,"item_id\n",timestamp\n')
    refused(tmp_path, r"log\.csv:1: no header", "impressions", raw, **settings)
    (raw / "log.csv").write_text("user_id,User_ID\n")
    refused(tmp_path, r"log\.csv:1: a column's name twice: user_id, User_ID", "impressions", raw, **settings)
    (raw / "log.csv").unlink()
    write_csv(tmp_path / "log.csv", LOG_HEADER, LOG_ROWS)
    pq.write_table(pa.table({"a": list(range(1000))}), raw / "log.parquet")
    (raw / "log.parquet").write_bytes((raw / "log.parquet").read_bytes()[:-20])
    refused(tmp_path, r"log\.parquet: not a whole Parquet file", "impressions", raw, **settings)
    pq.write_table(parquet_log().drop_columns(["stars"]), raw / "log.parquet")
    refused(tmp_path, r"log\.parquet: no column 'stars'; it has user_id, item_id", "impressions", raw, **settings)


def test_command_line_reads_a_logs_mapping(tmp_path: Path) -> None:
    write_csv(tmp_path / "raw" / "log.csv", LOG_HEADER, LOG_ROWS)
    mapping = tmp_path / "log.yaml"
    mapping.write_text("label: clicked\nrating: stars\nvalid_from: 2024-01-02\ntest_from: 2024-01-03\n")
    command = ["ingest", "--dataset", "impressions", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--log", str(mapping)])
    assert done.exit_code == 0, done.output
    assert len(read_rows(tmp_path / "out")) == 4


@pytest.mark.parametrize("changed", [{"item_title": "nam"}, {"item_attributes": ["brandd"]}])
def test_a_named_column_must_be_there(tmp_path: Path, changed: dict[str, Any]) -> None:
    pq.write_table(parquet_log(), tmp_path / "log.parquet")
    log = ImpressionLog.model_validate(LOG.model_dump() | changed)
    with pytest.raises(RawDataError, match=r"log\.parquet: no column '(nam|brandd)'"):
        impressions(tmp_path / "out", tmp_path / "log.parquet", log)


def test_a_log_needs_no_titles(tmp_path: Path) -> None:
    pq.write_table(parquet_log().drop_columns("title"), tmp_path / "log.parquet")
    out = impressions(tmp_path / "out", tmp_path / "log.parquet")
    assert [row["title"] for row in schema.rows(out, "items")] == ["a", "b"]
