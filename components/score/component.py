"""The stage `score` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import images


@dsl.component(base_image=images.released("score"), install_kfp_package=False)
def score(
    settings: dict,
    examples: Input[Dataset],
    contexts: Input[Dataset],
    recots: Input[Dataset],
    base_model: Input[Model],
    validator: Input[Model],
    rewards: Output[Dataset],
    shard: int = 0,
    shards: int = 1,
) -> None:
    """Scores every sampled RecCoT by the validator: P(Yes), P(No) and the reward (eq. 1).

    Args:
        settings: `trackrec.config.ScoreSettings`.
        examples: Table `examples`.
        contexts: Table `contexts`.
        recots: Table `recots`, the samples.
        base_model: The base model.
        validator: V of the previous iteration.
        rewards: Table `rewards`.
        shard: Which of `shards` parts of the contexts to work on, from 0.
        shards: How many pods share the contexts; `gather` joins their tables.
    """
    from pathlib import Path

    from trackrec import config, storage
    from trackrec.shards import Shard
    from trackrec.stages import score as stage

    stage.run(
        config.ScoreSettings.model_validate(settings),
        examples=Path(examples.path),
        contexts=Path(contexts.path),
        recots=Path(recots.path),
        base_model=Path(base_model.path),
        validator=Path(validator.path),
        rewards=Path(rewards.path),
        shard=Shard(shard, shards),
    )
    rewards.metadata.update(storage.numbers(rewards.path))
