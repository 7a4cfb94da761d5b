"""Small published tables for the training stages' tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trackrec import storage
from trackrec.config import PreferencesSettings
from trackrec.data import schema

TITLES = ["Fargo (1996)", "Scream (1996)", "Aladdin (1992)", "Alien (1979)", "Clueless (1995)", "Brazil (1985)"]


def publish_table(directory: Path, table: str, rows: list[dict[str, Any]]) -> Path:
    with storage.publish("test", PreferencesSettings(), inputs={}, outputs={table: directory}) as job:
        schema.write(job.outputs[table], table, rows)
    return directory


def publish_tables(root: Path, contexts: int, examples_per_context: int = 1) -> Mapping[str, Path]:
    """Contexts u0…, a RecCoT for each, and train examples whose label follows from the target's place in `TITLES`.

    One more example is in the test split, on a context without RecCoT: training must not touch it.
    """
    names = [f"c{number}" for number in range(contexts)]
    shown = [_context(name, number) for number, name in enumerate(names)] + [
        _context("held-out", 0) | {"split": "test"}
    ]
    recots = [
        {
            "context_id": name,
            "sample": 0,
            "text": f"Likes {TITLES[number % 6]}.",
            "num_tokens": 12,
            "finish_reason": "stop",
            "model": "teacher",
        }
        for number, name in enumerate(names)
    ]
    pairs = [(context, place) for context in range(contexts) for place in range(examples_per_context)]
    examples = [_example(row, names[c], (c + place) % 6) for row, (c, place) in enumerate(pairs)]
    examples.append(_example(len(pairs), "held-out", 0) | {"split": "test", "item_mean": 0.5})
    return {
        "contexts": publish_table(root / "contexts", "contexts", shown),
        "examples": publish_table(root / "examples", "examples", examples),
        "recots": publish_table(root / "recots", "recots", recots),
    }


def _context(name: str, number: int) -> dict[str, Any]:
    history = [
        {"title": TITLES[(number + step) % 6], "rating": float(1 + (number + step) % 5), "label": step % 2}
        for step in range(2 + number % 3)
    ]
    return {
        "context_id": name,
        "user_id": f"u{number}",
        "as_of": 1000 + number,
        "split": "train",
        "domain": "movies",
        "history": history,
    }


def _example(row: int, context: str, title: int) -> dict[str, Any]:
    return {
        "row_id": row,
        "split": "train",
        "context_id": context,
        "user_id": f"u{row}",
        "item_id": f"i{title}",
        "title": TITLES[title],
        "label": title % 2,
        "user_train_rows": 3,
        "item_train_rows": 3,
        "item_mean": None,
    }
