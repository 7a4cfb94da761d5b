"""Stage `ingest`: raw files to interactions and items (paper 4.1.1; CoLLM's recipes)."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from ibis import _
from ibis.expr.types import Table

from trackrec import storage
from trackrec.config import IngestSettings
from trackrec.data import amazon, impressions, movielens, recipe
from trackrec.data import raw as raw_files
from trackrec.data.engine import Engine, open_engine
from trackrec.data_config import DataSettings
from trackrec.progress import track
from trackrec.quantity import to_bytes

_IN_PROCESS = DataSettings()


def run(
    settings: IngestSettings,
    data: DataSettings = _IN_PROCESS,
    *,
    raw: Path | str,
    interactions: Path,
    items: Path,
    raw_version: str = "",
) -> None:
    """Writes interactions.parquet (in the recipe's row order) into `interactions`, items.parquet into `items`.

    Args:
        data: the engine; it changes no row.
        raw: the data set's file or folder, see docs/data.md; a string is the URI of a log that the engine itself reads.
        interactions, items: output directories, which may be the same one.
        raw_version: what lies at such a URI, by any name.

    Raises:
        RawDataError: the raw input is missing, truncated, mis-encoded or of the wrong shape; nothing is written then.
        EngineError: the engine cannot be reached.
    """
    inputs = {"raw": raw} if isinstance(raw, Path) else {}
    outputs = {"interactions": interactions, "items": items}
    with (
        storage.publish("ingest", settings, inputs=inputs, outputs=outputs, seed=f"{raw} {raw_version}") as job,
        tempfile.TemporaryDirectory(dir=job.work) as folder,
        track(range(3), "Ingest", unit="step") as bar,
    ):
        scratch = Path(folder)
        bar.set_postfix_str("reading")
        with (
            open_engine(data, scratch) as engine,
            impressions.naming_damage(raw) if settings.dataset == "impressions" else contextlib.nullcontext(),
        ):
            rows, titles, ties = _recipe(settings, data, engine, raw, scratch)
            table = recipe.interactions(rows, ties, settings.max_history)
            bar.update()
            bar.set_postfix_str("interactions")
            written = engine.stored(table, job.outputs["interactions"], "interactions")
            bar.update()
            bar.set_postfix_str("items")
            engine.stored(recipe.items_of(written, titles), job.outputs["items"], "items")
            bar.update()
            job.facts.update(_counts(engine, written))
        if not job.facts["train"]:
            raise raw_files.RawDataError(f"{raw}: no row falls in the train split; is this the right data set?")


def _recipe(
    settings: IngestSettings, data: DataSettings, engine: Engine, raw: Path | str, scratch: Path
) -> tuple[Table, Table, tuple[str, ...]]:
    """The labelled and split rows, the items, and the columns that break ties."""
    if settings.log is not None:
        log, items = impressions.tables(engine, raw, settings.log, scratch)
        return log, items, impressions.TIES
    if isinstance(raw, str):
        raise raw_files.RawDataError(f"{raw}: only a log (`dataset: impressions`) is read where it lies; copy it here")
    _stage(settings, data, raw, scratch)
    ratings, items = engine.parquet(scratch / "ratings.parquet"), engine.parquet(scratch / "items.parquet")
    match settings.dataset:
        case "ml-100k":
            return recipe.movielens_100k(ratings), items, recipe.FILE_ORDER
        case "ml-1m":
            return recipe.movielens_1m(ratings), items, recipe.FILE_ORDER
        case _:
            return recipe.amazon_book(ratings, items), items, recipe.FILE_ORDER


def _stage(settings: IngestSettings, data: DataSettings, raw: Path, out: Path) -> None:
    """Checks the raw files and copies them into `out`."""
    with raw_files.scratch_database(to_bytes(data.memory_limit), out) as database:
        match settings.dataset:
            case "ml-100k":
                movielens.stage_ml_100k(database, raw, out)
            case "ml-1m":
                movielens.stage_ml_1m(database, raw, out)
            case "amazon-book":
                amazon.stage_amazon_book(database, raw, out)


def _counts(engine: Engine, interactions: Table) -> dict[str, Any]:
    splits = {split: (_.split == split).sum().fill_null(0) for split in recipe.SPLITS}
    liked = {f"{split}_liked": _.label.mean(where=_.split == split) for split in recipe.SPLITS}
    counts = interactions.agg(rows=_.count(), **splits, **liked, users=_.user_id.nunique(), items=_.item_id.nunique())
    return engine.fetched(counts)[0]
