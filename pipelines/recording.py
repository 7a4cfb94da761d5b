"""The record of a run (on one machine, `run.json`): what each task read and wrote, in the order of the pipeline."""

from collections.abc import Mapping, Set
from graphlib import TopologicalSorter
from types import MappingProxyType
from typing import Any

from google.protobuf import json_format
from kfp.pipeline_spec.pipeline_spec_pb2 import ParameterType, PipelineSpec, PipelineTaskSpec
from pydantic import BaseModel

RECORD = "run.json"


class Artifact(BaseModel):
    uri: str
    kind: str
    metadata: dict[str, Any] = {}


class Part(BaseModel):
    """What one shard wrote."""

    uri: str
    cached: bool


class TaskRecord(BaseModel):
    """One task of a run: what it was called with and what it wrote. `stage` is empty for an importer.

    Several shards are one task: `parts` are what they wrote, by the shard's number, `outputs` what was gathered of it.
    """

    title: str
    stage: str
    cached: bool
    parameters: dict[str, Any] = {}
    inputs: dict[str, Artifact] = {}
    outputs: dict[str, Artifact] = {}
    parts: list[Part] = []


class RunRecord(BaseModel):
    run: str
    seconds: float
    tasks: dict[str, TaskRecord]

    def of_stage(self, stage: str) -> dict[str, TaskRecord]:
        return {name: task for name, task in self.tasks.items() if task.stage == stage}


def all_tasks(spec: PipelineSpec) -> dict[str, PipelineTaskSpec]:
    """All tasks by name, those inside the loops over shards included; no two have one name."""
    dags = [spec.root.dag, *(component.dag for component in spec.components.values())]
    return {name: task for dag in dags for name, task in dag.tasks.items()}


def expose_outputs(spec: PipelineSpec) -> None:
    """Declares every task's artifacts as the pipeline's outputs, so that the local runner hands them all back."""
    for name, task in spec.root.dag.tasks.items():
        for output, definition in spec.components[task.component_ref.name].output_definitions.artifacts.items():
            key = f"{name}/{output}"
            spec.root.output_definitions.artifacts[key].CopyFrom(definition)
            selector = spec.root.dag.outputs.artifacts[key].artifact_selectors.add()
            selector.producer_subtask = name
            selector.output_artifact_key = output


def with_defaults(spec: PipelineSpec, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's parameters: those given, else what the IR has for them."""
    defaults = {
        name: json_format.MessageToDict(parameter.default_value)
        for name, parameter in spec.root.input_definitions.parameters.items()
        if parameter.HasField("default_value")
    }
    return {**defaults, **arguments}


def recorded(
    spec: PipelineSpec,
    artifacts: Mapping[str, Artifact],
    arguments: dict[str, Any],
    *,
    cached: Set[str],
    parts: Mapping[str, list[Part]] = MappingProxyType({}),
) -> dict[str, TaskRecord]:
    """The record of each task whose inputs exist, in the order of the work.

    Args:
        artifacts: what was written, by "task/output".
        arguments: the pipeline's parameters.
        cached: the tasks that did not run.
        parts: what shards wrote, by "loop/output".
    """
    root = spec.root.dag.tasks
    # The loop's output to the task that joins it; nothing but `gather` has such an input.
    gathers = {_source(task, "parts"): name for name, task in root.items() if "parts" in task.inputs.artifacts}

    tasks = {}
    # The IR's tasks come in no order; a reader follows them from what they read to what they write.
    upstream = {name: sorted(task.dependent_tasks) for name, task in sorted(root.items())}
    for name in TopologicalSorter(upstream).static_order():
        task = inner = root[name]
        if name in gathers.values():
            continue
        writer = name
        own = {key.split("/", 1)[1]: value for key, value in artifacts.items() if key.split("/", 1)[0] == name}
        sources = {given: _source(task, given) for given in task.inputs.artifacts}
        shards: list[Part] = []
        given_parameters: Mapping[str, Any] = arguments
        loop = spec.components[task.component_ref.name].dag
        if loop.tasks:
            # It has one task, which reads what the loop is given, and one output, which is joined.
            [inner], [(key, output)] = loop.tasks.values(), loop.outputs.artifacts.items()
            # A loop has its own names for the pipeline's parameters.
            given_parameters = {
                name: arguments.get(source.component_input_parameter) for name, source in task.inputs.parameters.items()
            }
            sources = {
                given: sources[source.component_input_artifact] for given, source in inner.inputs.artifacts.items()
            }
            writer = gathers[f"{name}/{key}"]
            joined = artifacts.get(f"{writer}/joined")
            own = {output.artifact_selectors[0].output_artifact_key: joined} if joined else {}
            shards = parts.get(f"{name}/{key}", [])
        if not artifacts.keys() >= set(sources.values()):
            continue
        stage = _stage(spec, inner)
        tasks[name] = TaskRecord(
            title=task.task_info.name or name,
            stage=stage,
            cached=bool(stage) and writer in cached,
            parameters=_parameters(spec, inner, given_parameters),
            inputs={given: artifacts[source] for given, source in sources.items()},
            outputs=own,
            parts=shards,
        )
    return tasks


def _source(task: PipelineTaskSpec, artifact: str) -> str:
    """Where a task's input comes from, as "task/output"."""
    source = task.inputs.artifacts[artifact].task_output_artifact
    return f"{source.producer_task}/{source.output_artifact_key}"


def _stage(spec: PipelineSpec, task: PipelineTaskSpec) -> str:
    """The task's stage; "" of an importer."""
    executor = spec.components[task.component_ref.name].executor_label
    if "importer" in spec.deployment_spec["executors"][executor]:
        return ""
    return str(executor).removeprefix("exec-").rstrip("-0123456789").replace("-", "_")


def _parameters(spec: PipelineSpec, task: PipelineTaskSpec, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the task was called with, but for which shard it was: that is the loop's."""
    definitions = spec.components[task.component_ref.name].input_definitions.parameters
    values = {}
    for name, source in task.inputs.parameters.items():
        if name in ("shard", "shards"):
            continue
        if source.HasField("component_input_parameter"):
            values[name] = arguments.get(source.component_input_parameter)
            continue
        value = json_format.MessageToDict(source.runtime_value.constant)
        # The IR knows one kind of number.
        is_integer = definitions[name].parameter_type == ParameterType.NUMBER_INTEGER
        values[name] = int(value) if is_integer else value
    return values
