"""The stage `deploy`: a version brought to its place, and what the rollout answered."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving import versions
from trackrec import storage
from trackrec.serving import smoke, version
from trackrec.serving_config import DeploySettings, ExportSettings
from trackrec.stages import deploy

Ask = Callable[[str], dict[str, Any]]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    with storage.publish("export", ExportSettings(), inputs={}, outputs={"repository": tmp_path / "repository"}) as job:
        out = versions.write(job.outputs["repository"], "g-2")
        said = {"run": "r", "config": {}, "models": {}, "absent": {}, "metrics": {}, "packages": {}, "smoke": {}}
        version.write(out, version.Version.model_validate({"version": version.name_of(out), **said}))
    return tmp_path / "repository"


def settings(tmp_path: Path) -> DeploySettings:
    return DeploySettings(versions=str(tmp_path / "versions"))


def test_a_version_lies_whole_where_pods_fetch_it_before_it_is_rolled_out(repository: Path, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def roll(name: str, uri: str, ask: Ask) -> dict[str, Any]:
        asked.append((name, uri))
        # What a pod's init container does.
        storage.download(uri, tmp_path / f"pod-{len(asked)}")
        with pytest.raises(smoke.SmokeError, match=r"encoder at 127\.0\.0\.1:9"):
            ask("127.0.0.1:9")
        return {"smoke": {"pod-1": {}, "pod-2": {}}, "was_there": False}

    for attempt in (1, 2):
        deploy.run(settings(tmp_path), repository=repository, rollout=tmp_path / f"rollout-{attempt}", roll=roll)
        storage.verify(tmp_path / f"pod-{attempt}")
        assert smoke.expected(tmp_path / f"pod-{attempt}") == smoke.expected(repository)
    # The place is the files': another try sends nothing anew.
    name = version.read(repository).version
    assert asked == [(name, str(tmp_path / "versions" / storage.read_manifest(repository).content_hash[:32]))] * 2
    assert len(list((tmp_path / "versions").iterdir())) == 1
    said = json.loads((tmp_path / "rollout-1" / deploy.ROLLOUT).read_text(encoding="utf-8"))
    assert said["smoke"].keys() == {"pod-1", "pod-2"}
    assert storage.read_manifest(tmp_path / "rollout-1").facts["pods"] == 2


def test_a_failed_rollout_publishes_nothing(repository: Path, tmp_path: Path) -> None:
    def roll(name: str, uri: str, ask: Ask) -> dict[str, Any]:
        raise RuntimeError("rolled back")

    with pytest.raises(RuntimeError, match="rolled back"):
        deploy.run(settings(tmp_path), repository=repository, rollout=tmp_path / "rollout", roll=roll)
    assert not (tmp_path / "rollout").exists()


def test_what_cannot_be_rolled_out_is_refused_before_the_cluster_is_asked(repository: Path, tmp_path: Path) -> None:
    def roll(name: str, uri: str, ask: Ask) -> dict[str, Any]:
        pytest.fail("rolled out")

    with pytest.raises(ValueError, match=r"`deploy\.versions` is not set: name the place"):
        deploy.run(DeploySettings(), repository=repository, rollout=tmp_path / "rollout", roll=roll)
    (repository / "version.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model repository of the stage `export`"):
        deploy.run(settings(tmp_path), repository=repository, rollout=tmp_path / "rollout", roll=roll)


def test_a_place_that_other_pods_would_not_find_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`versions` is gs://BUCKET/PATH or a folder's whole path \(got 'versions'\)"):
        DeploySettings(versions="versions")
