"""Published tables for tests of stages."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from trackrec import storage
from trackrec.data import schema


class _None(BaseModel):
    pass


def publish(directory: Path, facts: dict[str, Any] | None = None, **tables: list[dict[str, Any]]) -> Path:
    """Publishes `tables` (name to rows; a column left out is null) in `directory`, with `facts` in its manifest."""
    with storage.publish("test", _None(), inputs={}, outputs={"out": directory}) as job:
        for name, rows in tables.items():
            columns = schema.TABLES[name].names
            schema.write(job.outputs["out"], name, [{column: row.get(column) for column in columns} for row in rows])
        job.facts |= facts or {}
    return directory
