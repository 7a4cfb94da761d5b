"""The stages of the batch feature job as its pods run them, against a real server whose models cost nothing."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.features import made
from tests.serving import fakes
from tests.tables import publish
from trackrec import storage
from trackrec.data import schema
from trackrec.features.commit import CommitError
from trackrec.features.partition import Place, read_manifest
from trackrec.serving import server
from trackrec.serving_config import FeaturesSettings
from trackrec.shards import WHOLE, Shard
from trackrec.stages import commit_features, features, gather

USERS, SHARD_USERS = 50, 8
FILES = -(-USERS // SHARD_USERS)
DAY = "1970-01-12"


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("triton")
    with server.running(fakes.repository(folder / "repository"), folder / "log") as running:
        yield running.grpc


def users(directory: Path, count: int = USERS) -> Path:
    return publish(directory, {"as_of": made.AS_OF}, users=[made.user(number) for number in range(count)])


def settings(triton: str, tmp_path: Path, **other: Any) -> FeaturesSettings:
    given = {"triton": triton, "out": str(tmp_path / "features"), "shard_users": SHARD_USERS, **other}
    return FeaturesSettings.model_validate(given)


def rows(place: Path) -> list[dict[str, Any]]:
    files = sorted(place.glob("shard=*/part.parquet"))
    return pa.concat_tables([pq.read_table(file, partitioning=None) for file in files]).to_pylist()


def pods(given: FeaturesSettings, of: Path, tmp_path: Path, count: int, name: str = "pod") -> Path:
    """What so many pods did, gathered."""
    parts = [tmp_path / f"{name} {number} of {count}" for number in range(count)]
    for number, part in enumerate(parts):
        features.run(given, users=of, feature_shards=part, shard=Shard(number, count))
    gather.run(table="feature_shards", parts=parts, joined=tmp_path / f"{name}s")
    return tmp_path / f"{name}s"


def test_pods_share_the_users_and_one_commit_makes_them_a_partition(triton: str, tmp_path: Path) -> None:
    given, of = settings(triton, tmp_path, usd_per_hour=3.6), users(tmp_path / "users")
    done = pods(given, of, tmp_path, 3)
    counts = {"there": 0, "rows": USERS, "copied": 0, "generated": USERS}
    facts = storage.read_manifest(done).facts
    assert facts | counts == facts and facts["status_ok"] == USERS and facts["status_failed"] == 0
    per_pod = schema.rows(done, "feature_shards")
    # Files 0, 3 and 6 are the first pod's; the last one has two users.
    assert [(row["shard"], row["rows"]) for row in per_pod] == [(0, 18), (1, 16), (2, 16)]
    assert read_manifest(Place(str(tmp_path / "features")), DAY) is None

    place = commit_features.run(given, users=of, feature_shards=done, committed=tmp_path / "committed")
    assert place == str(tmp_path / "features" / f"dt={DAY}")
    manifest = read_manifest(Place(str(tmp_path / "features")), DAY)
    assert manifest is not None and manifest == commit_features.read(tmp_path / "committed")
    assert manifest.identity.users == storage.content_hash(of) and len(manifest.shards) == FILES
    facts = storage.read_manifest(tmp_path / "committed").facts
    assert (facts["rows"], facts["status_ok"], facts["generated"]) == (USERS, USERS, USERS)
    assert facts["usd_per_1000_users"] == pytest.approx(facts["generator_seconds"] * 0.001 / USERS * 1000, rel=0.01)
    written = rows(Path(place))
    assert [row["user_id"] for row in written] == [row["user_id"] for row in schema.rows(of, "users")]
    assert all(row["status"] == "ok" and row["recot"] and row["as_of"] == made.AS_OF for row in written)

    # Once more, as a pod that was retried does: nothing is asked for again, and the commit stands.
    again = pods(given, of, tmp_path, 2, "retried")
    assert [row["there"] for row in schema.rows(again, "feature_shards")] == [4, 3]
    assert storage.read_manifest(again).facts["generated"] == 0
    commit_features.run(given, users=of, feature_shards=again, committed=tmp_path / "committed again")
    assert commit_features.read(tmp_path / "committed again") == manifest


def test_what_a_pod_did_not_write_is_not_committed(triton: str, tmp_path: Path) -> None:
    given, of = settings(triton, tmp_path), users(tmp_path / "users")
    features.run(given, users=of, feature_shards=tmp_path / "one", shard=Shard(1, 2))
    with pytest.raises(CommitError, match=rf"4 of {FILES} shards are missing"):
        commit_features.run(given, users=of, feature_shards=tmp_path / "one", committed=tmp_path / "published" / "out")
    assert list((tmp_path / "published").iterdir()) == []


def test_without_a_place_or_the_users_moment_it_says_so(triton: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`features\.out` names no place"):
        features.run(FeaturesSettings(triton=triton), users=tmp_path, feature_shards=tmp_path / "out")
    other = publish(tmp_path / "other", users=[made.user(1)])
    with pytest.raises(LookupError, match="give what the stage `active_users` wrote"):
        features.run(settings(triton, tmp_path), users=other, feature_shards=tmp_path / "out")
    assert not (tmp_path / "features").exists()


# The stage in a process of its own, as in a pod.
POD = """
import sys
from pathlib import Path
from trackrec.serving_config import FeaturesSettings
from trackrec.stages import features
settings = FeaturesSettings(triton=sys.argv[1], out=sys.argv[2], shard_users=8, concurrency=4)
features.run(settings, users=Path(sys.argv[3]), feature_shards=Path(sys.argv[4]))
"""


def test_a_killed_pod_goes_on(tmp_path: Path) -> None:
    """kill -9: what was answered is not asked for again, and the rows are those of a pod that was left alone."""
    asked = tmp_path / "asked"
    of = users(tmp_path / "users")
    repository = fakes.repository(tmp_path / "repository", delay_ms=100, log=asked)
    with server.running(repository, tmp_path / "log") as running:
        command = [sys.executable, "-c", POD, running.grpc, str(tmp_path / "features"), str(of), str(tmp_path / "pod")]
        pod = subprocess.Popen(command, env=os.environ | {storage.WORK_ENV: str(tmp_path / "work")})
        while not list((tmp_path / "features").rglob("part.parquet")) or len(asked.read_text().split()) < USERS // 2:
            assert pod.poll() is None
            time.sleep(0.01)
        pod.send_signal(signal.SIGKILL)
        pod.wait()
        assert not (tmp_path / "pod").exists()
        before = len(asked.read_text().split())
        finished = len(list((tmp_path / "features").rglob("part.parquet")))
        given = settings(running.grpc, tmp_path, concurrency=4)
        features.run(given, users=of, feature_shards=tmp_path / "pod")
        alone = settings(running.grpc, tmp_path, out=str(tmp_path / "alone"))
        times = Counter(asked.read_text().split())
        features.run(alone, users=of, feature_shards=tmp_path / "other pod", shard=WHOLE)
    assert before < USERS and len(times) == USERS
    # Twice, if at all, for what was under way when it was killed, or had been answered in that moment.
    assert sum(times.values()) < USERS + before - 5 and max(times.values()) <= 2
    facts = storage.read_manifest(tmp_path / "pod").facts
    assert facts["there"] == finished > 0
    assert facts["rows"] == USERS - finished * SHARD_USERS
    gone_on, left_alone = (rows(tmp_path / name / f"dt={DAY}") for name in ("features", "alone"))
    for row in gone_on + left_alone:
        del row["seconds"]
    assert gone_on == left_alone and len(gone_on) == USERS
