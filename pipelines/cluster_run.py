"""A run on a cluster as the commands read it: its tasks with their states, and its record like a local run's."""

import datetime as dt
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_server_api as api
from google.protobuf import json_format
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec

from pipelines import ir, metadata_store, release
from pipelines.client import Cluster, ClusterError
from pipelines.recording import Artifact, RunRecord, recorded, with_defaults
from trackrec import config_file
from trackrec.run_config import RunConfig

ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
# A task that is several pods, by shard or attempt, is in the first of these states that one of them is in.
_WORST_FIRST = ("FAILED", "RUNNING", "CANCELING", "CANCELED", "PAUSED", "PENDING", "SUCCEEDED", "SKIPPED")


@dataclass
class Task:
    """One task of a run; `state` is empty before it starts, `pods` counts its shards."""

    title: str
    state: str = ""
    pods: int = 0
    started: dt.datetime | None = None
    ended: dt.datetime | None = None


def titles(spec: dict[str, Any]) -> dict[str, str]:
    """What each task of the IR, those in sub-pipelines and loops included, is called on the run's page."""
    return dict(_titles(spec, spec["root"]))


def _titles(spec: dict[str, Any], component: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, task in component.get("dag", {}).get("tasks", {}).items():
        yield name, task.get("taskInfo", {}).get("name") or name
        yield from _titles(spec, spec["components"][task["componentRef"]["name"]])


def tasks(run: api.V2beta1Run, spec: dict[str, Any]) -> dict[str, Task]:
    """The run's tasks by their names in the IR, those that have begun first, as they began."""
    found = {name: Task(title) for name, title in titles(spec).items()}
    details = (run.run_details.task_details if run.run_details else None) or []
    for detail in details:
        # Kubeflow lists drivers and executors beside the tasks.
        if (task := found.get(detail.display_name)) is None:
            continue
        task.pods += 1
        task.state = min(filter(None, (task.state, detail.state)), key=_rank)
        task.started = min(filter(None, (task.started, detail.start_time)), default=None)
        task.ended = max(filter(None, (task.ended, detail.end_time)), default=None)
    return dict(sorted(found.items(), key=lambda item: (item[1].started is None, item[1].started or 0)))


def _rank(state: str) -> int:
    return _WORST_FIRST.index(state) if state in _WORST_FIRST else len(_WORST_FIRST)


def record(cluster: Cluster, run: api.V2beta1Run) -> RunRecord:
    """What a run's finished tasks were called with and wrote.

    Raises:
        ClusterError: the server or its metadata store cannot be read.
    """
    spec = json_format.ParseDict(cluster.spec(run), PipelineSpec(), ignore_unknown_fields=True)
    given = (run.runtime_config.parameters if run.runtime_config else None) or {}
    arguments = with_defaults(spec, given)
    named = {name: task.task_info.name or name for name, task in spec.root.dag.tasks.items()}
    executions = metadata_store.executions(cluster, run.run_id, named)
    artifacts = {}
    for name, execution in executions.items():
        component = spec.components[spec.root.dag.tasks[name].component_ref.name]
        kinds = component.output_definitions.artifacts
        for output, artifact in execution.outputs.items():
            kind = kinds[output].artifact_type.schema_title
            artifacts[f"{name}/{output}"] = Artifact(uri=artifact.uri, kind=kind, metadata=artifact.metadata)
    cached = {name for name, execution in executions.items() if execution.cached}
    finished = run.finished_at and run.finished_at.timestamp() > 0
    return RunRecord(
        run=run.run_id,
        seconds=round((run.finished_at - run.created_at).total_seconds(), 1) if finished else 0.0,
        tasks=recorded(spec, artifacts, arguments, cached=cached),
    )


def released(cluster: Cluster, run_id: str, config: RunConfig) -> list[str]:
    """A finished run's models as parameters, NAME=VALUE, of `pipelines/release.py` under `config`.

    Raises:
        ClusterError: the run has not succeeded.
        ConfigError, LookupError: see `release.arguments`.
    """
    if config.deploy.versions is None:
        # The stage would say so after the export.
        raise config_file.ConfigError("`deploy.versions` is not set: name where versions lie, gs://BUCKET/PATH")
    run = cluster.run(run_id)
    if run.state != "SUCCEEDED":
        raise ClusterError(f"the run {run_id} is {run.state}; release one that has succeeded")
    text = ir.config_in(cluster.spec(run))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{run_id}.yaml")
        path.write_text(text, encoding="utf-8")
        own = config_file.load(path)
    found = release.arguments(record(cluster, run), config, own, text)
    return [f"{name}={value}" for name, value in found.items()]
