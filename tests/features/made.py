"""Users' tables for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trackrec.data import schema

AS_OF = 1_000_000


def user(number: int, *titles: str, domain: str = "movies", items: int = 3) -> dict[str, Any]:
    """A user with a history of their own; or with that of `titles`."""
    shown = titles or [f"Film {(number * 7 + at) % 97} ({1950 + (number + at) % 70})" for at in range(items)]
    history = [
        {"item_id": f"i{at}", "title": title, "rating": float(at % 5 + 1), "label": int(at % 5 >= 3)}
        for at, title in enumerate([*shown, *([] if titles else [f"Number {number}"])])
    ]
    return {"user_id": f"u{number:07}", "as_of": AS_OF, "domain": domain, "history": history}


def write(path: Path, rows: Sequence[dict[str, Any]], row_group: int = 1000) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema.TABLES["users"]), path, row_group_size=row_group)
    return path
