"""Published tables for the tests of `encode`, `train_ctr` and what follows them."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.ctr.conftest import tables
from tests.tables import publish
from trackrec.config import TrainCtrSettings
from trackrec.stages import train_ctr

WIDTH = 4
SETTINGS = TrainCtrSettings.model_validate(
    {
        "vector_width": WIDTH,
        "hidden": [8, 4],
        "epochs": 2,
        "seeds": 2,
        "min_rows": 1,
        "long_tail_rows": 12,
        "grid": {"embedding_size": [4], "batch_size": [64], "learning_rate": [0.01], "dropout": [0.0], "l2": [0.0]},
    }
)
ROWS: dict[str, list[dict[str, Any]]] = {name: table.to_pylist() for name, table in tables(users=12).items()}


def inputs(root: Path, vectors: list[dict[str, Any]] | None = None, **changed: list[dict[str, Any]]) -> dict[str, Path]:
    """The arguments of `train_ctr` that are tables; each of 12 users has a context right before row 5, but for u0.

    Args:
        vectors: in place of a vector a context.
        changed: rows in place of `ROWS`.
    """
    rows = ROWS | changed
    contexts = [
        {"context_id": f"c{user}", "user_id": f"u{user}", "as_of": 1000 * user + 4, "split": "train", "history": []}
        for user in range(1, 12)
    ]
    rng = np.random.default_rng(0)
    if vectors is None:
        vectors = [
            {"context_id": context["context_id"], "vector": rng.normal(size=WIDTH).tolist()} for context in contexts
        ]
    return {
        "interactions": publish(root / "interactions", interactions=rows["interactions"]),
        "items": publish(root / "items", items=rows["items"]),
        "examples": publish(root / "examples", examples=[]),
        "contexts": publish(root / "contexts", contexts=contexts),
        "encoded": publish(root / "vectors", vectors=vectors),
    }


def trained(
    root: Path,
    given: dict[str, Path],
    *,
    backbone: str = "deepfm",
    feature: str = "recot",
    settings: TrainCtrSettings = SETTINGS,
    seed: int = 3,
) -> Path:
    """Runs `train_ctr`; all its outputs lie under the folder that is returned."""
    out = root / f"{backbone}-{feature}-{seed}"
    train_ctr.run(
        settings,
        backbone=backbone,
        feature=feature,
        seed=seed,
        **given | {"encoded": None if feature == "none" else given["encoded"]},  # type: ignore[arg-type]
        trained=out / "trained",
        predictions=out / "predictions",
        metrics=out / "metrics",
    )
    return out
