"""The stage `sdpo` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import images


@dsl.component(base_image=images.released("sdpo"), install_kfp_package=False)
def sdpo(
    settings: dict,
    seed: int,
    iteration: int,
    contexts: Input[Dataset],
    preferences: Input[Dataset],
    base_model: Input[Model],
    generator: Input[Model],
    aligned: Output[Model],
    task_config: dsl.TaskConfig,
) -> None:
    """Aligns the generator with the preferences by softmax-DPO (eq. 3-4).

    The reference is the generator it starts from, the previous iteration's.

    Args:
        settings: `trackrec.config.SdpoSettings`.
        seed: The run's seed.
        iteration: t of Algorithm 2, from 1.
        contexts: Table `contexts`.
        preferences: Table `preferences`.
        base_model: The base model.
        generator: G of the previous iteration.
        aligned: G of this iteration.
        task_config: What the nodes get where the stage asks for several; filled in by Kubeflow.
    """
    from pathlib import Path

    from components import nodes
    from trackrec import config, storage
    from trackrec.stages import sdpo as stage

    stage.run(
        config.SdpoSettings.model_validate(settings),
        seed=seed,
        iteration=iteration,
        contexts=Path(contexts.path),
        preferences=Path(preferences.path),
        base_model=Path(base_model.path),
        generator=Path(generator.path),
        aligned=Path(aligned.path),
        launch=nodes.launcher("sdpo", task_config),
    )
    aligned.metadata.update(storage.numbers(aligned.path))
