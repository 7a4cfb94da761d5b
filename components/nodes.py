"""Where a stage's training runs: in its task's own pod, or on several nodes that a TrainJob starts.

`pipelines.placement` tells a task that asks for several nodes so in one environment variable, and lets Kubeflow hand
the pod's resources, environment and volumes over in a `dsl.TaskConfig`. On one machine nobody fills that in.
"""

from collections.abc import Callable
from typing import Any

from kfp import dsl

from trackrec.config import Memory, Positive, Settings, Text, Trained

ENV = "TRACKREC_NODES"


class Nodes(Settings):
    """What a task says of its nodes beside the `dsl.TaskConfig`; the value of `TRACKREC_NODES`, as JSON."""

    count: Positive
    image: Text
    # At /tmp and at /dev/shm: Kubeflow hands no emptyDir over.
    scratch: Memory
    shm: Memory | None = None
    # Of each node's pod, as of the task's own.
    labels: dict[str, str]


def launcher(stage: Trained, task_config: dsl.TaskConfig) -> Callable[..., dict[str, Any]]:
    """How `stage` starts its training, a `trackrec.align.launching.Launch`: here, or on the nodes its task asks for."""
    # Imports stand where they are needed: a pipeline is compiled without torch, and a training in one pod does not wait
    # for the Kubernetes client.
    asked = next((entry["value"] for entry in task_config.env or [] if entry["name"] == ENV), None)
    if asked is None:
        from trackrec.align.launching import launch

        return launch
    from components import incluster, trainjob
    from trackrec.stages.node import OnNodes

    nodes = Nodes.model_validate_json(asked)

    def run(name: str, command: list[str]) -> None:
        trainjob.run(
            incluster.in_cluster("a training on several nodes"), trainjob.manifest(name, command, nodes, task_config)
        )

    return OnNodes(stage, run)
