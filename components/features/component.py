"""The stage `features` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components import images


@dsl.component(base_image=images.released("features"), install_kfp_package=False)
def features(
    settings: dict,
    triton: str,
    out: str,
    users: Input[Dataset],
    feature_shards: Output[Dataset],
    shard: int = 0,
    shards: int = 1,
) -> None:
    """Turns active users' histories into RecCoTs and vectors through Triton, and writes them by shards of users.

    What lies there already is not done again: a finished shard, and from the newest earlier date what follows from the
    same prompt and models.

    Args:
        settings: `trackrec.serving_config.FeaturesSettings`.
        triton: HOST:PORT of Triton's gRPC endpoint; replaces the one in `settings`.
        out: Where the partitions lie, gs://... or a folder.
        users: Table `users`.
        feature_shards: Table `feature_shards`: what was written.
        shard: Which of `shards` parts of the users to work on, from 0.
        shards: How many pods share the users; `commit_features` commits what all of them wrote.
    """
    from pathlib import Path

    from trackrec import serving_config, storage
    from trackrec.shards import Shard
    from trackrec.stages import features as stage

    stage.run(
        serving_config.FeaturesSettings.model_validate(settings | {"triton": triton, "out": out}),
        users=Path(users.path),
        feature_shards=Path(feature_shards.path),
        shard=Shard(shard, shards),
    )
    feature_shards.metadata.update(storage.numbers(feature_shards.path))
