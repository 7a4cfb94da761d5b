"""CTR training: every model of one shape together, each stopped by its own valid AUC."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from trackrec.config import Backbone
from trackrec.ctr.features import Dataset
from trackrec.ctr.ranker import build
from trackrec.ctr.stack import Hyper, Stack

# Rows predicted at once: bounds memory.
_CHUNK = 1024


@dataclass
class Trained:
    """One model at its best epoch by valid AUC."""

    hyper: Hyper
    valid_auc: float
    epoch: int
    weights: dict[str, Tensor]
    scores: np.ndarray  # float64: P(liked) of the rows asked for, in their order


def train(
    data: Dataset,
    backbone: Backbone,
    hypers: Sequence[Hyper],
    *,
    size: int,
    hidden: tuple[int, ...],
    batch_size: int,
    epochs: int,
    patience: int,
    min_steps: int = 0,
    score: Tensor | None = None,
    progress: Callable[[int], None] = lambda epoch: None,
) -> list[Trained]:
    """Trains one model a `hypers`; what a model becomes does not depend on the others.

    Stops when no model has got better on valid for `patience` epochs, and goes back to each model's best epoch. A model
    whose loss is no number any more ends at the epoch before; one that never had an epoch has a valid AUC of -1.

    Args:
        min_steps: optimiser steps before patience counts: near its first weights a model may stand still.
        score: numbers of the rows to answer at the end; none by default. They decide nothing.
        progress: called after each epoch.

    Raises:
        ValueError: the valid split lacks one of the classes.
    """
    rows, valid = data.of_split("train"), data.of_split("valid")
    valid_labels = data.labels[valid].numpy()
    if len(np.unique(valid_labels)) < 2:
        raise ValueError("the valid split must have liked and disliked rows: the best epoch is chosen by its AUC")
    models = [build(backbone, data.vocabulary, size, hidden, hyper.seed) for hyper in hypers]
    per_epoch = math.ceil(len(rows) / batch_size)
    at_least = max(per_epoch * (1 + patience), min_steps)
    stack = Stack(models, hypers, steps=min(per_epoch * epochs, at_least))
    orders = [torch.Generator().manual_seed(hyper.seed) for hyper in hypers]
    best, best_epoch, waiting = ([initial] * len(hypers) for initial in (-1.0, 0, 0))
    ended = [False] * len(hypers)
    for epoch in range(1, epochs + 1):
        shuffled = torch.stack([rows[torch.randperm(len(rows), generator=order)] for order in orders])
        for numbers in shuffled.split(batch_size, dim=1):
            stack.step(data.batch(numbers), data.tables, data.labels[numbers])
        better = []
        for model, scores in enumerate(_predict(stack, data, valid)):
            # A weight that is no number makes every later score none.
            ended[model] |= not np.isfinite(scores).all()
            if ended[model]:
                continue
            auc = float(roc_auc_score(valid_labels, scores))
            if auc > best[model]:
                best[model], best_epoch[model], waiting[model] = auc, epoch, 0
                better.append(model)
            elif stack.steps >= min_steps:
                waiting[model] += 1
                ended[model] = waiting[model] >= patience
        stack.keep(better)
        progress(epoch)
        if all(ended):
            break
    stack.restore()
    answers = np.empty((len(hypers), 0)) if score is None else _predict(stack, data, score)
    return [
        Trained(hyper, best[model], int(best_epoch[model]), stack.weights_of(model), answers[model])
        for model, hyper in enumerate(hypers)
    ]


def _predict(stack: Stack, data: Dataset, rows: Tensor) -> np.ndarray:
    """float64 [M, rows]."""
    parts = [stack.predict(data.batch(numbers), data.tables) for numbers in rows.split(_CHUNK)]
    return torch.cat(parts, dim=1).double().numpy() if parts else np.empty((len(stack.seeds), 0))
