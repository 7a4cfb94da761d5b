"""What a stage hands to its nodes, and what it takes back."""

import json
from pathlib import Path
from typing import Any

import pytest

from trackrec.config import SdpoSettings
from trackrec.stages import node

FACTS = {"steps": 3, "loss": [0.5]}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    for name in ("contexts", "base"):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part" / "file").write_text(name)
    # Before the first alignment G is the base model itself.
    return {"contexts": tmp_path / "contexts", "base_model": tmp_path / "base", "generator": tmp_path / "base"}


class Cluster:
    """Runs a node's command as far as it concerns the stage: reads the call, leaves a model and rank 0's facts."""

    def __init__(self, facts: dict[str, Any] | None = None) -> None:
        self.facts = facts
        self.calls: list[node.Call] = []
        self.names: list[str] = []

    def run(self, name: str, command: list[str]) -> None:
        assert command[:3] == ["python3", "-m", "trackrec.stages.node"]
        call = node.Call.model_validate_json(Path(command[3]).read_text())
        self.calls.append(call)
        self.names.append(name)
        (call.out / "model.safetensors").write_text("trained")
        if self.facts is not None:
            call.facts.write_text(json.dumps(self.facts))


def train(cluster: Cluster, inputs: dict[str, Path], root: Path) -> dict[str, Any]:
    (root / "out").mkdir(exist_ok=True)
    work = root / "work" / "sdpo-0123456789abcdef"
    return node.OnNodes("sdpo", cluster.run)(print, SdpoSettings(beta=0.3), inputs, root / "out", work, 7)


def test_nodes_get_copies_of_the_inputs_where_all_mount_them_and_the_model_comes_back(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    cluster = Cluster(FACTS)
    assert train(cluster, inputs, tmp_path) == FACTS
    assert (tmp_path / "out" / "model.safetensors").read_text() == "trained"
    [call] = cluster.calls
    work = tmp_path / "work" / "sdpo-0123456789abcdef"
    assert (call.stage, call.seed, call.work) == ("sdpo", 7, work)
    assert SdpoSettings.model_validate(call.settings) == SdpoSettings(beta=0.3)
    assert {name: (path / "part" / "file").read_text() for name, path in call.inputs.items()} == {
        "contexts": "contexts",
        "base_model": "base",
        "generator": "base",
    }
    assert all(path.is_relative_to(work) for path in [*call.inputs.values(), call.out, call.facts])
    # A model of 15 GB is copied once.
    assert call.inputs["generator"] == call.inputs["base_model"]
    # A Kubernetes name, which tells what is computed.
    assert cluster.names == ["sdpo-0123456789abcdef"]


def test_a_try_after_the_training_and_before_publishing_does_not_train_again(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    train(Cluster(FACTS), inputs, tmp_path)
    again = Cluster(None)
    assert train(again, inputs, tmp_path) == FACTS
    assert not again.calls


def test_a_copy_that_was_cut_off_is_not_taken_for_a_whole_one(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(source: Path, target: Path, **_: Any) -> None:
        (target / "half").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(node.shutil, "copytree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            train(Cluster(FACTS), inputs, tmp_path)
    cluster = Cluster(FACTS)
    train(cluster, inputs, tmp_path)
    assert (cluster.calls[0].inputs["contexts"] / "part" / "file").read_text() == "contexts"


def test_nodes_that_leave_nothing_are_an_error(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "_VISIBLE_SECONDS", 0.0)
    with pytest.raises(FileNotFoundError, match="`work_claim` must be a claim that is mounted ReadWriteMany"):
        train(Cluster(None), inputs, tmp_path)
