"""The stage `contexts` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components import images


@dsl.component(base_image=images.released("contexts"), install_kfp_package=False)
def contexts(
    settings: dict,
    data: dict,
    seed: int,
    interactions: Input[Dataset],
    items: Input[Dataset],
    contexts: Output[Dataset],
    examples: Output[Dataset],
) -> None:
    """Turns histories into contexts, one for each distinct history as rendered, and the examples that use them.

    A context is the paper's u_i, an example (u_i, i_i, y_i). No context holds its example's target or anything later.

    Args:
        settings: `trackrec.config.ContextsSettings`.
        data: `trackrec.data_config.DataSettings`.
        seed: The run's seed.
        interactions: Table `interactions`.
        items: Table `items`.
        contexts: Table `contexts`.
        examples: Table `examples`.
    """
    from pathlib import Path

    from components.sparkjob import served
    from trackrec import config, data_config, storage
    from trackrec.stages import contexts as stage

    with served(data_config.DataSettings.model_validate(data)) as engine:
        stage.run(
            config.ContextsSettings.model_validate(settings),
            engine,
            seed=seed,
            interactions=Path(interactions.path),
            items=Path(items.path),
            contexts=Path(contexts.path),
            examples=Path(examples.path),
        )
    contexts.metadata.update(storage.numbers(contexts.path))
    examples.metadata.update(storage.numbers(examples.path))
