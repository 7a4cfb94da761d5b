"""The stage `train_ctr` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import ClassificationMetrics, Dataset, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.released("train_ctr"), install_kfp_package=False)
def train_ctr(
    settings: dict,
    backbone: str,
    feature: str,
    seed: int,
    interactions: Input[Dataset],
    items: Input[Dataset],
    examples: Input[Dataset],
    contexts: Input[Dataset],
    trained: Output[Model],
    predictions: Output[Dataset],
    metrics: Output[Metrics],
    roc: Output[ClassificationMetrics],
    vectors: Input[Dataset] = None,
) -> None:
    """Trains one CTR backbone with or without the RecCoT as a field (eq. 8): the grid on valid, then several seeds.

    Args:
        settings: `trackrec.config.TrainCtrSettings`.
        backbone: `autoint`, `deepfm`, `fignn`, `fibinet`, `dcn`, `din` or `dien`.
        feature: `none`, `recot`, or a control: `shuffled`, `random`, `history`.
        seed: The run's seed.
        interactions: Table `interactions`.
        items: Table `items`.
        examples: Table `examples`.
        contexts: Table `contexts`.
        trained: The model of each seed.
        predictions: Table `ranked`.
        metrics: `metrics.json`: the search, and each seed's metrics by slice.
        roc: The ROC curve of the seeds' mean score.
        vectors: Table `vectors`; left out for the feature `none`.
    """
    from pathlib import Path

    from trackrec import config, storage
    from trackrec.evaluation import rankings
    from trackrec.stages import train_ctr as stage

    stage.run(
        config.TrainCtrSettings.model_validate(settings),
        backbone=backbone,
        feature=feature,
        seed=seed,
        interactions=Path(interactions.path),
        items=Path(items.path),
        examples=Path(examples.path),
        contexts=Path(contexts.path),
        encoded=Path(vectors.path) if vectors else None,
        trained=Path(trained.path),
        predictions=Path(predictions.path),
        metrics=Path(metrics.path),
    )
    for name, value in storage.numbers(metrics.path).items():
        metrics.log_metric(name, value)
    curve = rankings.read(Path(metrics.path)).roc
    if curve is not None:
        roc.log_roc_curve(curve.false_positive_rate, curve.true_positive_rate, curve.threshold)
    # The local runner's cache looks for a file, and the page draws the metadata.
    Path(roc.path).write_text("null" if curve is None else curve.model_dump_json(), encoding="utf-8")
