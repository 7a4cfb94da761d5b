"""A finished run's models into production: a model repository that has answered, then the Deployment rolled to it."""

import re
from typing import Any

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent
from kfp.dsl.pipeline_channel import PipelineParameterChannel

from components.deploy.component import deploy
from components.export.component import export
from pipelines import single
from pipelines.placement import imported, place, values
from pipelines.recording import RunRecord
from trackrec.config import Backbone
from trackrec.config_file import ConfigError
from trackrec.run_config import RunConfig

# What serving does as the run did; everything else of a run's settings lies in its models.
_SHARED = (
    "contexts.domain",
    "contexts.history_length",
    "generate.max_tokens",
    "generate.repetition_penalty",
    "encode.pooling",
    "encode.dtype",
)


def build(config: RunConfig, *, deployed: bool = True) -> GraphComponent:
    """The pipeline; the finished run's name, settings and artifacts are parameters (`arguments`).

    Without `ranking` in the config no ranking model is served, and without `encoder` no encoder.

    Args:
        deployed: roll the cluster's Deployment to the version; on one machine there is none.
    """
    title = {"name": f"{config.name}-release", "description": __doc__}

    if config.ranking is None:

        @dsl.pipeline(**title)
        def release(
            run: str,
            run_config: str,
            generator: str,
            metrics: str,
            base_model: str = config.base_model,
            encoder: str = config.encoder or "",
        ) -> None:
            models = {"generator": generator, "base_model": base_model, "metrics": metrics}
            if config.encoder is not None:
                models["encoder"] = encoder
            _released(config, run, run_config, models, deployed=deployed)

        return release

    @dsl.pipeline(**title)
    def ranking_release(
        run: str,
        run_config: str,
        generator: str,
        metrics: str,
        items: str,
        ranker_base: str,
        ranker_trackrec: str,
        base_model: str = config.base_model,
        encoder: str = config.encoder or "",
    ) -> None:
        models = {"generator": generator, "base_model": base_model, "metrics": metrics, "encoder": encoder}
        models |= {"items": items, "ranker_base": ranker_base, "ranker_trackrec": ranker_trackrec}
        _released(config, run, run_config, models, deployed=deployed)

    return ranking_release


def _released(
    config: RunConfig,
    run: PipelineParameterChannel,
    run_config: PipelineParameterChannel,
    models: dict[str, PipelineParameterChannel],
    *,
    deployed: bool,
) -> None:
    kinds = {"items": dsl.Dataset, "metrics": dsl.Metrics}
    versions = {"base_model": config.base_model_version, "encoder": config.encoder_version}
    given = {
        name: imported(uri, versions.get(name, ""), kinds.get(name, dsl.Model), name.replace("_", " "))
        for name, uri in models.items()
    }
    task = export(
        settings=values(config.export),
        generate=values(config.generate),
        encode=values(config.encode),
        domain=config.contexts.domain,
        history_length=config.contexts.history_length,
        run=run,
        run_config=run_config,
        **given,
    )
    exported = place(task, "export", config).outputs
    if deployed:
        rolled = deploy(
            settings=values(config.deploy), run=dsl.PIPELINE_JOB_ID_PLACEHOLDER, repository=exported["repository"]
        )
        place(rolled, "deploy", config)


def arguments(record: RunRecord, config: RunConfig, own: RunConfig, own_text: str) -> dict[str, str]:
    """A finished run as the pipeline's parameters.

    Args:
        config: the release's.
        own, own_text: the run's.

    Raises:
        ConfigError: the release's config contradicts the run's own.
        LookupError: the run has not made what is to be served; says what it has.
    """
    for key in _SHARED:
        if (asked := _at(config, key)) != (its := _at(own, key)):
            raise ConfigError(
                f"`{key}` is {asked!r}, and the run {record.run} was made with {its!r}: a model is served as it was "
                "trained. Leave the setting, or give the run's own config.yaml"
            )
    written = {
        int(numbered[1]): task
        for task in record.of_stage("generate").values()
        if (numbered := re.fullmatch(r"generate (\d+)", task.title))
    }
    last = max(written, default=None)
    # Without any, says what there is.
    texts = single.find(record, "generate") if last is None else written[last]
    metrics = single.find(record, f"evaluate (iteration {last})").outputs["metrics"]
    found = {"generator": texts.inputs["generator"], "base_model": texts.inputs["base_model"], "metrics": metrics}
    if config.ranking is not None:
        backbone: Backbone = config.export.backbone or config.ranking.backbones[0]
        base = single.find(record, f"train_ctr {backbone}")
        found |= {"ranker_base": base.outputs["trained"], "items": base.inputs["items"]}
        found["ranker_trackrec"] = single.find(record, f"train_ctr {backbone} {last}").outputs["trained"]
    if config.encoder is not None and own.ranking is not None:
        found["encoder"] = single.find(record, f"encode {last}").inputs["encoder"]
    return {"run": record.run, "run_config": own_text, **{name: artifact.uri for name, artifact in found.items()}}


def _at(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
