"""The stage `encode` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import images


@dsl.component(base_image=images.released("encode"), install_kfp_package=False)
def encode(
    settings: dict,
    recots: Input[Dataset],
    contexts: Input[Dataset],
    encoder: Input[Model],
    vectors: Output[Dataset],
    of_history: bool = False,
    shard: int = 0,
    shards: int = 1,
) -> None:
    """Turns RecCoTs into dense vectors with a BERT-family encoder (eq. 7), one a context.

    Args:
        settings: `trackrec.config.EncodeSettings`.
        recots: Table `recots`; of a context's several, the mean is taken.
        contexts: Table `contexts`.
        encoder: The encoder, in Hugging Face layout.
        vectors: Table `vectors`.
        of_history: Encode the raw history that each RecCoT was written from in its place: a control.
        shard: Which of `shards` parts of the contexts to work on, from 0.
        shards: How many pods share the contexts; `gather` joins their tables.
    """
    from pathlib import Path

    from trackrec import config, storage
    from trackrec.shards import Shard
    from trackrec.stages import encode as stage

    stage.run(
        config.EncodeSettings.model_validate(settings),
        recots=Path(recots.path),
        contexts=Path(contexts.path),
        encoder=Path(encoder.path),
        vectors=Path(vectors.path),
        of_history=of_history,
        shard=Shard(shard, shards),
    )
    vectors.metadata.update(storage.numbers(vectors.path))
