"""Runs a compiled pipeline on one machine with `kfp.local`, and keeps a record of what each task read and wrote.

Everything lies under one root (`runs/` by default):

    artifacts/   what the tasks wrote, by run and task
    cache/       which inputs gave which outputs: an unchanged task is not run again
    work/        checkpoints and finished shards of tasks that were killed
    <run>/       config.yaml, pipeline.yaml (the IR), run.json (the record), log.txt
"""

import contextlib
import datetime as dt
import hashlib
import io
import os
import platform
import re
import time
from collections.abc import Set
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from kfp import compiler, components, local
from kfp.dsl.graph_component import GraphComponent
from kfp.local import pipeline_orchestrator
from kfp.pipeline_spec.pipeline_spec_pb2 import ParameterType, PipelineSpec, PipelineTaskSpec
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape

from trackrec import storage

RECORD = "run.json"
CONFIG = "config.yaml"
IR = "pipeline.yaml"
LOG = "log.txt"

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_STARTED = re.compile(r"Executing task '(?P<task>[^']+)'")
_ENDED = re.compile(r"Task '(?P<task>[^']+)' finished with status (?P<status>\w+)")
# A traceback's last line, as torch's workers print it too; their parent's says only that one of them failed.
_ERROR = re.compile(r"^\s*(\[rank\d+\]:\s*)?(?P<text>(?!\S*ChildFailedError)[A-Za-z_][\w.]*(Error|Exception): .*)$")
_PROGRESS = re.compile(r"\d+%\|")
_LIBRARIES = (
    *("torch", "transformers", "tokenizers", "safetensors", "peft", "trl", "accelerate", "deepspeed"),
    *("duckdb", "ibis-framework", "pyarrow", "scikit-learn"),
)
# Without a terminal, how often a long task's progress bar is printed.
_PROGRESS_SECONDS = 10.0


class RunFailed(RuntimeError):
    """A task failed; the message names it and holds the end of its log."""


class Artifact(BaseModel):
    uri: str
    kind: str
    metadata: dict[str, Any] = {}


class TaskRecord(BaseModel):
    """One task of a run: what it was called with and what it wrote. `stage` is empty for an importer."""

    title: str
    stage: str
    cached: bool
    parameters: dict[str, Any] = {}
    inputs: dict[str, Artifact] = {}
    outputs: dict[str, Artifact] = {}


class RunRecord(BaseModel):
    run: str
    seconds: float
    tasks: dict[str, TaskRecord]

    def of_stage(self, stage: str) -> dict[str, TaskRecord]:
        return {name: task for name, task in self.tasks.items() if task.stage == stage}


def read_record(root: Path, run: str) -> RunRecord:
    """
    Raises:
        FileNotFoundError: no finished run of that name; names those there are.
    """
    path = root / run / RECORD
    if not path.is_file():
        known = sorted(p.parent.name for p in root.glob(f"*/{RECORD}"))
        raise FileNotFoundError(f"no finished run {run!r} under {root}; there are: {', '.join(known) or 'none'}")
    return RunRecord.model_validate_json(path.read_text(encoding="utf-8"))


def execute(
    pipeline: GraphComponent,
    config_text: str,
    *,
    root: Path,
    arguments: dict[str, Any],
    caching: bool,
    console: Console,
) -> RunRecord:
    """Compiles `pipeline`, runs the compiled file and writes the run's record.

    Raises:
        RunFailed: a task failed. What the tasks before it wrote stays, cached for the next try.
    """
    root = root.resolve()
    started = time.monotonic()
    folder = _new_folder(root, f"{pipeline.name}-{dt.datetime.now():%Y%m%d-%H%M%S}")
    run = folder.name
    (folder / CONFIG).write_text(config_text, encoding="utf-8")
    compiler.Compiler().compile(pipeline, str(folder / IR))
    spec = components.load_component_from_file(str(folder / IR)).pipeline_spec
    _expose_outputs(spec)
    for task in spec.root.dag.tasks.values():
        # On one machine a failure seldom passes by itself, and waiting for it tells nobody what to mend.
        task.ClearField("retry_policy")

    os.environ[storage.WORK_ENV] = str(root / "work")
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(root / "artifacts" / run),
        enable_caching=caching,
        cache_root=str(root / "cache" / _environment()),
    )
    titles = {name: task.task_info.name or name for name, task in spec.root.dag.tasks.items()}
    with (folder / LOG).open("w", encoding="utf-8") as log, _Progress(log, titles, console) as progress:
        try:
            with contextlib.redirect_stdout(progress), _quiet_warnings():
                outputs = pipeline_orchestrator.run_local_pipeline(spec, arguments)
        except KeyboardInterrupt:
            console.print(
                f"interrupted in {escape(progress.current)}; the same command goes on there. Log: {folder / LOG}"
            )
            raise
        except RuntimeError as error:
            raise RunFailed(
                f"{progress.current or 'the pipeline'} failed: {progress.reason()}\n"
                f"The whole log is {folder / LOG}. Its last lines:\n{progress.tail()}\n"
                "Mend the cause and run the same command again: what has finished is not run twice."
            ) from error
    artifacts = {
        key: Artifact(uri=value.uri, kind=value.schema_title, metadata=dict(value.metadata))
        for key, value in outputs.items()
    }
    written = root / "artifacts" / run
    ran = {key.split("/", 1)[0] for key, value in artifacts.items() if Path(value.uri).is_relative_to(written)}
    record = RunRecord(
        run=run,
        seconds=round(time.monotonic() - started, 1),
        tasks=recorded(spec, artifacts, arguments, cached=spec.root.dag.tasks.keys() - ran),
    )
    storage.write_atomic(folder / RECORD, record.model_dump_json(indent=2).encode())
    return record


def _new_folder(root: Path, name: str) -> Path:
    """`root/name`; a further run of the same second gets a number."""
    folder, number = root / name, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = root / f"{name}-{number}"


def _environment() -> str:
    """A hash of the installed libraries a result depends on: an image has them in its tag, this machine has not."""
    versions = [platform.python_version()]
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name}=={metadata.version(name)}")
    return hashlib.sha256(" ".join(versions).encode()).hexdigest()[:12]


def _expose_outputs(spec: PipelineSpec) -> None:
    """Declares every task's artifacts as the pipeline's outputs, so that the local runner hands them all back."""
    for name, task in spec.root.dag.tasks.items():
        for output, definition in spec.components[task.component_ref.name].output_definitions.artifacts.items():
            key = f"{name}/{output}"
            spec.root.output_definitions.artifacts[key].CopyFrom(definition)
            selector = spec.root.dag.outputs.artifacts[key].artifact_selectors.add()
            selector.producer_subtask = name
            selector.output_artifact_key = output


def recorded(
    spec: PipelineSpec, artifacts: dict[str, Artifact], arguments: dict[str, Any], *, cached: Set[str]
) -> dict[str, TaskRecord]:
    """The record of each task whose inputs exist, in the order of the work.

    Args:
        artifacts: what was written, by "task/output".
        arguments: the pipeline's parameters.
        cached: the tasks that did not run.
    """
    tasks = {}
    # The IR's tasks come in no order; a reader follows them from what they read to what they write.
    upstream = {name: sorted(task.dependent_tasks) for name, task in sorted(spec.root.dag.tasks.items())}
    for name in TopologicalSorter(upstream).static_order():
        task = spec.root.dag.tasks[name]
        executor = spec.components[task.component_ref.name].executor_label
        own = {key.split("/", 1)[1]: value for key, value in artifacts.items() if key.split("/", 1)[0] == name}
        inputs = {
            key: f"{source.task_output_artifact.producer_task}/{source.task_output_artifact.output_artifact_key}"
            for key, source in task.inputs.artifacts.items()
        }
        if not artifacts.keys() >= set(inputs.values()):
            continue
        is_importer = "importer" in spec.deployment_spec["executors"][executor]
        tasks[name] = TaskRecord(
            title=task.task_info.name or name,
            stage="" if is_importer else executor.removeprefix("exec-").rstrip("-0123456789").replace("-", "_"),
            cached=not is_importer and name in cached,
            parameters=_parameters(spec, task, arguments),
            inputs={key: artifacts[source] for key, source in inputs.items()},
            outputs=own,
        )
    return tasks


def _parameters(spec: PipelineSpec, task: PipelineTaskSpec, arguments: dict[str, Any]) -> dict[str, Any]:
    definitions = spec.components[task.component_ref.name].input_definitions.parameters
    values = {}
    for name, source in task.inputs.parameters.items():
        if source.HasField("component_input_parameter"):
            values[name] = arguments.get(source.component_input_parameter)
            continue
        value = json_format.MessageToDict(source.runtime_value.constant)
        # The IR knows one kind of number.
        is_integer = definitions[name].parameter_type == ParameterType.NUMBER_INTEGER
        values[name] = int(value) if is_integer else value
    return values


@contextlib.contextmanager
def _quiet_warnings() -> Any:
    """Leaves out the runner's warnings that resources, titles and image names count for nothing on one machine."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have no effect in the current local runner.*")
        warnings.filterwarnings("ignore", message=".*non-Python base image.*")
        yield


class _Progress(io.TextIOBase):
    """Takes the runner's output: all of it goes to the log, a line a task (and its progress bar) to the terminal."""

    def __init__(self, log: io.TextIOBase | Any, titles: dict[str, str], console: Console) -> None:
        self.log = log
        self.titles = titles
        self.console = console
        self.current = ""
        self.started = self.printed = 0.0
        self.pending = ""
        self.recent: list[str] = []
        self.status = console.status("starting")

    def __enter__(self) -> "_Progress":
        self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        self.pending += text
        *lines, self.pending = self.pending.split("\n")
        for line in lines:
            self._line(_ANSI.sub("", line.rsplit("\r", 1)[-1]))
        return len(text)

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.recent[-lines:])

    def reason(self) -> str:
        """The last error that the log names, in its own words."""
        errors = [found["text"] for line in self.recent if (found := _ERROR.match(line))]
        return errors[-1] if errors else "see below"

    def _line(self, line: str) -> None:
        self.log.write(line + "\n")
        self.log.flush()
        if started := _STARTED.search(line):
            self.current = self.titles.get(started["task"], started["task"])
            self.started = self.printed = time.monotonic()
            self.recent.clear()
            self.status.update(escape(self.current))
            if not self.console.is_terminal:
                self.console.print(f"▶ {escape(self.current)}", style="dim")
        elif ended := _ENDED.search(line):
            mark = "[green]✔[/]" if ended["status"] == "SUCCESS" else "[red]✘[/]"
            self.console.print(f"{mark} {escape(self.current):<42} {time.monotonic() - self.started:6.1f} s")
        elif _PROGRESS.search(line):
            self.status.update(escape(f"{self.current}: {line.strip()}"))
            if not self.console.is_terminal and time.monotonic() - self.printed > _PROGRESS_SECONDS:
                self.printed = time.monotonic()
                self.console.print(f"  {escape(line.strip())}", style="dim", soft_wrap=True)
        elif line.strip():
            self.recent.append(line)
