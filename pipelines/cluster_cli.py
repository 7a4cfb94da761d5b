"""The commands that talk to Kubeflow Pipelines: upload, submit, schedule, status, logs, cancel, artifacts."""

import datetime as dt
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import kfp_server_api as api
import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipelines import batch_features, cluster_run, ir, metadata_store, pods, single
from pipelines.client import Cluster, ClusterError
from pipelines.options import ConfigOption, Pipeline, PipelineOption, ProfileOption, SetOption, built, overrides
from trackrec import config_file, storage
from trackrec.run_config import RunConfig

app = typer.Typer()
# A pipe has no width to keep within.
console = Console(width=None if sys.stdout.isatty() else 240)

# Seconds between two looks at a run.
WATCH = 10.0
# Kubeflow's cron begins with the second.
_CRON_FIELDS = 6
# Stands in the shipped configs for what is yours alone.
_OPEN = "YOUR-"
_STYLES = {"SUCCEEDED": "green", "FAILED": "red", "RUNNING": "cyan", "CANCELED": "yellow", "CANCELING": "yellow"}

HostOption = Annotated[
    str | None,
    typer.Option(help="Address of Kubeflow's pages, e.g. http://localhost:8080; else as the kfp client finds it."),
]
NamespaceOption = Annotated[
    str | None,
    typer.Option(help="Your namespace, where the server has several users; else as the kfp client finds it."),
]
ParameterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--param", metavar="NAME=VALUE", help="A parameter of the pipeline, e.g. raw_data=gs://... Repeatable."
    ),
]
ExperimentOption = Annotated[
    str | None, typer.Option(help="By default KF_PIPELINES_DEFAULT_EXPERIMENT_NAME, else the pipeline's name.")
]
AccountOption = Annotated[str, typer.Option(help="What the run's pods run as; manifests/ makes it.")]
RunArgument = Annotated[str, typer.Argument(help="The run's id, as `submit` and `status` tell it.")]


@app.command()
def upload(
    config: ConfigOption,
    set_: SetOption = None,
    profile: ProfileOption = None,
    pipeline: PipelineOption = "trackrec",
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Compile a pipeline and upload it as a new version, named by its content; says so if it is there already."""
    loaded = config_file.load(config, overrides(set_), profile=profile)
    _with_package(pipeline, loaded, lambda name, package: _upload(Cluster(host, namespace), name, package))


@app.command()
def submit(
    config: ConfigOption,
    set_: SetOption = None,
    profile: ProfileOption = None,
    pipeline: PipelineOption = "trackrec",
    from_: Annotated[
        str | None, typer.Option("--from", help="For `release`: the finished run on the cluster whose models it is of.")
    ] = None,
    param: ParameterOption = None,
    experiment: ExperimentOption = None,
    cache: Annotated[bool, typer.Option(help="Reuse what unchanged stages wrote before.")] = True,
    service_account: AccountOption = "trackrec",
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Upload a pipeline if need be and start a run of it; --no-cache runs a copy that reuses nothing."""
    loaded = config_file.load(config, overrides(set_), profile=profile)
    if from_ is not None and pipeline != "release":
        raise config_file.ConfigError("--from RUN goes with `--pipeline release`")
    if from_ is not None:
        param = [*cluster_run.released(Cluster(host, namespace), from_, loaded), *(param or [])]

    def start(name: str, package: Path) -> None:
        documents = ir.read(package)
        today = f"{dt.datetime.now(dt.UTC):%Y-%m-%d}"
        arguments = batch_features.dated(documents[0], _arguments(documents[0], param), today)
        cluster = Cluster(host, namespace)
        run = api.V2beta1Run(
            display_name=f"{name}-{dt.datetime.now():%Y%m%d-%H%M%S}",
            runtime_config=api.V2beta1RuntimeConfig(parameters=arguments),
            service_account=service_account,
        )
        if cache:
            run.pipeline_version_reference = _upload(cluster, name, package)
        else:
            run.pipeline_spec = ir.inline(ir.uncached(documents))
        run.experiment_id = cluster.experiment(_experiment(experiment, name))
        _started(cluster.submit(run))

    _with_package(pipeline, loaded, start)


@app.command()
def schedule(
    name: Annotated[str, typer.Argument(help="The schedule's name; one that exists is replaced.")],
    cron: Annotated[
        str | None, typer.Option(help='When: "SECOND MINUTE HOUR DAY MONTH WEEKDAY", e.g. "0 0 3 * * *".')
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A run's YAML.")] = None,
    set_: SetOption = None,
    profile: ProfileOption = None,
    pipeline: PipelineOption = "trackrec",
    param: ParameterOption = None,
    experiment: ExperimentOption = None,
    service_account: AccountOption = "trackrec",
    pause: Annotated[bool, typer.Option("--pause", help="Start no more runs, until it is scheduled again.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the schedule; its runs stay.")] = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Run a pipeline by the clock, one run at a time; missed times are not caught up."""
    if pause + delete + (cron is not None) != 1:
        raise config_file.ConfigError("give one of --cron (with --config), --pause and --delete")
    if cron is None:
        _end(Cluster(host, namespace), name, delete=delete)
        return
    if config is None:
        raise config_file.ConfigError("--cron needs --config: what is to be run?")
    if len(cron.split()) != _CRON_FIELDS:
        raise config_file.ConfigError(
            f'--cron {cron!r}: Kubeflow\'s cron has six fields, seconds first; "0 0 3 * * *" is three every night'
        )
    loaded = config_file.load(config, overrides(set_), profile=profile)

    def put(pipeline_name: str, package: Path) -> None:
        spec = ir.read(package)[0]
        arguments = batch_features.dated(spec, _arguments(spec, param), batch_features.SCHEDULED_DAY)
        cluster = Cluster(host, namespace)
        wanted = api.V2beta1RecurringRun(
            display_name=name,
            pipeline_version_reference=_upload(cluster, pipeline_name, package),
            runtime_config=api.V2beta1RuntimeConfig(parameters=arguments),
            trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=cron)),
            mode=api.RecurringRunMode.ENABLE,
            no_catchup=True,
            max_concurrency="1",
            service_account=service_account,
            experiment_id=cluster.experiment(_experiment(experiment, pipeline_name)),
        )
        done = cluster.schedule(wanted)
        console.print(f"schedule {escape(name)}: {done}, {cron}", highlight=False)

    _with_package(pipeline, loaded, put)


@app.command()
def status(
    run_id: Annotated[str | None, typer.Argument(help="The run's id; without it, the newest runs are listed.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay until the run ends; fails if the run does.")] = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Show a run's tasks and how far they are."""
    cluster = Cluster(host, namespace)
    if run_id is None:
        console.print(_runs(cluster.newest(20)))
        return
    run = cluster.run(run_id)
    spec = cluster.spec(run)
    if not watch:
        console.print(_status(cluster, run, spec))
        return
    with Live(_status(cluster, run, spec), console=console, auto_refresh=False) as live:
        while run.state not in cluster_run.ENDED:
            time.sleep(WATCH)
            run = cluster.run(run_id)
            live.update(_status(cluster, run, spec), refresh=True)
    if run.state != "SUCCEEDED":
        told = f": {run.error.message}" if run.error and run.error.message else ""
        raise ClusterError(f"the run {run_id} ended {run.state}{told}; see `trackrec logs {run_id}`")


@app.command()
def logs(
    run_id: RunArgument,
    task: Annotated[str | None, typer.Argument(help="A task's title, e.g. 'sample 2'; all tasks by default.")] = None,
    tail: Annotated[int | None, typer.Option(help="Only so many last lines of each pod.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines are written; needs a task.")] = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Print the logs of a run's pods, read from Kubernetes with your kubeconfig."""
    if follow and task is None:
        raise config_file.ConfigError("--follow needs a task; name one")
    cluster = Cluster(host, namespace)
    run = cluster.run(run_id)
    titles = cluster_run.titles(cluster.spec(run))
    if task is not None and task not in (*titles, *titles.values()):
        raise LookupError(f"run {run_id} has no task {task!r}; it has: {', '.join(titles.values())}")
    found = pods.Pods(run_id, cluster.namespace)
    wanted = {name: its for name, its in found.by_task.items() if task in (None, name, titles.get(name))}
    if not wanted:
        raise LookupError(f"task {task!r} of the run {run_id} has no pod: it has not begun, or it came from the cache")
    for name, its in wanted.items():
        for pod in its:
            console.rule(escape(f"{titles.get(name, name)} ({pod})"), align="left", style="dim")
            for line in found.log(pod, tail=tail, follow=follow):
                console.print(Text(line), soft_wrap=True)


@app.command()
def cancel(run_id: RunArgument, host: HostOption = None, namespace: NamespaceOption = None) -> None:
    """Stop a run: its pods are ended, what its finished tasks wrote stays."""
    Cluster(host, namespace).cancel(run_id)
    console.print(f"cancelled {run_id}", highlight=False)


@app.command()
def artifacts(
    run_id: RunArgument,
    task: Annotated[str | None, typer.Option(help="Those of one task, e.g. 'sample 2', alone.")] = None,
    download: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also bring them here, as DIR/TASK/OUTPUT; goes on if stopped.")
    ] = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """List what a run's tasks wrote and where it lies."""
    cluster = Cluster(host, namespace)
    record = cluster_run.record(cluster, cluster.run(run_id))
    wanted = [single.find(record, task)] if task else [*record.tasks.values()]
    for one in wanted:
        for output, artifact in one.outputs.items():
            place = artifact.uri
            if download and one.stage:
                place = str(_brought(artifact.uri, download, one.title, output))
            line = Text(f"{one.title:<42} {output:<12} {place}")
            console.print(line, soft_wrap=True, style="dim" if one.cached else "")


def _brought(uri: str, folder: Path, title: str, output: str) -> Path:
    """An artifact as `folder/TITLE/OUTPUT`, a link to where it lies by its contents."""
    if not storage.is_remote(uri):
        raise ClusterError(f"{uri}: only gs:// is downloaded; take it from there by your store's own tool")
    target = storage.localize(uri, folder / ".contents")
    link = folder / title / output
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target.resolve())
    return link


def rerun(
    run_id: str, name: str, changed: dict[str, Any], *, cache: bool, host: str | None, namespace: str | None
) -> None:
    """One stage of a run on the cluster again, with the inputs that the run cached; see `trackrec stage`."""
    cluster = Cluster(host, namespace)
    run = cluster.run(run_id)
    task = single.find(cluster_run.record(cluster, run), name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{run_id}.yaml")
        path.write_text(ir.config_in(cluster.spec(run)), encoding="utf-8")
        loaded = single.configured(task, path, changed)
        pipeline = single.build(loaded, task)
        ir.write(pipeline, loaded, path)
        documents = ir.read(path)
    again = api.V2beta1Run(
        display_name=f"{pipeline.name}-{dt.datetime.now():%Y%m%d-%H%M%S}",
        description=f"{task.title} of the run {run_id}",
        experiment_id=run.experiment_id,
        pipeline_spec=ir.inline(documents if cache else ir.uncached(documents)),
        runtime_config=api.V2beta1RuntimeConfig(parameters={}),
        service_account=run.service_account,
    )
    _started(cluster.submit(again))


def _with_package(pipeline: Pipeline, loaded: RunConfig, then: Callable[[str, Path], object]) -> None:
    """Compiles, and hands the pipeline's name and the file of its IR on."""
    _filled_in({"registry": loaded.registry})
    made = built(pipeline, loaded)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "pipeline.yaml")
        ir.write(made, loaded, package)
        then(str(made.name), package)


def _upload(cluster: Cluster, name: str, package: Path) -> api.V2beta1PipelineVersionReference:
    version, is_new = cluster.upload(name, ir.version(package), str(package))
    told = "uploaded" if is_new else "unchanged"
    console.print(f"pipeline {name}, version {version.display_name}: {told}", highlight=False)
    return api.V2beta1PipelineVersionReference(
        pipeline_id=version.pipeline_id, pipeline_version_id=version.pipeline_version_id
    )


def _arguments(spec: dict[str, Any], given: list[str] | None) -> dict[str, Any]:
    """The pipeline's parameters that are given, checked against those it has and needs."""
    known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    arguments = {}
    for pair in given or []:
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise config_file.ConfigError(f"--param {pair!r}: write NAME=VALUE; the pipeline has: {', '.join(known)}")
        arguments[name] = value if known[name]["parameterType"] == "STRING" else config_file.parse(value)
    for name, definition in known.items():
        value = arguments.get(name, definition.get("defaultValue"))
        if value is None:
            raise config_file.ConfigError(f"the pipeline needs --param {name}=...")
        if str(value).startswith("package:"):
            raise config_file.ConfigError(
                f"{name}: {value} is for one machine; on a cluster give its place, e.g. --param {name}=gs://BUCKET/PATH"
            )
    given_or_default = {name: arguments.get(name, definition.get("defaultValue")) for name, definition in known.items()}
    # What a finished run's settings left open, its parameters gave.
    _filled_in({name: value for name, value in given_or_default.items() if name != "run_config"})
    return arguments


def _filled_in(values: dict[str, Any]) -> None:
    """What the shipped configs leave open is refused here: a pod would wait for such an image for ever."""
    for name, value in values.items():
        if _OPEN in str(value):
            raise config_file.ConfigError(f"{name}: {value} is to be filled in; give your own")


def _experiment(given: str | None, pipeline: str) -> str:
    return given or os.environ.get("KF_PIPELINES_DEFAULT_EXPERIMENT_NAME") or pipeline


def _end(cluster: Cluster, name: str, *, delete: bool) -> None:
    if not (found := cluster.schedules(name)):
        raise LookupError(f"no schedule {name!r} on {cluster.host}")
    for one in found:
        if delete:
            cluster.delete_schedule(one)
        else:
            cluster.pause_schedule(one)
    console.print(f"schedule {escape(name)}: {'deleted' if delete else 'paused'}", highlight=False)


def _started(run: api.V2beta1Run) -> None:
    console.print(f"run {run.run_id} ({run.display_name})", highlight=False)
    console.print(f"trackrec status {run.run_id} --watch", style="dim", highlight=False)


def _runs(found: list[api.V2beta1Run]) -> Table:
    table = Table(box=None, header_style="dim")
    for column in ("run", "name", "state", "created"):
        table.add_column(column, no_wrap=True)
    for run in found:
        state = Text(run.state or "", style=_STYLES.get(run.state or "", ""))
        table.add_row(run.run_id, run.display_name, state, f"{run.created_at:%Y-%m-%d %H:%M}")
    return table


def _status(cluster: Cluster, run: api.V2beta1Run, spec: dict[str, Any]) -> Table:
    try:
        executions = metadata_store.executions(cluster, run.run_id, cluster_run.titles(spec))
        cached, note = {name for name, one in executions.items() if one.cached}, ""
    except ClusterError as error:
        cached, note = set(), f"; what came from the cache is not marked: {error}"
    table = Table(
        box=None, header_style="dim", title=Text(f"{run.display_name}: {run.state}"), title_justify="left",
        caption=Text(f"run {run.run_id}{note}"), caption_justify="left",
    )  # fmt: skip
    for column in ("task", "state", "time"):
        table.add_column(column, no_wrap=True, justify="right" if column == "time" else "left")
    for name, task in cluster_run.tasks(run, spec).items():
        state = Text("cached" if name in cached else task.state.lower() or "–", style=_STYLES.get(task.state, "dim"))
        if task.pods > 1:
            state.append(f" ({task.pods})")
        table.add_row(Text(task.title), state, _took(task))
    return table


def _took(task: cluster_run.Task) -> str:
    if task.started is None or task.started.timestamp() <= 0:
        return ""
    running = task.ended is None or task.ended.timestamp() <= 0
    until = dt.datetime.now(task.started.tzinfo) if running else task.ended
    assert until is not None
    return str(dt.timedelta(seconds=round((until - task.started).total_seconds())))
