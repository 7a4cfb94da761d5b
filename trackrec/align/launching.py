"""Starts a training: in this process, in one process a GPU of a pod, or as one node of several.

A stage trains in a module-level function `body(settings, ...) -> facts` and stays one process itself, which alone
publishes. It calls a `Launch`: `launch` below, or one that hands the body to other pods, each of which calls
`launch_node`.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from trackrec.config import TrainingSettings

Body = Callable[..., dict[str, Any]]
# Called as `launch` is.
Launch = Callable[..., dict[str, Any]]

# How often a node starts its processes anew after one failed: a lost node takes one attempt, an error of the training
# itself comes again each time.
_RESTARTS = 2
# Seconds that a node waits for the others: a lost one's successor may first need a new machine and the image.
_JOIN_SECONDS = 1800
# Seconds that a node tries to reach the first one, which may not have started.
_REACH_SECONDS = 300


def launch(body: Body, settings: TrainingSettings, *args: Any) -> dict[str, Any]:
    """Runs `body(settings, *args)` in one process a GPU, or right here with one device and no DeepSpeed; returns rank
    0's facts.

    Args:
        body: a module-level function; `args` must be picklable by multiprocessing (paths and settings are).
    Raises:
        ChildFailedError: a process failed; the others are stopped.
    """
    count = max(torch.cuda.device_count(), 1)
    if count == 1 and settings.deepspeed is None:
        return body(settings, *args)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,  # the stage's own retry resumes from the last checkpoint
    )
    facts: dict[str, Any] = elastic_launch(config, body)(settings, *args)[0]
    return facts


def launch_node(body: Body, *args: Any, name: str, nodes: int, node: int, address: str) -> dict[str, Any] | None:
    """Runs `body(*args)` in one process a GPU of this node, together with the other nodes.

    A lost node's successor joins by the same call: all processes start anew then, and the training resumes from its
    last checkpoint.

    Args:
        name: of the training, the same on all nodes.
        nodes: how many there are; the training runs when all are.
        node: which one this is; node 0 is where the others meet.
        address: of node 0, as "host:port".
    Returns:
        Rank 0's facts on the node that has it, None on the others.
    Raises:
        ChildFailedError: a process here failed, again after its restarts.
        torch.distributed.DistError, RendezvousError: the other nodes were not to be reached.
    """
    # Else the processes of every round share one store, in which a lost node's addresses are still those of the last.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=max(torch.cuda.device_count(), 1),
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint=address,
        rdzv_configs={"is_host": node == 0, "join_timeout": _JOIN_SECONDS, "read_timeout": _REACH_SECONDS},
        max_restarts=_RESTARTS,
    )
    facts: dict[str, Any] | None = elastic_launch(config, body)(*args).get(0)
    return facts
