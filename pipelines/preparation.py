"""What comes first: the check of what a run needs, then raw data to the tables that everything else reads."""

from typing import NamedTuple

from kfp import dsl, kubernetes
from kfp.dsl.pipeline_channel import PipelineArtifactChannel, PipelineParameterChannel
from kfp.dsl.pipeline_task import PipelineTask

from components.contexts.component import contexts
from components.ingest.component import ingest
from components.preflight.component import preflight
from pipelines.placement import imported, place, values
from trackrec.run_config import RunConfig, secrets_of


class Tables(NamedTuple):
    """The tables of these names."""

    interactions: PipelineArtifactChannel
    items: PipelineArtifactChannel
    contexts: PipelineArtifactChannel
    examples: PipelineArtifactChannel


def preflighted(
    config: RunConfig, *, encoder: str = "", raw_data: str = "", base_model: str = "", **job: str
) -> PipelineTask:
    """The first task: fails in seconds, before any GPU is taken, where something that the run needs is missing.

    All that a run reads is imported after it, so every task waits for it. It looks anew in every run and at once says
    what is wrong: neither cached nor retried.

    Args:
        encoder, raw_data, base_model: their URIs, the pipeline's parameters.
        job: `triton` and `out` of the batch feature job, its parameters.
    """
    task = preflight(config=values(config), raw_data=raw_data, base_model=base_model, encoder=encoder, **job)
    return placed_preflight(task, config, loop=bool(base_model), features=bool(job))


def placed_preflight(task: PipelineTask, config: RunConfig, *, loop: bool, features: bool = False) -> PipelineTask:
    """Gives `preflight` its pod, with the secrets of all stages that the run has.

    Args:
        loop: whether those are more than the ranking models'.
        features: whether they are the batch feature job's.
    """
    own = config.resources.preflight.model_copy(update={"cache": False, "retries": 0, "secrets": []})
    resources = config.resources.model_copy(update={"preflight": own})
    place(task, "preflight", config.model_copy(update={"resources": resources}))
    for env, secret in secrets_of(config, loop=loop, features=features).items():
        # Optional: with one missing, the pod would wait for it instead of saying so.
        kubernetes.use_secret_as_env(task, secret.secret, {secret.key: env}, optional=True)
    return task


def ingested(
    config: RunConfig,
    raw_data: PipelineParameterChannel,
    checked: PipelineTask,
    day: PipelineParameterChannel | None = None,
) -> dict[str, PipelineArtifactChannel]:
    """Raw data to interactions and items (paper 4.1.1).

    Args:
        day: what lies at the address grows from day to day: each is read anew.
    """
    sections = {"settings": values(config.ingest), "data": values(config.data)}
    version = {} if day is None else {"raw_version": day}
    if config.engine_reads_raw:
        # No artifact: Kubeflow would copy it into the pod.
        task = ingest(**sections, raw_uri=raw_data, **({"raw_version": config.raw_data_version} | version))
        return place(task.after(checked), "ingest", config).outputs
    raw = imported(raw_data, config.raw_data_version, dsl.Dataset, "raw data", checked)
    return place(ingest(**sections, raw=raw, **version), "ingest", config).outputs


def prepared(config: RunConfig, raw_data: PipelineParameterChannel, checked: PipelineTask) -> Tables:
    """Raw data to interactions, and their histories to contexts and examples (paper 4.1.1)."""
    tables = ingested(config, raw_data, checked)
    judged = place(
        contexts(
            settings=values(config.contexts),
            data=values(config.data),
            seed=config.seed,
            interactions=tables["interactions"],
            items=tables["items"],
        ),
        "contexts",
        config,
    ).outputs
    return Tables(tables["interactions"], tables["items"], judged["contexts"], judged["examples"])
