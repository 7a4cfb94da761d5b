"""The options that several commands share, and what they stand for."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from kfp.dsl.graph_component import GraphComponent

from pipelines import ablations, backbones, batch_features, release, trackrec
from trackrec import config_file
from trackrec import profile as profiles
from trackrec.run_config import RunConfig

PIPELINES = {
    "trackrec": trackrec.build,
    "ablations": ablations.build,
    "backbones": backbones.build,
    "release": release.build,
    "batch_features": batch_features.build,
}
Pipeline = Literal["trackrec", "ablations", "backbones", "release", "batch_features"]

PipelineOption = Annotated[
    Pipeline,
    typer.Option(
        "--pipeline",
        "-p",
        help="trackrec: the whole. ablations: the loop without alignment, distillation, iterating. "
        "backbones: ranking models on the RecCoTs of a finished run. "
        "release: the models of a finished run to Triton. "
        "batch_features: active users' RecCoTs and vectors, through Triton.",
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


def built(pipeline: Pipeline, loaded: RunConfig) -> GraphComponent:
    """
    Raises:
        ConfigError: the config does not go with the pipeline.
    """
    try:
        return PIPELINES[pipeline](loaded)
    except ValueError as error:
        raise config_file.ConfigError(str(error)) from error


def overrides(pairs: list[str] | None) -> dict[str, Any]:
    return dict(config_file.parse_override(pair) for pair in pairs or [])
