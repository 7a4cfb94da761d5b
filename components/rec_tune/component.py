"""The stage `rec_tune` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import images


@dsl.component(base_image=images.released("rec_tune"), install_kfp_package=False)
def rec_tune(
    settings: dict,
    seed: int,
    iteration: int,
    examples: Input[Dataset],
    contexts: Input[Dataset],
    base_model: Input[Model],
    validator: Input[Model],
    tuned: Output[Model],
    recots: Input[Dataset] = None,
    task_config: dsl.TaskConfig = None,
) -> None:
    """Rec-tuning: fine-tunes the validator on the train examples with the generator's RecCoTs (eq. 5-6).

    Without `recots` it trains the no-RecCoT control of Figure 1.

    Args:
        settings: `trackrec.config.RecTuneSettings`.
        seed: The run's seed.
        iteration: t of Algorithm 2, from 1.
        examples: Table `examples`.
        contexts: Table `contexts`.
        base_model: The base model.
        validator: V to start from.
        tuned: V of this iteration.
        recots: Table `recots`, greedy; left out for the control.
        task_config: What the nodes get where the stage asks for several; filled in by Kubeflow.
    """
    from pathlib import Path

    from components import nodes
    from trackrec import config, storage
    from trackrec.stages import rec_tune as stage

    stage.run(
        config.RecTuneSettings.model_validate(settings),
        seed=seed,
        iteration=iteration,
        examples=Path(examples.path),
        contexts=Path(contexts.path),
        base_model=Path(base_model.path),
        validator=Path(validator.path),
        tuned=Path(tuned.path),
        recots=Path(recots.path) if recots else None,
        launch=nodes.launcher("rec_tune", task_config),
    )
    tuned.metadata.update(storage.numbers(tuned.path))
