"""A small log in which what a user likes can be learned, as the tables of a run."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from trackrec.data import schema

GENRES = ("drama", "comedy")


def tables(users: int = 30, per_user: int = 16, seed: int = 0) -> dict[str, pa.Table]:
    """Each user likes one genre, and rates items of both at random; the last quarter is valid and test."""
    rng = np.random.default_rng(seed)
    items = [{"item_id": f"i{k}", "title": f"T{k}", "attributes": [GENRES[k % 2]]} for k in range(20)]
    rows: list[dict[str, Any]] = []
    for user in range(users):
        history: list[dict[str, Any]] = []
        for step in range(per_user):
            item = int(rng.integers(20))
            label = int((item % 2 == user % 2) ^ (rng.random() < 0.1))
            split = "train" if step < per_user * 3 // 4 else "valid" if step % 2 else "test"
            rows.append(
                {
                    "row_id": len(rows),
                    "split": split,
                    "user_id": f"u{user}",
                    "item_id": f"i{item}",
                    "label": label,
                    "rating": 4.0 + label if label else 2.0,
                    "timestamp": 1000 * user + step,
                    "history": list(history),
                }
            )
            history.append({"item_id": f"i{item}", "rating": rows[-1]["rating"], "label": label})
    return {
        "interactions": pa.Table.from_pylist(rows, schema=schema.TABLES["interactions"]),
        "items": pa.Table.from_pylist(items, schema=schema.TABLES["items"]),
    }


@pytest.fixture(scope="session")
def log() -> dict[str, pa.Table]:
    return tables()
