"""One stage as a pipeline of its own, its inputs imported from an earlier run."""

from functools import partial
from pathlib import Path
from typing import Any, cast

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent

from components import stages
from pipelines.placement import place, values
from pipelines.preparation import placed_preflight
from pipelines.recording import RunRecord, TaskRecord
from pipelines.sharding import TABLE_OF, Sharded, written
from trackrec import config_file
from trackrec.run_config import RunConfig

_KINDS = {kind.schema_title: kind for kind in (dsl.Dataset, dsl.Model, dsl.Metrics)}


def find(record: RunRecord, name: str) -> TaskRecord:
    """The task titled `name` ("sample 2"), or the only task of the stage `name`.

    Raises:
        LookupError: there is none, or there are several; says what to ask for.
    """
    tasks = [task for task in record.tasks.values() if task.stage]
    matches = [task for task in tasks if task.title == name] or [task for task in tasks if task.stage == name]
    if len(matches) == 1:
        return matches[0]
    titles = ", ".join(repr(task.title) for task in matches or tasks)
    if matches:
        raise LookupError(f"run {record.run} has several tasks of the stage {name!r}; name one: {titles}")
    raise LookupError(f"run {record.run} has no stage or task {name!r}; it has: {titles}")


def configured(task: TaskRecord, path: Path, overrides: dict[str, Any]) -> RunConfig:
    """The config at `path`, a run's own, under `overrides` of this task's settings.

    Raises:
        ConfigError: an override is of another stage's settings, or breaks a rule.
    """
    keys = {"settings": task.stage, "data": "data", "seed": "seed"}
    own = [key for parameter, key in keys.items() if parameter in task.parameters] + [f"resources.{task.stage}"]
    for key in overrides:
        if "config" in task.parameters and key not in task.parameters:
            continue  # `preflight` reads it all; its other parameters are the run's addresses
        if not any(f"{key}.".startswith(f"{section}.") for section in own):
            raise config_file.ConfigError(f"{key}: not a setting of {task.title}; allowed here: {', '.join(own)}")
        if (name := key.rpartition(".")[2]) in task.parameters and key == f"{task.stage}.{name}":
            task.parameters[name] = overrides[key]  # such a setting is what the pipeline's parameter begins as
    return config_file.load(path, overrides)


def build(config: RunConfig, task: TaskRecord) -> GraphComponent:
    """The pipeline of one task: the stage's settings from `config`, its other parameters and inputs from the record."""
    stage = task.stage
    parameters = dict(task.parameters)
    if "settings" in parameters:
        parameters["settings"] = values(getattr(config, stage))
    if "data" in parameters:
        parameters["data"] = values(config.data)
    if "seed" in parameters:
        parameters["seed"] = config.seed
    if "config" in parameters:
        parameters["config"] = values(config)

    @dsl.pipeline(name=f"{config.name}-{stage}".replace("_", "-"), description=f"The stage {stage} alone.")
    def one_stage() -> None:
        inputs = {}
        for name, artifact in task.inputs.items():
            importer = dsl.importer(
                artifact_uri=artifact.uri, artifact_class=_KINDS[artifact.kind], metadata=artifact.metadata or None
            )
            inputs[name] = importer.set_display_name(f"input {name}").output
        called = partial(stages.load(stage), **parameters, **inputs)
        if stage in TABLE_OF:
            written(cast(Sharded, stage), config, task.title, called)
        elif stage == "preflight":
            job = bool(parameters.get("triton"))
            placed_preflight(called(), config, loop=bool(parameters["base_model"]), features=job)
        else:
            place(called(), stage, config, task.title)

    return one_stage
