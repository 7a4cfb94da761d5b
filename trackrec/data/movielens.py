"""MovieLens: GroupLens's ML-1M files, and ML-100k as it lies in a package that anyone can fetch."""

import tempfile
from pathlib import Path

import duckdb

from trackrec.data import raw

# ML-100k, complete, inside this wheel's example data.
REQUIREMENT = "recbole==1.2.1"
_MEMBERS = "recbole/dataset_example/ml-100k/ml-100k"
_RATINGS_HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
_ITEMS_HEADER = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
# What the package writes for the one film whose title its source does not know.
_NO_TITLE = "unkonwn"
ML_100K_COUNTS = {"ratings": 100_000, "users": 943, "rated items": 1_682, "items": 1_682}


def extract(wheel: Path, out: Path) -> None:
    """Writes the MovieLens-100k files that `wheel` carries into the folder `out`.

    Raises:
        RawDataError: they are not the complete data set.
    """
    raw.unzip(wheel, [f"{_MEMBERS}.inter", f"{_MEMBERS}.item"], out)
    with tempfile.TemporaryDirectory() as scratch, duckdb.connect() as database:
        stage_ml_100k(database, out, Path(scratch))


def stage_ml_100k(database: duckdb.DuckDBPyConnection, source: Path, out: Path) -> None:
    """Checks the folder `extract` wrote and copies it into `out` as ratings.parquet and items.parquet.

    Raises:
        RawDataError: a file is missing or broken (says where), or they are not the complete data set.
    """
    path = raw.find(source, "ml-100k.item")
    rows: list[dict[str, object]] = []
    for number, text in raw.lines(path, "utf-8"):
        fields = _fields(path, number, text, "\t", 4)
        if number == 1:
            if text != _ITEMS_HEADER:
                raise raw.RawDataError(f"{path}:1: expected the header {_ITEMS_HEADER!r}, found {text!r}")
            continue
        item_id, title, year, genres = fields
        # One title has its year already, and something else in the year's column.
        shown = f"{title} ({year})" if year.isdigit() else title
        rows.append(
            {
                "line": number,
                "item_id": item_id,
                "title": None if title == _NO_TITLE else shown,
                "attributes": genres.split(),
            }
        )
    raw.stage_items(rows, out / "items.parquet")
    ratings = raw.find(source, "ml-100k.inter")
    raw.stage_ratings(database, ratings, "\t", _RATINGS_HEADER, out / "ratings.parquet")
    found = database.execute(
        """SELECT count(*), count(DISTINCT user_id), count(DISTINCT item_id), (SELECT count(*) FROM read_parquet(?))
        FROM read_parquet(?)""",
        [str(out / "items.parquet"), str(out / "ratings.parquet")],
    ).fetchall()[0]
    expected = tuple(ML_100K_COUNTS.values())
    if found != expected:
        raise raw.RawDataError(
            f"{source}: not the complete MovieLens-100k: {', '.join(ML_100K_COUNTS)} are {found}, expected {expected}; "
            "fetch it again"
        )


def stage_ml_1m(database: duckdb.DuckDBPyConnection, source: Path, out: Path) -> None:
    """Checks ML-1M and copies it into `out` as ratings.parquet and items.parquet.

    Args:
        source: `ml-1m.zip`, or a folder with `movies.dat` and `ratings.dat`, as GroupLens distributes them.

    Raises:
        RawDataError: a file is missing or broken; says where.
    """
    if source.is_file():
        raw.unzip(source, ["ml-1m/movies.dat", "ml-1m/ratings.dat"], out / "ml-1m")
        source = out / "ml-1m"
    path = raw.find(source, "movies.dat")
    rows: list[dict[str, object]] = []
    for number, text in raw.lines(path, "latin-1"):
        item_id, title, genres = _fields(path, number, text, "::", 3)
        rows.append({"line": number, "item_id": item_id, "title": title, "attributes": genres.split("|")})
    raw.stage_items(rows, out / "items.parquet")
    raw.stage_ratings(database, raw.find(source, "ratings.dat"), "::", None, out / "ratings.parquet")


def _fields(path: Path, number: int, text: str, delimiter: str, count: int) -> list[str]:
    fields = text.split(delimiter)
    if len(fields) != count:
        raise raw.RawDataError(f"{path}:{number}: {len(fields)} fields, expected {count}: {text!r}")
    return fields
