"""Amazon-Book: the 2018 review files `Books_5.json.gz` and `meta_Books.json.gz`, read out of core."""

from pathlib import Path

import duckdb

from trackrec.data import raw

_REVIEWS = {"reviewerID": "VARCHAR", "asin": "VARCHAR", "overall": "DOUBLE", "unixReviewTime": "BIGINT"}
_META = {"asin": "VARCHAR", "title": "VARCHAR", "category": "VARCHAR[]"}


def stage_amazon_book(database: duckdb.DuckDBPyConnection, source: Path, out: Path) -> None:
    """Checks the folder's two files and copies what the recipe needs into `out` as ratings.parquet and items.parquet.

    Raises:
        RawDataError: a file is missing or broken; says where.
    """
    reviews, meta = raw.find(source, "Books_5.json.gz"), raw.find(source, "meta_Books.json.gz")
    raw.stage_json(
        database,
        meta,
        _META,
        "SELECT line, asin AS item_id, title, category AS attributes FROM {source}",
        "item_id IS NOT NULL",
        out / "items.parquet",
    )
    raw.stage_json(
        database,
        reviews,
        _REVIEWS,
        "SELECT line, reviewerID AS user_id, asin AS item_id, overall AS rating, unixReviewTime AS timestamp "
        "FROM {source}",
        "user_id IS NOT NULL AND item_id IS NOT NULL AND rating BETWEEN 0 AND 5 AND timestamp IS NOT NULL",
        out / "ratings.parquet",
    )
