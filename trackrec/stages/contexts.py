"""Stage `contexts`: histories to contexts, one for each distinct history as shown, and the examples that use them."""

import tempfile
from pathlib import Path
from typing import Any

from ibis import _
from ibis.expr.types import Table

from trackrec import storage
from trackrec.config import ContextsSettings
from trackrec.data import contexts as build
from trackrec.data import recipe
from trackrec.data.engine import Engine, open_engine
from trackrec.data_config import DataSettings

_IN_PROCESS = DataSettings()


def run(
    settings: ContextsSettings,
    data: DataSettings = _IN_PROCESS,
    *,
    interactions: Path,
    items: Path,
    contexts: Path,
    examples: Path,
    seed: int = 0,
) -> None:
    """Writes contexts.parquet, ordered by moment, and examples.parquet, in the interactions' order.

    Args:
        data: the engine; it changes no row.

    Raises:
        NotPublishedError, SchemaError: an input is no published table of its kind.
        EngineError: the engine cannot be reached.
    """
    inputs = {"interactions": interactions, "items": items}
    outputs = {"contexts": contexts, "examples": examples}
    with (
        storage.publish("contexts", settings, inputs=inputs, outputs=outputs, seed=seed) as job,
        tempfile.TemporaryDirectory(dir=job.work) as folder,
        open_engine(data, Path(folder)) as engine,
    ):
        given = engine.table(interactions, "interactions"), engine.table(items, "items")
        # Both tables come from it.
        rows = engine.kept(build.histories(*given, settings))
        drawn = engine.stored(build.contexts(rows, settings, seed), job.outputs["contexts"], "contexts")
        judged = engine.stored(build.examples(rows, drawn, settings, seed), job.outputs["examples"], "examples")
        job.facts.update(_counts(engine, rows, settings, contexts=drawn, examples=judged))


def _counts(engine: Engine, rows: Table, settings: ContextsSettings, **tables: Table) -> dict[str, Any]:
    short = rows.history.length() < settings.min_history
    [all_] = engine.fetched(rows.agg(rows=_.count(), short=short.sum().fill_null(0)))
    facts: dict[str, Any] = {"dropped_short_history": all_["short"]}
    for name, table in tables.items():
        splits = {split: (_.split == split).sum().fill_null(0) for split in recipe.SPLITS}
        [counts] = engine.fetched(table.agg(all=_.count(), **splits))
        facts |= {name if key == "all" else f"{name}_{key}": count for key, count in counts.items()}
    facts["dropped_by_sampling"] = all_["rows"] - facts["dropped_short_history"] - facts["examples"]
    return facts
