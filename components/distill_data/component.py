"""The stage `distill_data` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components import images


@dsl.component(base_image=images.released("distill_data"), install_kfp_package=False)
def distill_data(
    settings: dict,
    seed: int,
    contexts: Input[Dataset],
    recots: Output[Dataset],
) -> None:
    """Gets a teacher's RecCoTs for a sampled share of the train contexts (paper 3.5).

    The teacher is an OpenAI-compatible endpoint, its key an environment variable, or recorded RecCoTs from a file.

    Args:
        settings: `trackrec.config.DistillDataSettings`.
        seed: The run's seed.
        contexts: Table `contexts`.
        recots: Table `recots`, the teacher's.
    """
    from pathlib import Path

    from trackrec import config, storage
    from trackrec.stages import distill_data as stage

    stage.run(
        config.DistillDataSettings.model_validate(settings),
        seed=seed,
        contexts=Path(contexts.path),
        recots=Path(recots.path),
    )
    recots.metadata.update(storage.numbers(recots.path))
