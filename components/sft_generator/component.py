"""The stage `sft_generator` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import images


@dsl.component(base_image=images.released("sft_generator"), install_kfp_package=False)
def sft_generator(
    settings: dict,
    seed: int,
    contexts: Input[Dataset],
    recots: Input[Dataset],
    base_model: Input[Model],
    generator: Output[Model],
) -> None:
    """Distillation: fine-tunes the generator G on the teacher's RecCoTs (paper 3.5).

    Args:
        settings: `trackrec.config.SftSettings`.
        seed: The run's seed.
        contexts: Table `contexts`.
        recots: Table `recots`, the teacher's.
        base_model: The base model, Hugging Face layout.
        generator: G: full weights, or an adapter on the base model.
    """
    from pathlib import Path

    from trackrec import config, storage
    from trackrec.stages import sft_generator as stage

    stage.run(
        config.SftSettings.model_validate(settings),
        seed=seed,
        contexts=Path(contexts.path),
        recots=Path(recots.path),
        base_model=Path(base_model.path),
        generator=Path(generator.path),
    )
    generator.metadata.update(storage.numbers(generator.path))
