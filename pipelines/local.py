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
from importlib import metadata
from pathlib import Path
from typing import Any

from kfp import compiler, components, local
from kfp.dsl.graph_component import GraphComponent
from kfp.local import pipeline_orchestrator
from rich.console import Console
from rich.markup import escape

from pipelines.recording import RECORD, Artifact, Part, RunRecord, all_tasks, expose_outputs, recorded, with_defaults
from trackrec import storage

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
    expose_outputs(spec)
    for task in all_tasks(spec).values():
        # On one machine a failure seldom passes by itself, and waiting for it tells nobody what to mend.
        task.ClearField("retry_policy")
        if task.HasField("parameter_iterator"):
            # Shards share this machine's memory and its GPU: one after the other.
            task.iterator_policy.parallelism_limit = 1

    os.environ[storage.WORK_ENV] = str(root / "work")
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(root / "artifacts" / run),
        enable_caching=caching,
        cache_root=str(root / "cache" / _environment()),
    )
    titles = {name: task.task_info.name or name for name, task in all_tasks(spec).items()}
    with (folder / LOG).open("w", encoding="utf-8") as log, _Progress(log, titles, console) as progress:
        try:
            with contextlib.redirect_stdout(progress), _quiet_warnings():
                outputs = pipeline_orchestrator.run_local_pipeline(spec, arguments)
        except KeyboardInterrupt:
            console.print(
                f"interrupted in {escape(progress.current)}; the same command goes on there. Log: {folder / LOG}"
            )
            raise
        except (RuntimeError, _Stopped) as error:
            raise RunFailed(
                f"{progress.current or 'the pipeline'} failed: {progress.reason()}\n"
                f"The whole log is {folder / LOG}. Its last lines:\n{progress.tail()}\n"
                "Mend the cause and run the same command again: what has finished is not run twice."
            ) from error
    written = root / "artifacts" / run
    artifacts = {
        key: Artifact(uri=value.uri, kind=value.schema_title, metadata=dict(value.metadata))
        for key, value in outputs.items()
        if not isinstance(value, list)
    }
    parts = {
        key: [Part(uri=part.uri, cached=not Path(part.uri).is_relative_to(written)) for part in value]
        for key, value in outputs.items()
        if isinstance(value, list)
    }
    ran = {key.split("/", 1)[0] for key, value in artifacts.items() if Path(value.uri).is_relative_to(written)}
    record = RunRecord(
        run=run,
        seconds=round(time.monotonic() - started, 1),
        tasks=recorded(
            spec, artifacts, with_defaults(spec, arguments), cached=spec.root.dag.tasks.keys() - ran, parts=parts
        ),
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


@contextlib.contextmanager
def _quiet_warnings() -> Any:
    """Leaves out the runner's warnings that resources, titles and image names count for nothing on one machine."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have no effect in the current local runner.*")
        warnings.filterwarnings("ignore", message=".*non-Python base image.*")
        yield


class _Stopped(BaseException):
    """A task would begin after another has failed; no `Exception`, for logging swallows those."""


class _Progress(io.TextIOBase):
    """Takes the runner's output: all of it goes to the log, a line a task (and its progress bar) to the terminal.

    Raises:
        _Stopped: on writing, when a task begins after one has failed: a run with shards would go on with all else.
    """

    def __init__(self, log: io.TextIOBase | Any, titles: dict[str, str], console: Console) -> None:
        self.log = log
        self.titles = titles
        self.console = console
        self.current = ""
        self.has_failed = False
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
        started = _STARTED.search(line)
        if started and self.has_failed:
            raise _Stopped
        self.log.write(line + "\n")
        self.log.flush()
        if started:
            self.current = self.titles.get(started["task"], started["task"])
            self.started = self.printed = time.monotonic()
            self.recent.clear()
            self.status.update(escape(self.current))
            if not self.console.is_terminal:
                self.console.print(f"▶ {escape(self.current)}", style="dim")
        elif ended := _ENDED.search(line):
            self.has_failed = ended["status"] != "SUCCESS"
            mark = "[green]✔[/]" if ended["status"] == "SUCCESS" else "[red]✘[/]"
            self.console.print(f"{mark} {escape(self.current):<42} {time.monotonic() - self.started:6.1f} s")
        elif _PROGRESS.search(line):
            self.status.update(escape(f"{self.current}: {line.strip()}"))
            if not self.console.is_terminal and time.monotonic() - self.printed > _PROGRESS_SECONDS:
                self.printed = time.monotonic()
                self.console.print(f"  {escape(line.strip())}", style="dim", soft_wrap=True)
        elif line.strip():
            self.recent.append(line)
