"""Small raw files in the publishers' formats, with the rows their recipes must give, derived by hand."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from trackrec.data import schema

# Moments of the ML-1M windows, UTC.
START, VALID, TEST, END = 991353600, 1017619200, 1030838400, 1044057600
ML_1M_RATINGS = [
    (2, 30, 5, START),
    (10, 20, 3, START - 1),  # before the window; it makes line 2 the first of item 20
    (2, 10, 2, VALID),
    (2, 20, 4, VALID),  # tied with the row above: item 20 was seen first
    (2, 40, 3, VALID - 1),
    (10, 10, 4, TEST),
    (10, 30, 5, TEST),  # tied: item 30 was seen on line 1, item 10 on line 3
    (10, 40, 1, END),  # after the window
    (10, 30, 1, TEST - 1),
    (10, 10, 5, TEST),  # tied with line 6 in all but the line
]
# split, user, item, label, rating, timestamp, history as (item, rating, label); users in the order of their numbers.
ML_1M_ROWS = [
    ("train", "2", "30", 1, 5, START, []),
    ("train", "2", "40", 0, 3, VALID - 1, [("30", 5, 1)]),
    ("valid", "2", "20", 1, 4, VALID, [("30", 5, 1), ("40", 3, 0)]),
    ("valid", "2", "10", 0, 2, VALID, [("30", 5, 1), ("40", 3, 0), ("20", 4, 1)]),
    ("valid", "10", "30", 0, 1, TEST - 1, []),
    ("test", "10", "30", 1, 5, TEST, [("30", 1, 0)]),
    ("test", "10", "10", 1, 4, TEST, [("30", 1, 0), ("30", 5, 1)]),
    ("test", "10", "10", 1, 5, TEST, [("30", 1, 0), ("30", 5, 1), ("10", 4, 1)]),
]
# Film 40 has no title: it goes by its id.
ML_1M_ITEMS = {
    "10": ("Amélie (2001)", ["Comedy", "Romance"]),
    "20": ("Heat (1995)", ["Action"]),
    "30": ("Toy Story (1995)", ["Animation"]),
    "40": ("40", []),
}


def write_ml_1m(folder: Path) -> Path:
    folder.mkdir(parents=True)
    lines = ["::".join(map(str, row)) for row in ML_1M_RATINGS]
    (folder / "ratings.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    movies = [f"{item}::{title}::{'|'.join(genres)}" for item, (title, genres) in ML_1M_ITEMS.items() if item != "40"]
    (folder / "movies.dat").write_text("\n".join(movies) + "\n", encoding="latin-1")
    return folder


def write_ml_100k(folder: Path, ratings: list[tuple[int, int, int, int]]) -> Path:
    folder.mkdir(parents=True)
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    body = "".join("\t".join(map(str, row)) + "\n" for row in ratings)
    (folder / "ml-100k.inter").write_text(head + body, encoding="utf-8")
    (folder / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tToy Story\t1995\tAnimation Children's Comedy\n"
        "267\tunkonwn\tunkonwn\tunknown\n"
        "1412\tLand Before Time III: The Time of the Great Giving (1995)\tV\tAnimation Children's\n",
        encoding="utf-8",
    )
    return folder


def write_amazon(folder: Path, reviews: list[dict[str, Any]], meta: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    for name, rows in (("Books_5.json.gz", reviews), ("meta_Books.json.gz", meta)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_bytes(gzip.compress(text.encode()))
    return folder


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read_rows(directory: Path) -> list[tuple[Any, ...]]:
    """A directory's interactions as `ML_1M_ROWS` writes them."""
    return [
        (
            *(row[name] for name in ("split", "user_id", "item_id", "label", "rating", "timestamp")),
            [(item["item_id"], item["rating"], item["label"]) for item in row["history"]],
        )
        for row in pq.read_table(directory / "interactions.parquet").to_pylist()
    ]


def same_rows(here: Path, there: Path, table: str) -> bool:
    """Whether two directories hold equal rows in the same order (only one engine marks columns as never null)."""
    one, other = (schema.read(directory, table).cast(schema.TABLES[table]) for directory in (here, there))
    return one.num_rows > 0 and one.equals(other)
