"""Nodes that meet, and that lose each other; `tests/invariance/test_nodes.py` trains on them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

from tests.ports import free_address
from trackrec.stages import node

ROOT = Path(__file__).parents[2]
PATIENCE = 600  # seconds


def nodes(body: str, root: Path) -> list[subprocess.Popen[bytes]]:
    """Two nodes of the real entry point, whose processes run `body` of this module for a training."""
    call = node.Call(
        stage="sdpo", name="t", settings={}, inputs={}, out=root, work=root, seed=0, facts=root / "facts.json"
    )
    (root / "call.json").write_text(call.model_dump_json())
    (root / "address").write_text(free_address())
    return [start(rank, body, root) for rank in (0, 1)]


def start(rank: int, body: str, root: Path) -> subprocess.Popen[bytes]:
    code = f"import sys; from tests.align import test_launching as t; t.node.train = t.{body}; sys.exit(t.node.main())"
    host, _, port = (root / "address").read_text().partition(":")
    torchrun = {"PET_NNODES": "2", "PET_NODE_RANK": str(rank), "PET_MASTER_ADDR": host, "PET_MASTER_PORT": port}
    command = [sys.executable, "-c", code, str(root / "call.json")]
    with (root / f"{rank}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | torchrun, stdout=log, stderr=log)


def logs(root: Path) -> str:
    return "".join(path.read_text() for path in sorted(root.glob("*.log")))


def meeting(call: node.Call) -> dict[str, int]:
    dist.init_process_group("gloo")
    dist.barrier()
    return {"world": dist.get_world_size()}


def losing_the_second_once(call: node.Call) -> dict[str, int]:
    met = call.work / "met"
    dist.init_process_group("gloo")
    dist.barrier()
    if os.environ["PET_NODE_RANK"] == "1" and not met.exists():
        met.touch()
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return {"world": dist.get_world_size()}


def losing_the_first(call: node.Call) -> dict[str, int]:
    dist.init_process_group("gloo")
    dist.barrier()
    if os.environ["PET_NODE_RANK"] == "0":
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return {}


def failing(call: node.Call) -> dict[str, int]:
    raise ValueError("a lesson too hard")


def test_nodes_meet_and_rank_0_leaves_its_facts(tmp_path: Path) -> None:
    assert [process.wait(PATIENCE) for process in nodes("meeting", tmp_path)] == [0, 0], logs(tmp_path)
    assert (tmp_path / "facts.json").read_text() == '{"world": 2}'


def test_a_lost_nodes_successor_joins_the_one_that_stays(tmp_path: Path) -> None:
    stays, lost = nodes("losing_the_second_once", tmp_path)
    assert lost.wait(PATIENCE) == -signal.SIGKILL, logs(tmp_path)
    successor = start(1, "losing_the_second_once", tmp_path)
    assert [process.wait(PATIENCE) for process in (stays, successor)] == [0, 0], logs(tmp_path)
    assert (tmp_path / "facts.json").read_text() == '{"world": 2}'


def test_a_node_that_lost_the_first_one_says_by_its_status_that_another_try_is_worth_it(tmp_path: Path) -> None:
    statuses = [process.wait(PATIENCE) for process in nodes("losing_the_first", tmp_path)]
    assert statuses == [-signal.SIGKILL, node.LOST], logs(tmp_path)
    assert "lost the other nodes" in (tmp_path / "1.log").read_text()


def test_an_error_of_the_training_is_shown_and_ends_in_another_status(tmp_path: Path) -> None:
    statuses = [process.wait(PATIENCE) for process in nodes("failing", tmp_path)]
    # Who is the last to fail may find the others gone.
    assert 1 in statuses and set(statuses) <= {1, node.LOST}, logs(tmp_path)
    assert "ValueError: a lesson too hard" in logs(tmp_path)
    assert not (tmp_path / "facts.json").exists()
