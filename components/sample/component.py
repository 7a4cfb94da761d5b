"""The stage `sample` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import images


@dsl.component(base_image=images.released("sample"), install_kfp_package=False)
def sample(
    settings: dict,
    seed: int,
    iteration: int,
    contexts: Input[Dataset],
    base_model: Input[Model],
    generator: Input[Model],
    recots: Output[Dataset],
    shard: int = 0,
    shards: int = 1,
) -> None:
    """Samples N RecCoTs a train context from the generator (Algorithm 1).

    Each sample's seed derives from the run's seed, the iteration, the context and the sample's number.

    Args:
        settings: `trackrec.config.SampleSettings`.
        seed: The run's seed.
        iteration: t of Algorithm 2, from 1.
        contexts: Table `contexts`.
        base_model: The base model.
        generator: G of the previous iteration.
        recots: Table `recots`, N rows a context.
        shard: Which of `shards` parts of the contexts to work on, from 0.
        shards: How many pods share the contexts; `gather` joins their tables.
    """
    from pathlib import Path

    from trackrec import config, storage
    from trackrec.shards import Shard
    from trackrec.stages import sample as stage

    stage.run(
        config.SampleSettings.model_validate(settings),
        seed=seed,
        iteration=iteration,
        contexts=Path(contexts.path),
        base_model=Path(base_model.path),
        generator=Path(generator.path),
        recots=Path(recots.path),
        shard=Shard(shard, shards),
    )
    recots.metadata.update(storage.numbers(recots.path))
