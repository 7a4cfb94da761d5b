"""The stage `evaluate` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.released("evaluate"), install_kfp_package=False)
def evaluate(
    settings: dict,
    seed: int,
    examples: Input[Dataset],
    contexts: Input[Dataset],
    base_model: Input[Model],
    validator: Input[Model],
    predictions: Output[Dataset],
    metrics: Output[Metrics],
    recots: Input[Dataset] = None,
    shuffled: bool = False,
) -> None:
    """Evaluates the validator on held-out examples: AUC, UAUC, ACC, LogLoss and calibration error, with slices.

    Without `recots` the prompt has no RecCoT; `shuffled` gives each example another user's RecCoT. Both are controls.

    Args:
        settings: `trackrec.config.EvaluateSettings`.
        seed: The run's seed.
        examples: Table `examples`.
        contexts: Table `contexts`.
        base_model: The base model.
        validator: V.
        predictions: Table `predictions`.
        metrics: `metrics.json`: metrics by slice.
        recots: Table `recots`, greedy; left out for the control.
        shuffled: Give each example another user's RecCoT.
    """
    from pathlib import Path

    from trackrec import config, storage
    from trackrec.stages import evaluate as stage

    stage.run(
        config.EvaluateSettings.model_validate(settings),
        seed=seed,
        examples=Path(examples.path),
        contexts=Path(contexts.path),
        base_model=Path(base_model.path),
        validator=Path(validator.path),
        predictions=Path(predictions.path),
        metrics=Path(metrics.path),
        recots=Path(recots.path) if recots else None,
        shuffled=shuffled,
    )
    predictions.metadata.update(storage.numbers(predictions.path))
    metrics.metadata.update(storage.numbers(metrics.path))
