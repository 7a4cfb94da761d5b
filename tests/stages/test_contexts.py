import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import roc_auc_score

from tests import tables
from tests.data.raw_files import same_rows, write_ml_1m
from trackrec import storage
from trackrec.config import ContextsSettings, IngestSettings
from trackrec.data import schema
from trackrec.data_config import DataSettings
from trackrec.fetch import fetch
from trackrec.stages import contexts, ingest

DAY = 86_400


def run(out: Path, source: Path, seed: int = 0, data: DataSettings | None = None, **settings: Any) -> Path:
    contexts.run(
        ContextsSettings.model_validate({"domain": "movies"} | settings),
        data or DataSettings(),
        interactions=source,
        items=source,
        contexts=out,
        examples=out,
        seed=seed,
    )
    return out


def log(directory: Path, *rows: tuple[str, str, str, int, int]) -> Path:
    """Interactions from (user, item, split, label, timestamp), ordered; items A, B, C have titles."""
    interactions = [
        {
            "row_id": number,
            "user_id": user,
            "item_id": item,
            "split": split,
            "label": label,
            "rating": 5.0 if label else 2.0,
            "timestamp": timestamp,
            "history": [],
        }
        for number, (user, item, split, label, timestamp) in enumerate(rows)
    ]
    items = [{"item_id": item, "title": f"Title {item}", "attributes": []} for item in "ABC"]
    return tables.publish(directory, interactions=interactions, items=items)


def shown(title: str, rating: float, label: int) -> dict[str, Any]:
    return {"title": title, "rating": rating, "label": label}


LIKED_A, DISLIKED_B = shown("Title A", 5.0, 1), shown("Title B", 2.0, 0)


@pytest.fixture
def two_users(tmp_path: Path) -> Path:
    """u and v do the same on other days, and v goes on into valid and test."""
    return log(
        tmp_path / "tables",
        ("u", "A", "train", 1, 10),
        ("u", "B", "train", 0, DAY + 10),
        ("u", "C", "train", 1, DAY + 20),
        ("v", "A", "train", 1, 5),
        ("v", "B", "valid", 0, 2 * DAY + 10),
        ("v", "C", "test", 0, 3 * DAY),
        ("v", "D", "test", 1, 3 * DAY + 1),
    )


def test_rolling_contexts(tmp_path: Path, two_users: Path) -> None:
    out = run(tmp_path / "out", two_users, history_length=2)
    found = [
        (row["user_id"], row["as_of"], row["split"], row["domain"], row["history"])
        for row in schema.rows(out, "contexts")
    ]
    # Equal histories are one context, of the earliest user, moment and split.
    assert sorted(found, key=lambda row: row[1]) == [
        ("v", 5, "train", "movies", []),
        ("u", DAY + 10, "train", "movies", [LIKED_A]),
        ("u", DAY + 20, "train", "movies", [LIKED_A, DISLIKED_B]),
        ("v", 3 * DAY + 1, "test", "movies", [DISLIKED_B, shown("Title C", 2.0, 0)]),
    ]
    by_history = {len(row[-1]): [] for row in found}
    ids = {row["row_id"]: row["context_id"] for row in schema.rows(out, "examples")}
    assert ids[0] == ids[3] and ids[1] == ids[4] and ids[2] == ids[5]
    assert len(set(ids.values())) == 4 and set(by_history) == {0, 1, 2}


def test_snapshot_contexts(tmp_path: Path, two_users: Path) -> None:
    out = run(tmp_path / "out", two_users, kind="snapshot", history_length=10)
    contexts_ = {row["context_id"]: row for row in schema.rows(out, "contexts")}
    examples = schema.rows(out, "examples")
    ids = [row["context_id"] for row in examples]
    # u's second day: both rows see the first day only. v's third: likewise, whatever came on it before.
    assert ids[1] == ids[2] == ids[4] and ids[5] == ids[6]
    assert contexts_[ids[1]]["history"] == [LIKED_A]
    assert contexts_[ids[1]]["as_of"] == DAY
    assert contexts_[ids[1]]["split"] == "train"
    assert contexts_[ids[5]]["history"] == [LIKED_A, DISLIKED_B]
    assert contexts_[ids[5]]["as_of"] == 3 * DAY
    assert ids[0] == ids[3] and contexts_[ids[0]]["history"] == []
    wide = run(tmp_path / "wide", two_users, kind="snapshot", snapshot_days=2)
    assert [len(row["history"]) for row in schema.rows(wide, "contexts")] == [0, 1]


def test_examples_carry_train_rows_and_the_item_mean(tmp_path: Path, two_users: Path) -> None:
    out = run(tmp_path / "out", two_users, item_mean_prior=2.0)
    rows = schema.rows(out, "examples")
    assert [(row["user_train_rows"], row["item_train_rows"]) for row in rows] == [
        (3, 2), (3, 1), (3, 1), (1, 2), (1, 1), (1, 1), (1, 0)
    ]  # fmt: skip
    # Three of the four train rows are liked: the prior is 3/4. B: 0 of 1, C: 1 of 1, D: never in train.
    means = [(0 + 2 * 0.75) / 3, (1 + 2 * 0.75) / 3, 0.75]
    assert [row["item_mean"] for row in rows[:4]] == [None] * 4
    assert [row["item_mean"] for row in rows[4:]] == pytest.approx(means)
    assert [row["title"] for row in rows[-2:]] == ["Title C", "D"]


def test_context_id_is_the_documented_hash(tmp_path: Path, two_users: Path) -> None:
    out = run(tmp_path / "out", two_users)
    found = {len(row["history"]): row["context_id"] for row in schema.rows(out, "contexts") if row["user_id"] == "u"}

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    assert found[1] == digest(f"movies\n{digest('Title A')}:5.0:1")
    assert found[2] == digest(f"movies\n{digest('Title A')}:5.0:1\n{digest('Title B')}:2.0:0")
    other = run(tmp_path / "books", two_users, domain="books")
    assert not set(found.values()) & {row["context_id"] for row in schema.rows(other, "contexts")}


def test_short_histories_are_dropped_and_counted(tmp_path: Path, two_users: Path) -> None:
    out = run(tmp_path / "out", two_users, min_history=2)
    assert [row["row_id"] for row in schema.rows(out, "examples")] == [2, 5, 6]
    facts = storage.read_manifest(out).facts
    assert facts["dropped_short_history"] == 4
    assert (facts["contexts"], facts["examples"], facts["dropped_by_sampling"]) == (2, 3, 0)


@pytest.fixture(scope="module")
def ml_100k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ml_100k") / "tables"
    settings = IngestSettings(dataset="ml-100k", max_history=20)
    ingest.run(settings, raw=fetch("ml-100k"), interactions=out, items=out)
    return out


def test_sub_samples_follow_the_seed_and_nest(tmp_path: Path, ml_100k: Path) -> None:
    kind = {"kind": "snapshot", "min_history": 5}

    def sample(name: str, seed: int = 0, **limits: int) -> tuple[set[str], list[dict[str, Any]]]:
        out = run(tmp_path / name, ml_100k, seed=seed, **kind, **limits)
        rows = schema.rows(out, "contexts")
        limited = {f"max_{split}_contexts": count for split, count in Counter(row["split"] for row in rows).items()}
        assert {key: limited[key] for key in limits if key in limited} == {
            k: v for k, v in limits.items() if k in limited
        }
        return {row["context_id"] for row in rows}, schema.rows(out, "examples")

    limits = {"max_train_contexts": 30, "max_valid_contexts": 10, "max_test_contexts": 20}
    ids, examples = sample("a", **limits)
    assert len(ids) == 60
    assert {row["context_id"] for row in examples} == ids
    again, _ = sample("b", **limits)
    other, _ = sample("c", seed=1, **limits)
    fewer, _ = sample("d", **(limits | {"max_train_contexts": 5}))
    assert again == ids and other != ids and fewer < ids
    _, capped = sample("e", max_examples_per_context=2, **limits)
    wanted = Counter((row["context_id"], row["split"]) for row in examples)
    assert Counter((row["context_id"], row["split"]) for row in capped) == {key: min(n, 2) for key, n in wanted.items()}
    # Counts are over all train rows, not over the sample's.
    whole = {row["row_id"]: row for row in sample("f")[1]}
    assert all(whole[row["row_id"]] == row for row in capped)


def test_histories_shown_are_the_interactions_histories(tmp_path: Path, ml_100k: Path) -> None:
    out = run(tmp_path / "out", ml_100k, history_length=10)
    titles = {row["item_id"]: row["title"] for row in schema.rows(ml_100k, "items")}
    known = {row["context_id"]: row["history"] for row in schema.rows(out, "contexts")}
    interactions = schema.read(ml_100k, "interactions", ["row_id", "history"]).slice(0, 20_000).to_pylist()
    examples = {row["row_id"]: row["context_id"] for row in schema.rows(out, "examples", ["row_id", "context_id"])}
    for row in interactions:
        expected = [shown(titles[item["item_id"]], item["rating"], item["label"]) for item in row["history"][-10:]]
        assert known[examples[row["row_id"]]] == expected


def test_item_mean_is_the_known_baseline(tmp_path: Path, ml_1m: Path) -> None:
    """Smoothed item mean on ML-1M's test split: AUC .7094, UAUC .6816 (rows of users with both classes)."""
    out = run(tmp_path / "out", ml_1m)
    table = schema.read(out, "examples").to_pandas()
    test = table[table.split == "test"]
    assert len(table) == 51_623 and len(test) == 7_331
    assert roc_auc_score(test.label, test.item_mean) == pytest.approx(0.7094, abs=5e-5)
    users = [group for _, group in test.groupby("user_id") if group.label.nunique() == 2]
    uauc = sum(roc_auc_score(group.label, group.item_mean) for group in users) / len(users)
    assert uauc == pytest.approx(0.6816, abs=5e-5)


@pytest.mark.parametrize("kind", ["rolling", "snapshot"])
def test_spark_gives_identical_rows(tmp_path: Path, spark: None, kind: str) -> None:
    source = tmp_path / "tables"
    raw = write_ml_1m(tmp_path / "raw")
    ingest.run(IngestSettings(dataset="ml-1m"), raw=raw, interactions=source, items=source)
    settings = {"kind": kind, "history_length": 2, "max_train_contexts": 1, "max_examples_per_context": 1}
    here = run(tmp_path / "duckdb", source, **settings)
    there = run(tmp_path / "spark", source, data=DataSettings(engine="spark"), **settings)
    for table in ("contexts", "examples"):
        assert same_rows(here, there, table), table
    assert storage.read_manifest(here).facts == storage.read_manifest(there).facts


def test_spark_gives_the_same_ml_1m_contexts(tmp_path: Path, spark: None, ml_1m: Path) -> None:
    here = run(tmp_path / "duckdb", ml_1m, kind="rolling")
    there = run(tmp_path / "spark", ml_1m, kind="rolling", data=DataSettings(engine="spark"))
    for table in ("contexts", "examples"):
        assert same_rows(here, there, table), table


def test_unpublished_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    with pytest.raises(storage.NotPublishedError):
        run(tmp_path / "published" / "out", tmp_path / "tables")
    assert not (tmp_path / "published" / "out").exists()
