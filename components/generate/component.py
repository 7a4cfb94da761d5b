"""The stage `generate` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import images


@dsl.component(base_image=images.released("generate"), install_kfp_package=False)
def generate(
    settings: dict,
    splits: list,
    examples: Input[Dataset],
    contexts: Input[Dataset],
    base_model: Input[Model],
    generator: Input[Model],
    recots: Output[Dataset],
    shard: int = 0,
    shards: int = 1,
) -> None:
    """Writes one RecCoT a context by greedy decoding (paper 3.3).

    Args:
        settings: `trackrec.config.DecodingSettings`.
        splits: Whose examples' contexts get a RecCoT.
        examples: Table `examples`.
        contexts: Table `contexts`.
        base_model: The base model.
        generator: G.
        recots: Table `recots`, one row a context.
        shard: Which of `shards` parts of the contexts to work on, from 0.
        shards: How many pods share the contexts; `gather` joins their tables.
    """
    from pathlib import Path

    from trackrec import config, storage
    from trackrec.shards import Shard
    from trackrec.stages import generate as stage

    stage.run(
        config.DecodingSettings.model_validate(settings),
        splits=splits,
        examples=Path(examples.path),
        contexts=Path(contexts.path),
        base_model=Path(base_model.path),
        generator=Path(generator.path),
        recots=Path(recots.path),
        shard=Shard(shard, shards),
    )
    recots.metadata.update(storage.numbers(recots.path))
