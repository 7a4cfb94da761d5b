"""From raw data to the tables that everything else reads."""

from typing import NamedTuple

from kfp.dsl.pipeline_channel import PipelineArtifactChannel

from components.contexts.component import contexts
from components.ingest.component import ingest
from pipelines.placement import place, values
from trackrec.run_config import RunConfig


class Tables(NamedTuple):
    """The tables of these names."""

    interactions: PipelineArtifactChannel
    items: PipelineArtifactChannel
    contexts: PipelineArtifactChannel
    examples: PipelineArtifactChannel


def prepared(config: RunConfig, raw: PipelineArtifactChannel) -> Tables:
    """Raw data to interactions, and their histories to contexts and examples (paper 4.1.1)."""
    ingested = place(ingest(settings=values(config.ingest), raw=raw), "ingest", config).outputs
    judged = place(
        contexts(
            settings=values(config.contexts),
            seed=config.seed,
            interactions=ingested["interactions"],
            items=ingested["items"],
        ),
        "contexts",
        config,
    ).outputs
    return Tables(ingested["interactions"], ingested["items"], judged["contexts"], judged["examples"])
