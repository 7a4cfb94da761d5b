"""Trainings on two nodes: the trajectory of one process, whether or not a node is killed on the way."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.ports import free_address
from tests.stages.training_inputs import publish_tables
from trackrec.align import training
from trackrec.config import LoraSettings, RecTuneSettings
from trackrec.stages import node, rec_tune

ROOT = Path(__file__).parents[2]
# Twelve examples, four a step: six steps over two epochs.
SETTINGS: dict[str, Any] = {
    "learning_rate": 5e-3,
    "warmup_ratio": 0,
    "batch_size": 4,
    "epochs": 2,
    "checkpoint_steps": 1,
    "lora": LoraSettings(r=4),
}
# At which step the node that has it kills itself.
DIES = "TEST_NODE_DIES_AT_STEP"
TOLERANCE = 1e-4
PATIENCE = 900  # seconds; alone on a machine a minute does


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tables = publish_tables(tmp_path_factory.mktemp("tables"), contexts=6, examples_per_context=2)
    return dict(tables) | {"base_model": tiny_model, "validator": tiny_model}


@pytest.fixture(scope="module")
def alone(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The facts and the model of one process that nothing happened to."""
    root = tmp_path_factory.mktemp("alone")
    (root / "out").mkdir()
    return rec_tune.train(RecTuneSettings(**SETTINGS), inputs, root / "out", root / "work", 5), root / "out"


def call_for(inputs: dict[str, Path], root: Path, **settings: Any) -> Path:
    """A call as the stage writes it."""
    (root / "out").mkdir()
    call = node.Call(
        stage="rec_tune",
        name="test",
        settings=RecTuneSettings(**SETTINGS | settings).model_dump(mode="json"),
        inputs=inputs,
        out=root / "out",
        work=root / "work",
        seed=5,
        facts=root / "facts.json",
    )
    (root / "call.json").write_text(call.model_dump_json())
    return root / "call.json"


def start(rank: int, call: Path, address: str, **environment: str) -> subprocess.Popen[bytes]:
    host, _, port = address.partition(":")
    program = [sys.executable, "-c", "from tests.invariance import test_nodes as t; t.node_main()", str(call)]
    torchrun = {"PET_NNODES": "2", "PET_NODE_RANK": str(rank), "PET_MASTER_ADDR": host, "PET_MASTER_PORT": port}
    with (call.parent / f"node-{rank}.log").open("ab") as log:
        return subprocess.Popen(
            program,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | torchrun | environment,
            stdout=log,
            stderr=log,
        )


def node_main() -> None:
    """A node's own entry point; the one that is to die has a body that does."""
    if DIES in os.environ:
        node.train = dying_train
    sys.exit(node.main())


class _DieAt(TrainerCallback):
    """Kills the worker and its agent, as a machine that is gone."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def dying_train(call: node.Call) -> dict[str, Any]:
    train = training.train

    def dying(trainer: Any, tokens: int) -> dict[str, Any]:
        trainer.add_callback(_DieAt(int(os.environ[DIES])))
        return train(trainer, tokens)

    training.train = dying
    return trained(call)


trained = node.train


def check_like_alone(root: Path, alone: tuple[dict[str, Any], Path]) -> dict[str, Any]:
    facts = json.loads((root / "facts.json").read_text())
    expected, model = alone
    assert facts["processes"] == 2
    assert facts["steps"] == len(facts["loss"]) == 6
    assert facts["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    [one], [other] = model.glob("*.safetensors"), (root / "out").glob("*.safetensors")
    weights, same = load_file(one), load_file(other)
    assert weights.keys() == same.keys()
    assert max((weights[name] - same[name]).abs().max().item() for name in weights) < TOLERANCE
    # Training moved the second matrices, zero at first, by a hundred times that.
    assert max(weight.abs().max().item() for name, weight in weights.items() if "lora_B" in name) > 100 * TOLERANCE
    return facts


def logs(root: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(root.glob("node-*.log")))


def test_two_nodes_train_as_one_process(
    inputs: dict[str, Path], alone: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    call, address = call_for(inputs, tmp_path), free_address()
    nodes = [start(rank, call, address) for rank in (0, 1)]
    assert [process.wait(PATIENCE) for process in nodes] == [0, 0], logs(tmp_path)
    assert check_like_alone(tmp_path, alone)["resumed_from_step"] == 0


def test_two_nodes_train_as_one_process_under_zero_3(
    inputs: dict[str, Path], alone: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """Though a training that was killed while DeepSpeed compiled has left its lock."""
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    call, address = call_for(inputs, tmp_path, deepspeed="zero3"), free_address()
    extensions = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    nodes = [start(rank, call, address, **extensions) for rank in (0, 1)]
    assert [process.wait(PATIENCE) for process in nodes] == [0, 0], logs(tmp_path)
    check_like_alone(tmp_path, alone)


def test_a_training_that_lost_a_node_resumes_from_its_last_checkpoint_to_the_same_weights(
    inputs: dict[str, Path], alone: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    call, address = call_for(inputs, tmp_path), free_address()
    stays, lost = start(0, call, address), start(1, call, address, **{DIES: "4"})
    assert lost.wait(PATIENCE) == -signal.SIGKILL, logs(tmp_path)
    # Its successor, as Kubernetes makes one; the other node stays.
    successor = start(1, call, address)
    assert [process.wait(PATIENCE) for process in (stays, successor)] == [0, 0], logs(tmp_path)
    # The step it died in is in no checkpoint.
    assert check_like_alone(tmp_path, alone)["resumed_from_step"] == 3
