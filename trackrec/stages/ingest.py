"""Stage `ingest`: raw files to interactions and items (paper 4.1.1; CoLLM's recipes)."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from ibis import _
from ibis.backends import BaseBackend
from ibis.expr.types import Table

from trackrec import storage
from trackrec.config import IngestSettings
from trackrec.data import amazon, backend, impressions, movielens, recipe, schema
from trackrec.data import raw as raw_files
from trackrec.progress import track


def run(settings: IngestSettings, *, raw: Path, interactions: Path, items: Path) -> None:
    """Writes interactions.parquet (in the recipe's row order) into `interactions`, items.parquet into `items`.

    Args:
        raw: the data set's file or folder, see docs/data.md.
        interactions, items: output directories, which may be the same one.

    Raises:
        RawDataError: the raw input is missing, truncated, mis-encoded or of the wrong shape; nothing is written then.
    """
    outputs = {"interactions": interactions, "items": items}
    with (
        storage.publish("ingest", settings, inputs={"raw": raw}, outputs=outputs) as job,
        tempfile.TemporaryDirectory(dir=job.work) as folder,
        track(range(3), "Ingest", unit="step") as bar,
    ):
        scratch = Path(folder)
        bar.set_postfix_str("reading")
        if settings.dataset != "impressions":
            _stage(settings, raw, scratch)
        with (
            backend.connect(settings.engine, settings.memory_limit, scratch) as connection,
            impressions.naming_damage(raw) if settings.dataset == "impressions" else contextlib.nullcontext(),
        ):
            rows, titles, ties = _recipe(settings, connection, raw, scratch)
            table = recipe.interactions(rows, ties, settings.max_history)
            bar.update()
            bar.set_postfix_str("interactions")
            backend.write(connection, table, job.outputs["interactions"], "interactions", scratch)
            written = connection.read_parquet(schema.path_of(job.outputs["interactions"], "interactions"))
            bar.update()
            bar.set_postfix_str("items")
            backend.write(connection, recipe.items_of(written, titles), job.outputs["items"], "items", scratch)
            bar.update()
            job.facts.update(_counts(written))
        if not job.facts["train"]:
            raise raw_files.RawDataError(f"{raw}: no row falls in the train split; is this the right data set?")


def _stage(settings: IngestSettings, raw: Path, out: Path) -> None:
    """Checks the raw files and copies them into `out`."""
    with raw_files.scratch_database(backend.to_bytes(settings.memory_limit), out) as database:
        match settings.dataset:
            case "ml-100k":
                movielens.stage_ml_100k(database, raw, out)
            case "ml-1m":
                movielens.stage_ml_1m(database, raw, out)
            case "amazon-book":
                amazon.stage_amazon_book(database, raw, out)


def _recipe(
    settings: IngestSettings, connection: BaseBackend, raw: Path, staged: Path
) -> tuple[Table, Table, tuple[str, ...]]:
    """The labelled and split rows, the items, and the columns that break ties."""
    if settings.log is not None:
        log, items = impressions.tables(connection, raw, settings.log, staged)
        return log, items, impressions.TIES
    ratings = connection.read_parquet(staged / "ratings.parquet")
    items = connection.read_parquet(staged / "items.parquet")
    match settings.dataset:
        case "ml-100k":
            return recipe.movielens_100k(ratings), items, recipe.FILE_ORDER
        case "ml-1m":
            return recipe.movielens_1m(ratings), items, recipe.FILE_ORDER
        case _:
            return recipe.amazon_book(ratings, items), items, recipe.FILE_ORDER


def _counts(interactions: Table) -> dict[str, Any]:
    splits = {split: (_.split == split).sum().fill_null(0) for split in recipe.SPLITS}
    liked = {f"{split}_liked": _.label.mean(where=_.split == split) for split in recipe.SPLITS}
    return (
        interactions.agg(rows=_.count(), **splits, **liked, users=_.user_id.nunique(), items=_.item_id.nunique())
        .to_pyarrow()
        .to_pylist()[0]
    )
