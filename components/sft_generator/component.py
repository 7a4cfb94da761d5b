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
    task_config: dsl.TaskConfig,
) -> None:
    """Distillation: fine-tunes the generator G on the teacher's RecCoTs (paper 3.5).

    Args:
        settings: `trackrec.config.SftSettings`.
        seed: The run's seed.
        contexts: Table `contexts`.
        recots: Table `recots`, the teacher's.
        base_model: The base model, Hugging Face layout.
        generator: G: full weights, or an adapter on the base model.
        task_config: What the nodes get where the stage asks for several; filled in by Kubeflow.
    """
    from pathlib import Path

    from components import nodes
    from trackrec import config, storage
    from trackrec.stages import sft_generator as stage

    stage.run(
        config.SftSettings.model_validate(settings),
        seed=seed,
        contexts=Path(contexts.path),
        recots=Path(recots.path),
        base_model=Path(base_model.path),
        generator=Path(generator.path),
        launch=nodes.launcher("sft_generator", task_config),
    )
    generator.metadata.update(storage.numbers(generator.path))
