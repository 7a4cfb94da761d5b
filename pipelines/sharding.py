"""A stage's work shared by several pods, one GPU each, and their tables joined."""

from collections.abc import Callable
from typing import Literal

from kfp import dsl
from kfp.dsl.pipeline_channel import PipelineArtifactChannel
from kfp.dsl.pipeline_task import PipelineTask

from components.gather.component import gather
from pipelines.placement import NEVER_CACHED, place
from trackrec.run_config import RunConfig, ShardedResources

Sharded = Literal["sample", "score", "generate", "encode", "features"]
# What each writes: the table, and the output of that name.
TABLE_OF: dict[str, str] = {
    "sample": "recots",
    "score": "rewards",
    "generate": "recots",
    "encode": "vectors",
    "features": "feature_shards",
}


def written(
    stage: Sharded, config: RunConfig, title: str, task: Callable[..., PipelineTask]
) -> PipelineArtifactChannel:
    """The table that `stage` writes, by as many pods as `resources.<stage>.shards` says.

    Args:
        title: the task's, or of several the loop's over them.
        task: the stage's component with its inputs, but for `shard` and `shards`.
    """
    pods: ShardedResources = getattr(config.resources, stage)
    table = TABLE_OF[stage]
    if pods.shards == 1:
        return place(task(), stage, config, title).outputs[table]
    with dsl.ParallelFor(list(range(pods.shards)), name=title) as shard:
        part = place(task(shard=shard, shards=pods.shards), stage, config, f"{title}, one shard")
    joined = gather(table=table, parts=dsl.Collected(part.outputs[table]))
    placed = place(joined, "gather", config, f"gather ({title})")
    if stage in NEVER_CACHED:
        placed.set_caching_options(False)
    return placed.outputs["joined"]
