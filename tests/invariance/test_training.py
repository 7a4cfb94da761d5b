"""Ways to train that must give the same trajectory: cut into micro-batches, killed and resumed, on two processes.

`tests/invariance/test_sdpo.py` holds the same for S-DPO.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from tests.stages.training_inputs import publish_tables
from trackrec import storage
from trackrec.align import training
from trackrec.config import LoraSettings, RecTuneSettings, SftSettings
from trackrec.stages import rec_tune, sft_generator

LORA = LoraSettings(r=4, dropout=0.1)
BASE = {"learning_rate": 5e-3, "warmup_ratio": 0, "batch_size": 4, "epochs": 2, "checkpoint_steps": 1}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Six contexts, six examples: a step over four of them and one over two, in each of two epochs."""
    return publish_tables(tmp_path_factory.mktemp("tables"), contexts=6)


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKREC_WORK", str(tmp_path / "work"))


def _sft(tables: Mapping[str, Path], base_model: Path, out: Path, **settings: Any) -> None:
    sft_generator.run(
        SftSettings(**BASE | settings),
        contexts=tables["contexts"],
        recots=tables["recots"],
        base_model=base_model,
        generator=out,
        seed=5,
    )


def _rec_tune(tables: Mapping[str, Path], base_model: Path, out: Path, **settings: Any) -> None:
    rec_tune.run(
        RecTuneSettings(**BASE | settings), **tables, base_model=base_model, validator=base_model, tuned=out, seed=5
    )


def _weights(model: Path) -> dict[str, Tensor]:
    [file] = model.glob("*.safetensors")
    return load_file(file)


def _losses(model: Path) -> list[float]:
    return storage.read_manifest(model).facts["loss"]


def _apart(first: Path, second: Path) -> float:
    """The largest difference between two models' weights."""
    one, other = _weights(first), _weights(second)
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


both_stages = pytest.mark.parametrize("stage", [_sft, _rec_tune], ids=["sft", "rec_tune"])


@both_stages
def test_micro_batches_do_not_change_the_trajectory(
    stage: Callable[..., None], tables: Mapping[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    for micro in (1, 4):
        stage(tables, tiny_model, tmp_path / f"m{micro}", lora=LoraSettings(r=4), micro_batch_size=micro)
    assert len(_losses(tmp_path / "m1")) == 4
    assert _losses(tmp_path / "m4") == pytest.approx(_losses(tmp_path / "m1"), rel=1e-4)
    assert _apart(tmp_path / "m1", tmp_path / "m4") < 1e-4
    # Training moved the second matrices, zero at first, by a hundred times that.
    assert max(w.abs().max() for name, w in _weights(tmp_path / "m1").items() if "lora_B" in name) > 1e-2


class _StopAt(TrainerCallback):
    """Stops in the middle of an epoch, with a step done that no checkpoint has."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@both_stages
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_an_interrupted_training_resumes_to_the_same_weights(
    stage: Callable[..., None],
    lora: LoraSettings | None,
    tables: Mapping[str, Path],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage(tables, tiny_model, tmp_path / "whole", lora=lora)

    train = training.train
    with monkeypatch.context() as patch:

        def interrupted(trainer: Any, tokens: int) -> dict[str, Any]:
            trainer.add_callback(_StopAt(4))
            return train(trainer, tokens)

        patch.setattr(training, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stage(tables, tiny_model, tmp_path / "resumed", lora=lora)
    assert not (tmp_path / "resumed").exists()
    [checkpoints] = (tmp_path / "work").glob("*/checkpoints")
    assert training.last_checkpoint(checkpoints) == checkpoints / "checkpoint-3"
    # What a kill in the middle of writing leaves behind.
    (checkpoints / "checkpoint-4").mkdir()
    (checkpoints / "checkpoint-4" / "trainer_state.json").write_text("{")

    stage(tables, tiny_model, tmp_path / "resumed", lora=lora)
    facts = storage.read_manifest(tmp_path / "resumed").facts
    assert (facts["resumed_from_step"], facts["steps"]) == (3, 4)
    assert facts["loss"] == _losses(tmp_path / "whole")
    assert _apart(tmp_path / "whole", tmp_path / "resumed") == 0


def test_a_training_killed_outright_resumes_to_the_same_weights(
    tables: Mapping[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    _rec_tune(tables, tiny_model, tmp_path / "whole", lora=LORA)
    script = "\n".join(
        [
            "import os, signal, sys",
            "from pathlib import Path",
            "from tests.invariance import test_training as t",
            "from trackrec import storage",
            "write = storage.write_atomic",
            "def kill_at_the_third_checkpoint(path, data):",
            "    if 'checkpoint-3' in str(path): os.kill(os.getpid(), signal.SIGKILL)",
            "    write(path, data)",
            "storage.write_atomic = kill_at_the_third_checkpoint",
            "contexts, examples, recots, model, out = map(Path, sys.argv[1:])",
            "tables = {'contexts': contexts, 'examples': examples, 'recots': recots}",
            "t._rec_tune(tables, model, out, lora=t.LORA)",
        ]
    )
    paths = [tables["contexts"], tables["examples"], tables["recots"], tiny_model, tmp_path / "resumed"]
    killed = subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "resumed").exists()
    _rec_tune(tables, tiny_model, tmp_path / "resumed", lora=LORA)
    # The third checkpoint was whole but for its mark.
    assert storage.read_manifest(tmp_path / "resumed").facts["resumed_from_step"] == 2
    assert _apart(tmp_path / "whole", tmp_path / "resumed") < 1e-6


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (_rec_tune, {}),
        (_rec_tune, {"deepspeed": "zero2", "lora": LoraSettings(r=4)}),
        (_rec_tune, {"deepspeed": "zero3", "lora": LoraSettings(r=4)}),
        # How the paper's settings train.
        (_rec_tune, {"deepspeed": "zero3", "gradient_checkpointing": True}),
        (_sft, {"deepspeed": "zero3", "gradient_checkpointing": True}),
    ],
    ids=["ddp-full", "zero2-lora", "zero3-lora", "zero3-full", "sft-zero3-full"],
)
def test_two_processes_train_as_one(
    stage: Callable[..., None],
    changes: dict[str, Any],
    tables: Mapping[str, Path],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage(tables, tiny_model, tmp_path / "one", lora=changes.get("lora"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # as many processes does the stage start
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stage(tables, tiny_model, tmp_path / "two", **changes)
    facts = storage.read_manifest(tmp_path / "two").facts
    assert facts["processes"] == 2
    assert facts["trained_parameters"] == storage.read_manifest(tmp_path / "one").facts["trained_parameters"]
    assert facts["loss"] == pytest.approx(_losses(tmp_path / "one"), rel=1e-4)
    assert _apart(tmp_path / "one", tmp_path / "two") < 1e-4
