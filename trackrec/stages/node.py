"""A stage's training on several nodes: what the stage hands to them, and one of them.

What Kubeflow brings into a task's pod (the inputs) lies on no other, so `OnNodes` copies it to the work folder, which
all nodes mount; checkpoints and the trained model lie there, too. The stage's process alone publishes.

A node is `python -m trackrec.stages.node CALL.json`. Which one it is comes in torchrun's environment variables
(`PET_NODE_RANK`, `PET_NNODES`, `PET_MASTER_ADDR`, `PET_MASTER_PORT`), which Kubeflow Trainer sets.
"""

import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from torch.distributed import DistError
from torch.distributed.elastic.rendezvous import RendezvousError

from trackrec import storage
from trackrec.align.launching import Body, launch_node
from trackrec.config import RecTuneSettings, SdpoSettings, SftSettings, Trained, TrainingSettings

# The exit status of a node that has lost the others, which is no error of the training.
LOST = 75
# How long a file may take to be seen on another machine: an NFS client remembers that there was none.
_VISIBLE_SECONDS = 120.0

_SETTINGS: dict[str, type[TrainingSettings]] = {
    "sft_generator": SftSettings,
    "sdpo": SdpoSettings,
    "rec_tune": RecTuneSettings,
}


class Call(BaseModel):
    """A stage's training as its `train` is called; every path lies where all nodes mount it."""

    stage: Trained
    # Names the rendezvous.
    name: str
    settings: dict[str, Any]
    inputs: dict[str, Path]
    out: Path
    work: Path
    seed: int
    # Where rank 0's facts go, as JSON, when all is done.
    facts: Path


class OnNodes:
    """A `Launch` that runs a stage's training on the nodes which `run(name, command)` starts and waits for.

    Args:
        run: returns when the command has ended well on all nodes, raises when it has not.
    """

    def __init__(self, stage: Trained, run: Callable[[str, list[str]], None]) -> None:
        self.stage = stage
        self.run = run

    def __call__(
        self, body: Body, settings: TrainingSettings, inputs: Mapping[str, Path], out: Path, work: Path, seed: int
    ) -> dict[str, Any]:
        """
        Raises:
            FileNotFoundError: the nodes ended well, but left nothing: the work folder is no shared one.
        """
        shared = work / "nodes"
        call = Call(
            stage=self.stage,
            name=work.name.replace("_", "-"),
            settings=settings.model_dump(mode="json"),
            inputs=_shared(inputs, shared / "inputs"),
            out=shared / "out",
            work=work,
            seed=seed,
            facts=shared / "facts.json",
        )
        call.out.mkdir(exist_ok=True)
        # A pod that was killed after the training and before publishing has left them.
        if not call.facts.is_file():
            file = shared / "call.json"
            storage.write_atomic(file, call.model_dump_json().encode())
            self.run(call.name, ["python3", "-m", "trackrec.stages.node", str(file)])
            _await(call.facts)
        shutil.copytree(call.out, out, dirs_exist_ok=True)
        facts: dict[str, Any] = json.loads(call.facts.read_text(encoding="utf-8"))
        return facts


def _shared(inputs: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Copies of `inputs` in `folder`, each whole; what lies there is what an earlier try copied."""
    folder.mkdir(parents=True, exist_ok=True)
    copies: dict[Path, Path] = {}
    for name, path in inputs.items():
        if path in copies:  # G may be the base model itself
            continue
        target = folder / name
        if not target.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
            shutil.copytree(path, aside, dirs_exist_ok=True)
            aside.replace(target)
        copies[path] = target
    return {name: copies[path] for name, path in inputs.items()}


def _await(path: Path) -> None:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not path.is_file():
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"the nodes have ended, but {path} is not there: `work_claim` must be a claim that is mounted "
                "ReadWriteMany"
            )
        time.sleep(1)


def train(call: Call) -> dict[str, Any]:
    """One process of the training."""
    # Here, for the process that only starts and watches this one needs no transformers.
    stage = importlib.import_module(f"trackrec.stages.{call.stage}")
    settings = _SETTINGS[call.stage].model_validate(call.settings)
    facts: dict[str, Any] = stage.train(settings, call.inputs, call.out, call.work, call.seed)
    return facts


def main() -> int:
    call = Call.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        facts = launch_node(
            train,
            call,
            name=call.name,
            nodes=int(os.environ["PET_NNODES"]),
            node=int(os.environ["PET_NODE_RANK"]),
            address=f"{os.environ['PET_MASTER_ADDR']}:{os.environ['PET_MASTER_PORT']}",
        )
    except (DistError, RendezvousError) as error:
        print(f"lost the other nodes: {error}", file=sys.stderr)
        return LOST
    if facts is not None:
        storage.write_atomic(call.facts, json.dumps(facts).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
