"""Rankers and feature tables for the tests of the online ranker, and the scores that training's own code gives."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tests.ctr.conftest import tables
from trackrec.config import Backbone
from trackrec.ctr import ranker
from trackrec.ctr.features import Dataset, dataset
from trackrec.data import schema
from trackrec.features import table as features
from trackrec.serving import repository
from trackrec.serving.contract import EncoderContract, GeneratorContract, RankerContract
from trackrec.serving_config import ExportSettings

GENERATOR = GeneratorContract(
    model_version="g", domain="movies", history_length=9, opening="", closing="", special_tokens=(), max_tokens=8,
    repetition_penalty=1.0, max_prompt_tokens=99,
)  # fmt: skip
ENCODER = EncoderContract(model_version="encoder-1", width=6, pooling="mean", limit=64)
LENGTH = 5
SEED = 3
# Twenty items, of which training's log knows eighteen; 12 users with numbers of their own.
LOG = tables(users=12, per_user=12)
ITEMS = pa.concat_tables(
    [
        LOG["items"],
        pa.Table.from_pylist(
            [{"item_id": "new", "title": "N", "attributes": ["drama", "unheard"]}], schema=schema.TABLES["items"]
        ),
    ]
)


def earlier(*rows: tuple[str, float | None, int]) -> list[dict[str, Any]]:
    return [{"item_id": item, "rating": rating, "label": label} for item, rating, label in rows]


@dataclass(frozen=True)
class User:
    """A row of the feature table; without `vector` its status is not "ok"."""

    user_id: str
    history: list[dict[str, Any]] = field(default_factory=list)
    vector: Sequence[float] | None = None


def vector(seed: int) -> list[float]:
    """What float16 holds."""
    return np.random.default_rng(seed).normal(size=ENCODER.width).astype(np.float16).astype(float).tolist()


LONG = earlier(*((f"i{k}", 5.0 if k % 2 else 2.0, k % 2) for k in range(9)))
USERS = [
    User("u0", LONG, vector(0)),
    User("u1", earlier(("i3", 5.0, 1), ("gone", 2.0, 0), ("i4", 3.5, 1), ("i5", None, 0)), vector(1)),
    User("u2", LONG[:2]),
    User("u3", [], None),
    User("u4", [], vector(4)),
    # Training never saw this one.
    User("ü-new", LONG[2:4], vector(5)),
]
# u5: known to training alone.
ASKED_USERS = [*(user.user_id for user in USERS), "u5", "nobody"]
ASKED_ITEMS = ["i0", "i7", "new", "not in the catalogue", "i0", "i19"]


def write_features(
    root: Path,
    dt: str,
    users: Sequence[User],
    *,
    shard_users: int = 4,
    encoder: EncoderContract = ENCODER,
    generator: str = GENERATOR.model_version,
) -> Path:
    """Writes a date as the batch job does, and commits it; returns its folder."""
    users = sorted(users, key=lambda user: user.user_id.encode())
    date = root / features.date_folder(dt)
    identity = features.Identity(
        dt=dt, users="u", num_users=len(users), shard_users=shard_users, generator_version=generator,
        encoder_version=encoder.model_version, width=encoder.width, embedding_dtype="float16", generation="x",
    )  # fmt: skip
    shards = []
    for shard, start in enumerate(range(0, len(users), shard_users)):
        part = users[start : start + shard_users]
        rows = [
            {
                "user_id": user.user_id,
                "as_of": 1,
                "status": "ok" if user.vector else "failed",
                "recot": "It is so." if user.vector else None,
                "embedding": None if user.vector is None else [np.float16(x) for x in user.vector],
                "generator_version": generator,
                "encoder_version": encoder.model_version,
                "copied": False,
                "history": user.history,
            }
            for user in part
        ]
        path = date / features.shard_path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=features.schema(encoder.width, "float16")), path)
        shards.append(
            features.ShardEntry(
                path=features.shard_path(shard),
                rows=len(part),
                bytes=path.stat().st_size,
                first_user=part[0].user_id,
                last_user=part[-1].user_id,
            )
        )
    manifest = features.Manifest(
        identity=identity, committed=dt, rows=len(users), status=dict.fromkeys(features.STATUSES, 0), copied=0,
        generated=0, prompt_tokens=None, recot_tokens=None, seconds=None, generator_seconds=0, usd_per_hour=None,
        usd_per_1000_users=None, settings={}, shards=shards,
    )  # fmt: skip
    date.mkdir(parents=True, exist_ok=True)
    commit(date, manifest.model_dump_json())
    return date


def commit(date: Path, manifest: str) -> None:
    (date / features.MANIFEST).write_text(manifest, encoding="utf-8")
    (date / features.SUCCESS).write_text(hashlib.sha256(manifest.encode()).hexdigest(), encoding="utf-8")


def data_of(rows: list[dict[str, Any]], users: Sequence[User], *, reads: bool) -> Dataset:
    """Training's numbers for its log and, after it, `rows`."""
    asked = pa.Table.from_pylist(rows, schema=schema.TABLES["interactions"])
    vectors = {user.user_id: user.vector for user in users if user.vector is not None}
    place = {user: number for number, user in enumerate(vectors, start=1)}
    recot = np.zeros(len(LOG["interactions"]) + len(rows), dtype=np.int64)
    if reads:
        recot[len(LOG["interactions"]) :] = [place.get(row["user_id"], 0) for row in rows]
    width = ENCODER.width if reads else 0
    table = torch.tensor([[0.0] * width, *([*v] for v in vectors.values())]) if reads else torch.zeros(1, 0)
    return dataset(
        pa.concat_tables([LOG["interactions"], asked]), ITEMS, history_length=LENGTH, min_rows=5, recot=recot,
        vectors=table,
    )  # fmt: skip


def write_ranker(folder: Path, backbone: Backbone, *, reads: bool, name: str | None = None) -> RankerContract:
    """Writes the model `ranker_trackrec` or `ranker_base` to `folder`, its weights large enough to tell rows apart."""
    data = data_of([], [], reads=reads)
    model = ranker.build(backbone, data.vocabulary, 4, (8, 4), SEED)
    drawn = torch.Generator().manual_seed(SEED)
    weights = {key: torch.randn(weight.shape, generator=drawn) * 0.4 for key, weight in model.state_dict().items()}
    config = ranker.RankerConfig(
        backbone=backbone, embedding_size=4, hidden=(8, 4), history_length=LENGTH, vocabulary=data.vocabulary,
        names=data.names, seeds=(SEED,),
    )  # fmt: skip
    out = folder / (name or ("ranker_trackrec" if reads else "ranker_base"))
    trained, items = folder / f".{out.name}", folder / ".items"
    trained.mkdir(parents=True)
    items.mkdir(exist_ok=True)
    ranker.save(trained, config, [weights])
    schema.write(items, "items", ITEMS)
    generator, encoder = (GENERATOR, ENCODER) if reads else (None, None)
    settings = ExportSettings(seed=SEED)
    return repository.write_ranker(out, settings, ranker=trained, items=items, generator=generator, encoder=encoder)


def reference(model: Path, users: Sequence[User], asked: Sequence[str], items: Sequence[str]) -> np.ndarray:
    """[asked, items]: P(liked) by `Ranker` on the numbers that `dataset` gives."""
    config, trained = ranker.load(model / "1/ranker", SEED)
    histories = {user.user_id: user.history for user in users}
    rows = [
        {
            "row_id": 10_000 + k * len(items) + j, "split": "test", "user_id": user, "item_id": item, "label": 0,
            "rating": None, "timestamp": 10**9, "history": histories.get(user, []),
        }
        for k, user in enumerate(asked)
        for j, item in enumerate(items)
    ]  # fmt: skip
    data = data_of(rows, users, reads=config.vocabulary.vector_width > 0)
    numbers = torch.arange(len(LOG["interactions"]), len(data.labels))
    with torch.inference_mode():
        scores = trained(data.batch(numbers), data.tables).sigmoid()
    return scores.numpy().reshape(len(asked), len(items))
