import gzip
import shutil
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from tests.data.ingesting import refused, run
from tests.data.raw_files import (
    ML_1M_ITEMS,
    ML_1M_ROWS,
    read_rows,
    same_rows,
    write_amazon,
    write_ml_1m,
    write_ml_100k,
)
from trackrec import storage
from trackrec.cli import app
from trackrec.data import movielens, schema
from trackrec.data_config import DataSettings
from trackrec.fetch import fetch

DECEMBER = 1512086400  # 2017-12-01 UTC
# Somewhere in the months of MovieLens-100k.
MOMENT = 880_000_000


def made_up_ml_100k(folder: Path, ratings: list[tuple[int, int, int, int]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small MovieLens-100k that passes for the complete one."""
    users, rated = {row[0] for row in ratings}, {row[1] for row in ratings}
    counts = {"ratings": len(ratings), "users": len(users), "rated items": len(rated), "items": 3}
    monkeypatch.setattr(movielens, "ML_100K_COUNTS", counts)
    return write_ml_100k(folder, ratings)


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_ml_1m_rows_order_ties_and_histories_are_the_recipes(tmp_path: Path, form: str) -> None:
    raw = write_ml_1m(tmp_path / "ml-1m")
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
            for file in raw.iterdir():
                archive.write(file, f"ml-1m/{file.name}")
        raw = tmp_path / "ml-1m.zip"
    out = run(tmp_path / "out", raw)
    assert read_rows(out) == ML_1M_ROWS
    assert schema.read(out, "interactions")["row_id"].to_pylist() == list(range(8))
    items = {row["item_id"]: (row["title"], row["attributes"]) for row in schema.rows(out, "items")}
    assert items == ML_1M_ITEMS
    facts = storage.read_manifest(out).facts
    assert (facts["train"], facts["valid"], facts["test"], facts["users"], facts["items"]) == (2, 3, 3, 2, 4)


def test_max_history_keeps_the_newest(tmp_path: Path) -> None:
    rows = read_rows(run(tmp_path / "out", write_ml_1m(tmp_path / "raw"), max_history=2))
    assert [row[-1] for row in rows] == [row[-1][-2:] for row in ML_1M_ROWS]


def test_ml_1m_counts(ml_1m: Path) -> None:
    facts = storage.read_manifest(ml_1m).facts
    counts = {name: facts[name] for name in ("train", "valid", "test", "users", "items")}
    assert counts == {"train": 33_891, "valid": 10_401, "test": 7_331, "users": 838, "items": 3_255}
    liked = [round(facts[f"{split}_liked"], 4) for split in ("train", "valid", "test")]
    assert liked == [0.5368, 0.5283, 0.5454]


def test_ml_1m_equals_plain_pandas(ml_1m: Path, ml_1m_zip: Path) -> None:
    """The recipe once more, row by row, in plain pandas."""
    from benchmarks.ingest import plain_pandas

    expected = plain_pandas(ml_1m_zip)
    found = schema.read(ml_1m, "interactions")
    for column in ("split", "user_id", "item_id", "label", "rating", "timestamp"):
        assert found[column].to_pylist() == expected[column].tolist(), column
    histories = found["history"].combine_chunks()
    assert histories.value_lengths().to_pylist() == expected["history"].map(len).tolist()
    items = [item for history in expected["history"] for item in history]
    assert histories.flatten().field("item_id").equals(pa.array(items))


def test_ml_100k_is_complete_and_cut_80_10_10(tmp_path: Path) -> None:
    out = run(tmp_path / "out", fetch("ml-100k"), "ml-100k")
    facts = storage.read_manifest(out).facts
    assert {name: facts[name] for name in ("train", "valid", "test", "users", "items")} == {
        "train": 80_000,
        "valid": 10_000,
        "test": 10_000,
        "users": 943,
        "items": 1_682,
    }
    table = schema.read(out, "interactions", ["split", "timestamp"]).to_pandas()
    latest, earliest = table.groupby("split").timestamp.max(), table.groupby("split").timestamp.min()
    assert latest["train"] <= earliest["valid"] and latest["valid"] <= earliest["test"]
    titles = {row["item_id"]: row["title"] for row in schema.rows(out, "items")}
    assert titles["1"] == "Toy Story (1995)"


def test_ml_100k_cuts_by_time_then_line_and_breaks_a_users_ties_by_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In time, lines 2-8 come first (7 rows), then the last three, of one moment, in file order: train, valid, test.
    ratings = [(1, item, 3, MOMENT + item) for item in range(1, 8)]
    ratings += [(2, item, 4, MOMENT + 50) for item in (267, 1412, 1)]
    out = run(tmp_path / "out", made_up_ml_100k(tmp_path / "raw", ratings, monkeypatch), "ml-100k")
    rows = [row[:3] for row in read_rows(out)]
    assert rows[-3:] == [("train", "2", "267"), ("valid", "2", "1412"), ("test", "2", "1")]
    titles = {row["item_id"]: row["title"] for row in schema.rows(out, "items")}
    assert titles["267"] == "267"
    assert titles["1412"] == "Land Before Time III: The Time of the Great Giving (1995)"


def amazon_raw(folder: Path) -> Path:
    """21 users and 21 books of 21 rows each in 2017 but for what the recipe must drop."""
    reviews = []

    def review(user: str, item: str, rating: float, moment: int) -> None:
        reviews.append({"reviewerID": user, "asin": item, "overall": rating, "unixReviewTime": moment, "x": "text"})

    for user in range(21):
        for item in range(21):
            # The last four of user 20 are December's, three of them at one moment.
            late = user == 20 and item >= 17
            moment = DECEMBER + 86_400 * (item == 20) if late else DECEMBER - 86_400 * (22 - item)
            review(f"u{user:02}", f"i{item:02}", 5.0 if (user + item) % 2 else 4.0, moment)
    for item in range(20):  # 20 rows are not more than 20
        review("short", f"i{item:02}", 5.0, DECEMBER - 1)
    review("u00", "i00", 5.0, 1483228799)  # the last second of 2016
    review("u00", "i00", 5.0, 1514764800)  # the first of 2018
    for user in range(21):
        review(f"u{user:02}", "untitled", 5.0, DECEMBER - 1)
        review(f"u{user:02}", "blank", 5.0, DECEMBER - 1)
    meta = [{"asin": f"i{item:02}", "title": "old", "category": []} for item in range(21)]
    meta += [{"asin": f"i{item:02}", "title": f"Book {item}", "category": ["Books", "Fiction"]} for item in range(21)]
    meta += [{"asin": "blank", "title": "  ", "category": ["Books"]}, {"asin": "unread", "title": "x"}]
    return write_amazon(folder, reviews, meta)


def test_amazon_book_recipe(tmp_path: Path) -> None:
    out = run(tmp_path / "out", amazon_raw(tmp_path / "raw"), "amazon-book")
    rows = read_rows(out)
    # 21 x 21 rows; "short" has too few, and its rows still counted for the books.
    assert len(rows) == 441
    assert {row[0] for row in rows[:-4]} == {"train"}
    # December: i17, i18, i19 at one moment in file order, i20 a day later; the first half of the four is valid.
    assert [row[:3] for row in rows[-4:]] == [
        ("valid", "u20", "i17"),
        ("valid", "u20", "i18"),
        ("test", "u20", "i19"),
        ("test", "u20", "i20"),
    ]
    # Only five stars are liked: odd user + item.
    assert [row[3] for row in rows[:3]] == [0, 1, 0]
    assert rows[2][-1] == [("i00", 4.0, 0), ("i01", 5.0, 1)]
    items = schema.rows(out, "items")
    assert len(items) == 21
    assert items[3] == {"item_id": "i03", "title": "Book 3", "attributes": ["Books", "Fiction"]}


# --- broken input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"3::4::5\n", r"ratings\.dat:11: .*Columns"),
        (b"3::4::5::6::7\n", r"ratings\.dat:11: .*Columns"),
        (b"3::4::five::1000000000\n", r"ratings\.dat:11: .*five"),
        (b"3::4::\xff::1000000000\n", r"ratings\.dat:11: "),
        (b"3::4::nan::1000000000\n", r"ratings\.dat:11: "),
        (b"3::::4::1000000000\n", r"ratings\.dat:11: "),
        (b"\n3::4::4::1000000000\n", r"ratings\.dat:11: blank line"),
        (b"3::4::4::1000000000\n3::4::5\n", r"ratings\.dat:12: .*Columns"),
        # The publisher's last line, less its last bytes: still a row, but in 1973.
        (b"3::4::4::1000000000\n3::4::4::100000000", r"ratings\.dat:12: cut off.*download it again"),
        (b"3::4::4::100000000\n", r"ratings\.dat:11: .*a time outside 1995 - 2100: \[3, 4, 4\.0, 100000000\]"),
        (b"3::4::4::1000000000000\n", r"ratings\.dat:11: .*a time outside"),
        (b"3::4::0::1000000000\n", r"ratings\.dat:11: .*a rating outside 0\.5 - 5"),
        (b"3::4::10::1000000000\n", r"ratings\.dat:11: .*a rating outside"),
    ],
)
def test_broken_ratings_line_is_named(tmp_path: Path, line: bytes, match: str) -> None:
    raw = write_ml_1m(tmp_path / "raw")
    with (raw / "ratings.dat").open("ab") as file:
        file.write(line)
    refused(tmp_path, match, "ml-1m", raw)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"50::A film\n", r"movies\.dat:4: 2 fields, expected 3"),
        ("50::Amélie::Comedy\n".encode(), r"movies\.dat:4: UTF-8"),
        ("50::Alien::Horror\n".encode("utf-16-le"), r"movies\.dat:4: control characters"),
        (b"\n", r"movies\.dat:4: blank line"),
        (b"50::Alien (1979)::Horr", r"movies\.dat:4: cut off.*download it again"),
    ],
)
def test_broken_movies_line_is_named(tmp_path: Path, line: bytes, match: str) -> None:
    raw = write_ml_1m(tmp_path / "raw")
    with (raw / "movies.dat").open("ab") as file:
        file.write(line)
    refused(tmp_path, match, "ml-1m", raw)


def test_empty_missing_and_wrong_files_are_named(tmp_path: Path) -> None:
    raw = write_ml_1m(tmp_path / "raw")
    (raw / "ratings.dat").write_bytes(b"")
    refused(tmp_path, r"ratings\.dat:1: no ratings", "ml-1m", raw)
    (raw / "ratings.dat").unlink()
    refused(tmp_path, r"expected a folder with ratings\.dat; found movies\.dat", "ml-1m", raw)
    (raw / "ratings.dat").write_text("1::1::5::960000000\n")
    refused(tmp_path, "no row falls in the train split", "ml-1m", raw)
    wrong = write_ml_100k(tmp_path / "ml-100k", [(1, 1, 4, MOMENT)])
    text = (wrong / "ml-100k.inter").read_text().replace("rating:float", "stars:float")
    (wrong / "ml-100k.inter").write_text(text)
    refused(tmp_path, r"ml-100k\.inter:1: expected the header", "ml-100k", wrong)


def test_incomplete_ml_100k_is_refused(tmp_path: Path) -> None:
    raw = Path(shutil.copytree(fetch("ml-100k"), tmp_path / "raw"))
    for name, match in (
        ("ml-100k.inter", r"ratings, users, rated items, items are \(99999, .*expected \(100000, 943, 1682, 1682\)"),
        ("ml-100k.item", r"ratings, users, rated items, items are .*, 1681\), expected"),
    ):
        whole = (raw / name).read_bytes()
        lines = whole.splitlines(keepends=True)
        (raw / name).write_bytes(whole[:-1])
        refused(tmp_path, rf"{name}:{len(lines)}: cut off", "ml-100k", raw)
        (raw / name).write_bytes(b"".join(lines[:-1]))
        refused(tmp_path, rf"raw: not the complete MovieLens-100k: {match}.*; fetch it again", "ml-100k", raw)
        (raw / name).write_bytes(whole)


def test_truncated_and_damaged_zip(tmp_path: Path) -> None:
    raw = write_ml_1m(tmp_path / "ml-1m")
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        for file in raw.iterdir():
            archive.write(file, f"ml-1m/{file.name}")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole.read_bytes()[:-40])
    refused(tmp_path, r"cut\.zip: damaged or truncated", "ml-1m", cut)
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(whole.read_bytes().replace(b"2::30::5", b"2::30::1"))
    refused(tmp_path, r"damaged\.zip: damaged or truncated", "ml-1m", damaged)
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("x.txt", "x")
    refused(tmp_path, r"other\.zip: There is no item named 'ml-1m/movies\.dat'", "ml-1m", other)


def test_broken_amazon_files_are_named(tmp_path: Path) -> None:
    raw = amazon_raw(tmp_path / "raw")
    reviews = raw / "Books_5.json.gz"
    whole = reviews.read_bytes()
    lines = gzip.decompress(whole).splitlines(keepends=True)

    def with_line_7(line: bytes) -> bytes:
        return gzip.compress(b"".join([*lines[:6], line, *lines[7:]]))

    cases = [
        (whole[: len(whole) // 2], r"Books_5\.json\.gz: .*end of GZIP.*cut short"),
        (b"".join(lines), r"Books_5\.json\.gz: .*not a GZIP"),
        (with_line_7(b'{"reviewerID": "u\n'), r"Books_5\.json\.gz:7: not JSON"),
        (with_line_7(lines[6].replace(b"u00", b"\xff")), r"Books_5\.json\.gz:7: "),
        (with_line_7(lines[6].replace(b'"overall": 4.0', b'"overall": "four"')), r"Books_5\.json\.gz:7: .*four"),
        (
            with_line_7(lines[6].replace(b'"overall": 4.0', b'"overall": 1e300')),
            r"Books_5\.json\.gz:7: .*rating BETWEEN",
        ),
        (with_line_7(lines[6].replace(b'"asin"', b'"isbn"')), r"Books_5\.json\.gz:7: lacks a value"),
        (with_line_7(b"[1, 2]\n"), r"Books_5\.json\.gz:7: "),
    ]
    for data, match in cases:
        reviews.write_bytes(data)
        refused(tmp_path, match, "amazon-book", raw)


def test_malformed_json_is_named_deep_in_a_large_file(tmp_path: Path) -> None:
    """The parser reads in blocks and in parallel; the line counts over all of them."""
    line = b'{"reviewerID": "u", "asin": "i", "overall": 5.0, "unixReviewTime": 1500000000, "x": "%s"}\n' % (b"t" * 900)
    raw = write_amazon(tmp_path / "raw", [], [{"asin": "i", "title": "t"}])
    (raw / "Books_5.json.gz").write_bytes(
        gzip.compress(line * 100_000 + b'{"asin": \n' + line * 5_000, compresslevel=1)
    )
    refused(tmp_path, r"Books_5\.json\.gz:100001: not JSON", "amazon-book", raw)


# --- two engines, and the command line --------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["ml-1m", "ml-100k", "amazon-book"])
def test_spark_gives_identical_rows(tmp_path: Path, spark: None, monkeypatch: pytest.MonkeyPatch, dataset: str) -> None:
    raw = tmp_path / "raw"
    if dataset == "ml-1m":
        write_ml_1m(raw)
    elif dataset == "ml-100k":
        ratings = [(user, item, 1 + item % 5, MOMENT + user * item % 7) for user in (9, 10) for item in range(1, 30)]
        made_up_ml_100k(raw, ratings, monkeypatch)
    else:
        amazon_raw(raw)
    here = run(tmp_path / "duckdb", raw, dataset)
    there = run(tmp_path / "spark", raw, dataset, data=DataSettings(engine="spark"))
    for table in ("interactions", "items"):
        assert same_rows(here, there, table), table


def test_spark_gives_the_same_ml_1m(tmp_path: Path, spark: None, ml_1m: Path, ml_1m_zip: Path) -> None:
    there = run(tmp_path / "spark", ml_1m_zip, data=DataSettings(engine="spark"))
    for table in ("interactions", "items"):
        assert same_rows(ml_1m, there, table), table


def test_equal_runs_write_equal_bytes(tmp_path: Path) -> None:
    raw = write_ml_1m(tmp_path / "raw")
    first, second = (storage.read_manifest(run(tmp_path / name, raw)).content_hash for name in ("a", "b"))
    assert first == second


def test_paths_may_hold_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / 'it\'s [a] "folder"; *'
    monkeypatch.setenv(storage.WORK_ENV, str(odd / "work"))
    assert read_rows(run(odd / "out", write_ml_1m(odd / "ml-1m"))) == ML_1M_ROWS
    assert len(read_rows(run(odd / "books", amazon_raw(odd / "amazon"), "amazon-book"))) == 441


def test_progress_names_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "out", write_ml_1m(tmp_path / "raw"))
    shown = capsys.readouterr().err
    assert all(
        f"{number}/3" in shown and name in shown for number, name in enumerate(("reading", "interactions", "items"))
    )
    assert "3/3" in shown


def test_command_line(tmp_path: Path) -> None:
    raw, out = write_ml_1m(tmp_path / "raw"), tmp_path / "out"
    done = CliRunner().invoke(app, ["ingest", "--dataset", "ml-1m", "--raw", str(raw), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert read_rows(out) == ML_1M_ROWS
    shutil.rmtree(raw)
    done = CliRunner().invoke(app, ["ingest", "--dataset", "ml-1m", "--raw", str(raw), "--out", str(tmp_path / "no")])
    assert done.exit_code == 1
    assert "does not exist" in done.output
    assert not (tmp_path / "no").exists()
    done = CliRunner().invoke(app, ["ingest", "--dataset", "ml-2m", "--raw", str(out), "--out", str(tmp_path / "no")])
    assert done.exit_code == 1
    assert "dataset: Input should be 'ml-100k', 'ml-1m', 'amazon-book' or 'impressions'" in done.output
