"""The honest protocol: hyper-parameters chosen on valid with one budget for all, then several seeds of the best.

With and without the RecCoT, and for every control, the same grid is searched under the same seed and number of epochs.
The measured rows are answered once, at the end.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from trackrec.config import Backbone, CtrGrid, TrainCtrSettings
from trackrec.ctr.features import Dataset
from trackrec.ctr.stack import Hyper
from trackrec.ctr.training import Trained, train
from trackrec.evaluation.rankings import Point

# The split that is measured; valid chooses, train trains.
MEASURED = "test"


@dataclass(frozen=True)
class Found:
    """The search, in the grid's order; the chosen point; and one trained model a seed at that point."""

    searched: list[Point]
    chosen: Point
    models: list[Trained]


def run(
    data: Dataset,
    backbone: Backbone,
    settings: TrainCtrSettings,
    seed: int,
    progress: Callable[[str, int], None] = lambda what, epoch: None,
) -> Found:
    """
    Args:
        seed: the models' seeds are `seed` to `seed + settings.seeds - 1`; the search uses the first.
        progress: called after each epoch with what is being trained.

    Raises:
        ValueError: as `train`.
        FloatingPointError: every point of the grid, or a seed at the chosen one, ended in losses that are no numbers.
    """
    grid = settings.grid
    shapes = list(itertools.product(grid.embedding_size, grid.batch_size))
    searched = []
    if len(shapes) > 1 or len(_points(grid, seed)) > 1:
        for number, (size, batch_size) in enumerate(shapes, start=1):
            # Models of one shape differ in numbers alone, so they train together.
            models = _train(
                data, backbone, settings, _points(grid, seed), size, batch_size, progress,
                f"search {number}/{len(shapes)}",
            )  # fmt: skip
            searched += [_point(one, size, batch_size) for one in models]
        chosen = max(searched, key=lambda point: point.valid_auc)
        size, batch_size = chosen.embedding_size, chosen.batch_size
        best = Hyper(seed, chosen.learning_rate, chosen.dropout, chosen.l2)
    else:  # there is nothing to choose
        [(size, batch_size)], [best] = shapes, _points(grid, seed)
    hypers = [replace(best, seed=seed + k) for k in range(settings.seeds)]
    trained = _train(data, backbone, settings, hypers, size, batch_size, progress, "seeds", measured=True)
    if any(model.valid_auc < 0 for model in trained):
        raise FloatingPointError(
            f"{backbone}: the loss is no number at learning rate {best.learning_rate:g}; lower "
            "`train_ctr.grid.learning_rate`"
        )
    if not searched:
        searched = [_point(trained[0], size, batch_size)]
        chosen = searched[0]
    return Found(searched, chosen, trained)


def _point(model: Trained, size: int, batch_size: int) -> Point:
    return Point(
        embedding_size=size,
        batch_size=batch_size,
        learning_rate=model.hyper.learning_rate,
        dropout=model.hyper.dropout,
        l2=model.hyper.l2,
        valid_auc=model.valid_auc,
    )


def _points(grid: CtrGrid, seed: int) -> list[Hyper]:
    return [
        Hyper(seed, learning_rate, dropout, l2)
        for learning_rate, dropout, l2 in itertools.product(grid.learning_rate, grid.dropout, grid.l2)
    ]


def _train(
    data: Dataset,
    backbone: Backbone,
    settings: TrainCtrSettings,
    hypers: list[Hyper],
    size: int,
    batch_size: int,
    progress: Callable[[str, int], None],
    what: str,
    *,
    measured: bool = False,
) -> list[Trained]:
    return train(
        data,
        backbone,
        hypers,
        size=size,
        hidden=tuple(settings.hidden),
        batch_size=batch_size,
        epochs=settings.epochs,
        patience=settings.patience,
        min_steps=settings.min_steps,
        score=data.of_split(MEASURED) if measured else None,
        progress=lambda epoch: progress(what, epoch),
    )
