"""The feature table's arrays: built once, found by all, refused where the date is not what was committed."""

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import gcs
from tests.serving.ranking import ENCODER, SEED, USERS, User, commit, earlier, vector, write_features, write_ranker
from trackrec.features import partition
from trackrec.features import table as features
from trackrec.features.partition import Place
from trackrec.serving import feature_store, feature_table
from trackrec.serving.contract import RankerContract
from trackrec.serving.feature_store import CACHE_ENV, SECONDS_ENV, FeatureStore
from trackrec.serving.scorer import Scorer
from trackrec.serving.server import FEATURES_ENV

FIRST, SECOND = "2026-11-01", "2026-11-02"
MANY = [User(f"user-{k}", earlier((f"i{k % 20}", 5.0, 1)), vector(k) if k % 3 else None) for k in range(10_000)]


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scorer, RankerContract]:
    folder = tmp_path_factory.mktemp("ranker")
    contract = write_ranker(folder, "deepfm", reads=True)
    return Scorer(folder / "ranker_trackrec/1", SEED), contract


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def store(ranker: tuple[Scorer, RankerContract], tmp_path: Path, lines: list[str]) -> FeatureStore:
    return made(ranker, str(tmp_path / "features"), tmp_path / "cache", lines)


def made(ranker: tuple[Scorer, RankerContract], root: str, cache: Path, lines: list[str]) -> FeatureStore:
    cache.mkdir(exist_ok=True)
    return FeatureStore(root, *ranker, cache=cache, log=lines.append)


def test_every_user_is_found(store: FeatureStore, ranker: tuple[Scorer, RankerContract], tmp_path: Path) -> None:
    """Over several shards and batches of rows, each with its own history and the connector's output for its vector."""
    write_features(tmp_path / "features", FIRST, MANY, shard_users=6000)
    store.look()
    table = store.table
    assert table is not None and len(table) == len(MANY)
    found = table.users(table.rows([user.user_id.encode() for user in MANY]))
    scorer = ranker[0]
    vectors = np.array([user.vector or [0.0] * ENCODER.width for user in MANY], dtype=np.float32)
    present = np.array([user.vector is not None for user in MANY])
    np.testing.assert_allclose(found.recot.numpy(), scorer.recots(vectors, present), rtol=1e-5, atol=1e-6)
    # The catalogue is sorted as text, its numbers begin at 2.
    place = {item: number for number, item in enumerate(sorted([*(f"i{k}" for k in range(20)), "new"]), start=2)}
    assert found.history[:, 0].tolist() == [place[f"i{k % 20}"] for k in range(len(MANY))]
    assert not found.history[:, 1:].any() and (found.history_rating[:, 0] > 1).all()
    strangers = table.rows([b"user-10000", b"", b"user-1 ", b"\xff"])
    assert strangers.tolist() == [0] * 4
    nobody = scorer.no_one()
    for part, own in zip(table.users(strangers), nobody, strict=True):
        np.testing.assert_array_equal(part.numpy(), own.expand(4, -1).numpy())


def test_users_of_one_hash_are_told_apart(store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_table, "hash_of", lambda user: len(user) % 3)
    users = [User("a" * (k + 1), earlier((f"i{k}", 5.0, 1))) for k in range(12)]
    write_features(tmp_path / "features", FIRST, users)
    store.look()
    assert store.table is not None
    asked = [user.user_id.encode() for user in users]
    assert store.table.rows([*asked, b"b", b"bb", b"bbb"]).tolist() == [*range(1, 13), 0, 0, 0]


def test_a_date_without_users(store: FeatureStore, tmp_path: Path) -> None:
    write_features(tmp_path / "features", FIRST, [])
    store.look()
    assert store.table is not None and store.table.rows([b"u0"]).tolist() == [0]
    assert not store.table.users(np.zeros(2, dtype=np.int64)).history.any()


def test_the_newest_committed_date_is_served(store: FeatureStore, tmp_path: Path, lines: list[str]) -> None:
    root = tmp_path / "features"
    store.look()
    assert store.table is None
    write_features(root, FIRST, USERS)
    store.look()
    first = store.table
    # Half written: shards and manifest are there, the marker is not.
    date = write_features(root, SECOND, USERS[:2])
    marker = (date / features.SUCCESS).read_text()
    (date / features.SUCCESS).unlink()
    store.look()
    assert store.table is first
    (date / features.SUCCESS).write_text(marker)
    store.look()
    assert store.table is not first and store.table is not None and len(store.table) == 2
    # The one before is still whole for those who took it.
    assert first is not None and first.rows([b"u2"]).tolist() != [0]
    # Committed again with other users.
    write_features(root, SECOND, USERS[:3])
    store.look()
    assert len(store.table) == 3
    assert [line.split(": ")[-1] for line in lines] == ["6 users", "2 users", "3 users"]


def truncated(date: Path) -> None:
    path = date / features.shard_path(1)
    path.write_bytes(path.read_bytes()[:-9])


def missing(date: Path) -> None:
    (date / features.shard_path(0)).unlink()


def scrambled(date: Path) -> None:
    """As many bytes, but no Parquet."""
    path = date / features.shard_path(0)
    path.write_bytes(bytes(path.stat().st_size))


def manifest_changed(date: Path) -> None:
    path = date / features.MANIFEST
    path.write_text(path.read_text().replace('"rows":6', '"rows":7'))


def no_manifest(date: Path) -> None:
    commit(date, "{}")


def fewer_rows(date: Path) -> None:
    manifest = json.loads((date / features.MANIFEST).read_text())
    manifest["rows"] += 1
    manifest["shards"][0]["rows"] += 1
    commit(date, json.dumps(manifest))


def of_another_encoder(date: Path) -> None:
    shutil.rmtree(date)
    write_features(date.parent, SECOND, USERS, encoder=ENCODER.model_copy(update={"model_version": "encoder-2"}))


def twice(date: Path) -> None:
    """The first shard's users in the second as well."""
    first, second = (date / features.shard_path(k) for k in (0, 1))
    shutil.copyfile(first, second)
    manifest = json.loads((date / features.MANIFEST).read_text())
    manifest["shards"][1] |= {"rows": manifest["shards"][0]["rows"], "bytes": second.stat().st_size}
    manifest["rows"] = 2 * manifest["shards"][0]["rows"]
    commit(date, json.dumps(manifest))


def without_a_column(date: Path) -> None:
    path = date / features.shard_path(0)
    pq.write_table(pq.read_table(path).drop_columns(["history"]), path)
    manifest = json.loads((date / features.MANIFEST).read_text())
    manifest["shards"][0]["bytes"] = path.stat().st_size
    commit(date, json.dumps(manifest))


def without_a_user(date: Path) -> None:
    path = date / features.shard_path(0)
    rows = pq.read_table(path)
    ids = rows["user_id"].to_pylist()
    column = pa.array([None, *ids[1:]], pa.string())
    pq.write_table(rows.set_column(0, rows.schema.field("user_id"), column), path)
    manifest = json.loads((date / features.MANIFEST).read_text())
    manifest["shards"][0]["bytes"] = path.stat().st_size
    commit(date, json.dumps(manifest))


def not_finite(date: Path) -> None:
    shutil.rmtree(date)
    write_features(date.parent, SECOND, [*USERS[:-1], replace(USERS[-1], vector=[float("inf")] * ENCODER.width)])


BROKEN: dict[Callable[[Path], None], str] = {
    truncated: "bytes, _manifest.json says",
    missing: "has no bytes",
    scrambled: "cannot be read",
    manifest_changed: "is not what _SUCCESS was written for",
    no_manifest: "Field required",
    fewer_rows: "has 4 rows, not 5",
    of_another_encoder: "of encoder encoder-2",
    twice: "not in their order",
    not_finite: "not finite",
    without_a_column: "lacks the columns history",
    without_a_user: "rows without a user",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_date_that_is_not_right_is_refused(
    broken: Callable[[Path], None], store: FeatureStore, tmp_path: Path, lines: list[str]
) -> None:
    """The one before stays, the log says why and only once; committed again, it is taken."""
    write_features(tmp_path / "features", FIRST, USERS)
    store.look()
    first = store.table
    broken(write_features(tmp_path / "features", SECOND, USERS))
    for _ in range(2):
        store.look()
        assert store.table is first
    [line] = lines[1:]
    assert BROKEN[broken] in line and f"those of {FIRST} are served" in line
    assert [path.name[:13] for path in (tmp_path / "cache").iterdir()] == [f"dt={FIRST}"]
    shutil.rmtree(tmp_path / "features" / f"dt={SECOND}")
    write_features(tmp_path / "features", SECOND, USERS[:5])
    store.look()
    assert store.table is not None and store.table.dt == SECOND


def test_at_the_start_a_broken_date_leaves_the_one_before(store: FeatureStore, tmp_path: Path) -> None:
    write_features(tmp_path / "features", FIRST, USERS)
    truncated(write_features(tmp_path / "features", SECOND, USERS))
    store.look()
    assert store.table is not None and store.table.dt == FIRST


def test_at_the_start_a_date_that_cannot_be_read_leaves_the_one_before(
    store: FeatureStore, tmp_path: Path, lines: list[str]
) -> None:
    """Damaged pages behind a whole footer, which Parquet reports as a failure to read; it is tried at each look."""
    write_features(tmp_path / "features", FIRST, USERS)
    path = write_features(tmp_path / "features", SECOND, USERS) / features.shard_path(0)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * (len(whole) // 3) + whole[4 + len(whole) // 3 :])
    for _ in range(2):
        store.look()
        assert store.table is not None and store.table.dt == FIRST
    assert len([line for line in lines if f"dt={SECOND} cannot be read" in line]) == 1
    path.write_bytes(whole)
    store.look()
    assert store.table.dt == SECOND


def test_a_date_that_is_committed_again_and_broken_is_served_as_it_was(store: FeatureStore, tmp_path: Path) -> None:
    """Not the date before it."""
    write_features(tmp_path / "features", FIRST, USERS)
    write_features(tmp_path / "features", SECOND, USERS)
    store.look()
    served = store.table
    truncated(write_features(tmp_path / "features", SECOND, USERS[:5]))
    for _ in range(2):
        store.look()
        assert store.table is served and served is not None and served.dt == SECOND


def test_a_folder_of_no_date_is_passed_over(store: FeatureStore, tmp_path: Path) -> None:
    write_features(tmp_path / "features", FIRST, USERS)
    (tmp_path / "features/dt=2026-99-99").mkdir()
    assert partition.newest(Place(str(tmp_path / "features"))) == FIRST
    store.look()
    assert store.table is not None and store.table.dt == FIRST


def test_a_place_that_cannot_be_reached_is_tried_again(
    ranker: tuple[Scorer, RankerContract], tmp_path: Path, lines: list[str]
) -> None:
    root = tmp_path / "features"
    write_features(root, FIRST, USERS)
    with gcs.server():
        from google.cloud.storage import Client

        store = made(ranker, "gs://shop/features", tmp_path / "cache", lines)
        for _ in range(2):
            store.look()
        assert store.table is None
        [line] = lines
        assert "gs://shop/features cannot be read" in line
        bucket = Client(project="none").create_bucket("shop")
        for path in root.rglob("*"):
            if path.is_file():
                bucket.blob(f"features/{path.relative_to(root)}").upload_from_filename(str(path))
        store.look()
        assert store.table is not None and store.table.rows([b"u0"]).tolist() == [1]


def test_one_builds_and_all_share(
    ranker: tuple[Scorer, RankerContract], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four start at once, each with a store of its own (the lock is a file's, so threads do for processes)."""
    built = []
    build = feature_table._build
    monkeypatch.setattr(feature_table, "_build", lambda *given: (built.append(1), build(*given)))
    write_features(tmp_path / "features", FIRST, MANY, shard_users=6000)
    stores = [made(ranker, str(tmp_path / "features"), tmp_path / "cache", []) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(FeatureStore.look, stores))
    assert len(built) == 1 and len(list((tmp_path / "cache").iterdir())) == 1
    assert {store.table and len(store.table) for store in stores} == {len(MANY)}


@pytest.mark.parametrize("name", ["hash.npy", "recot.npy"])
def test_arrays_that_were_cut_short_are_built_again(
    name: str, store: FeatureStore, ranker: tuple[Scorer, RankerContract], tmp_path: Path
) -> None:
    write_features(tmp_path / "features", FIRST, USERS)
    store.look()
    [folder] = (tmp_path / "cache").iterdir()
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    (folder / name).write_bytes(whole[:-8])
    other = made(ranker, str(tmp_path / "features"), tmp_path / "cache", [])
    other.look()
    assert other.table is not None and (folder / name).read_bytes() == whole


def test_folders_that_nobody_uses_go(store: FeatureStore, tmp_path: Path) -> None:
    """Those of this process never, those of others once nobody has touched them for an hour."""
    write_features(tmp_path / "features", FIRST, USERS)
    store.look()
    old, young = (tmp_path / "cache" / f"dt=2020-01-0{k}-x" for k in (1, 2))
    for folder, age in ((old, 7200), (young, 60), (store.table.folder, 7200)):
        folder.mkdir(exist_ok=True)
        os.utime(folder, (time.time() - age,) * 2)
    store.look()
    assert store.table.folder.is_dir() and young.is_dir() and not old.exists()


def test_a_killed_build_leaves_nothing_that_is_taken(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_features(tmp_path / "features", FIRST, USERS)
    with monkeypatch.context() as patch:
        patch.setattr(feature_table.np, "argsort", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.look()
    assert store.table is None and not list((tmp_path / "cache").iterdir())
    store.look()
    assert store.table is not None


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon"])
def test_a_wait_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS_ENV, given)
    with pytest.raises(ValueError, match=f"above 0 .got '{given}'"):
        feature_store.seconds()
    monkeypatch.setenv(SECONDS_ENV, "0.5")
    assert feature_store.seconds() == 0.5


def test_recots_of_another_generator_are_told(
    ranker: tuple[Scorer, RankerContract], store: FeatureStore, tmp_path: Path, lines: list[str]
) -> None:
    write_features(tmp_path / "features", FIRST, USERS)
    store.look()
    assert not [line for line in lines if "generator" in line]
    write_features(tmp_path / "features", SECOND, USERS, generator="g-2")
    for _ in range(2):
        store.look()
    [line] = [line for line in lines if "generator" in line]
    assert "are of generator g-2, and this ranker was trained on those of g;" in line
    assert store.table is not None and store.table.dt == SECOND


def test_a_ranker_does_not_start_where_its_features_cannot_be_read(
    ranker: tuple[Scorer, RankerContract], tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    with gcs.server():
        monkeypatch.setenv(FEATURES_ENV, "gs://shop/features")
        with pytest.raises(OSError, match="gs://shop/features cannot be read"):
            feature_store.of_environment(*ranker, lines.append)
        assert "gs://shop/features cannot be read: " in lines[-1]
    # One in which nothing is committed yet can.
    monkeypatch.setenv(FEATURES_ENV, str(tmp_path / "features"))
    store = feature_store.of_environment(*ranker, lines.append)
    assert store is not None and store.table is None
