"""Stage `contexts`: histories to contexts, one for each distinct history as shown, and the examples that use them."""

import tempfile
from pathlib import Path
from typing import Any

from ibis import _
from ibis.backends import BaseBackend
from ibis.expr.types import Table

from trackrec import storage
from trackrec.config import ContextsSettings
from trackrec.data import backend, recipe, schema
from trackrec.data import contexts as build


def run(
    settings: ContextsSettings, *, interactions: Path, items: Path, contexts: Path, examples: Path, seed: int = 0
) -> None:
    """Writes contexts.parquet, ordered by moment, and examples.parquet, in the interactions' order.

    Raises:
        NotPublishedError, SchemaError: an input is no published table of its kind.
    """
    inputs = {"interactions": interactions, "items": items}
    outputs = {"contexts": contexts, "examples": examples}
    with (
        storage.publish("contexts", settings, inputs=inputs, outputs=outputs, seed=seed) as job,
        tempfile.TemporaryDirectory(dir=job.work) as folder,
        backend.connect(settings.engine, settings.memory_limit, Path(folder)) as connection,
    ):
        scratch = Path(folder)
        rows = build.histories(
            backend.read(connection, interactions, "interactions"),
            backend.read(connection, items, "items"),
            settings,
        )
        # Both tables come from it.
        connection.to_parquet(rows, scratch / "histories.parquet")
        rows = connection.read_parquet(scratch / "histories.parquet")
        backend.write(connection, build.contexts(rows, settings, seed), job.outputs["contexts"], "contexts", scratch)
        kept = connection.read_parquet(schema.path_of(job.outputs["contexts"], "contexts"))
        table = build.examples(rows, kept, settings, seed)
        backend.write(connection, table, job.outputs["examples"], "examples", scratch)
        job.facts.update(_counts(connection, rows, job.outputs, settings))


def _counts(
    connection: BaseBackend, rows: Table, outputs: dict[str, Path], settings: ContextsSettings
) -> dict[str, Any]:
    tables = {name: connection.read_parquet(schema.path_of(path, name)) for name, path in outputs.items()}
    short = rows.history.length() < settings.min_history
    facts: dict[str, Any] = {"dropped_short_history": int(rows.filter(short).count().to_pyarrow().as_py())}
    for name, table in tables.items():
        splits = {split: (_.split == split).sum().fill_null(0) for split in recipe.SPLITS}
        counts = table.agg(all=_.count(), **splits).to_pyarrow().to_pylist()[0]
        facts |= {name if key == "all" else f"{name}_{key}": count for key, count in counts.items()}
    facts["dropped_by_sampling"] = (
        int(rows.count().to_pyarrow().as_py()) - facts["dropped_short_history"] - facts["examples"]
    )
    return facts
