"""CTR training: every model of one shape together, each stopped by its own valid AUC."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from trackrec.ctr.backbones import BACKBONES
from trackrec.ctr.embedding import Batch, FieldEmbedding, Tables, Vocabulary
from trackrec.ctr.features import Dataset
from trackrec.ctr.stack import Hyper, Stack

# Rows predicted at once: bounds memory.
_CHUNK = 4096
# user, item, attributes, history
_FIELDS = 4


class Ranker(nn.Module):
    """ŷ = R(x, M(e^p)) (eq. 8): the fields, then a backbone.

    Args:
        size: D, of a field. hidden: the backbone's layers.
    """

    def __init__(self, backbone: str, vocabulary: Vocabulary, size: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(vocabulary, size)
        self.backbone = BACKBONES[backbone](_FIELDS + (vocabulary.vector_width > 0), size, hidden)

    def forward(self, batch: Batch, tables: Tables) -> Tensor:
        """[B] logits."""
        logits: Tensor = self.backbone(self.embedding(batch, tables))
        return logits


@dataclass
class Trained:
    """One model at its best epoch by valid AUC."""

    hyper: Hyper
    valid_auc: float = -1.0
    epoch: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    # P(liked) of the valid and the test rows, in their order.
    valid: np.ndarray = field(default_factory=lambda: np.empty(0))
    test: np.ndarray = field(default_factory=lambda: np.empty(0))


def build(backbone: str, vocabulary: Vocabulary, size: int, hidden: tuple[int, ...], seed: int) -> Ranker:
    """A new model; its initial weights follow from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Ranker(backbone, vocabulary, size, hidden)


def train(
    data: Dataset,
    backbone: str,
    hypers: Sequence[Hyper],
    *,
    size: int,
    hidden: tuple[int, ...],
    batch_size: int,
    epochs: int,
    patience: int,
    progress: Callable[[int], None] = lambda epoch: None,
) -> list[Trained]:
    """Trains one model a `hypers`; what a model becomes does not depend on the others.

    Stops when no model has got better on valid for `patience` epochs; the test split is predicted at each model's best
    epoch and decides nothing.

    Raises:
        ValueError: the valid split lacks one of the classes.
        FloatingPointError: a loss is no number.
    """
    parts = {split: data.of_split(split) for split in ("train", "valid", "test")}
    valid_labels = data.labels[parts["valid"]].numpy()
    if len(np.unique(valid_labels)) < 2:
        raise ValueError("the valid split must have liked and disliked rows: the best epoch is chosen by its AUC")
    stack = Stack([build(backbone, data.vocabulary, size, hidden, hyper.seed) for hyper in hypers], hypers)
    orders = [torch.Generator().manual_seed(hyper.seed) for hyper in hypers]
    found = [Trained(hyper) for hyper in hypers]
    waiting = [0] * len(hypers)
    rows = parts["train"]
    for epoch in range(1, epochs + 1):
        shuffled = torch.stack([rows[torch.randperm(len(rows), generator=order)] for order in orders])
        for numbers in shuffled.split(batch_size, dim=1):
            losses = stack.step(Batch(*(part[numbers] for part in data.rows)), data.tables, data.labels[numbers])
        if not losses.isfinite().all():
            raise FloatingPointError(f"{backbone}: a loss is no number in epoch {epoch}; lower the learning rate")
        scores = _predict(stack, data, parts["valid"])
        better = []
        for number, model in enumerate(found):
            if waiting[number] >= patience:
                continue
            auc = float(roc_auc_score(valid_labels, scores[number]))
            waiting[number] += 1
            if auc > model.valid_auc:
                waiting[number] = 0
                model.valid_auc, model.epoch, model.valid = auc, epoch, scores[number]
                model.weights = stack.weights_of(number)
                better.append(number)
        if better:
            tested = _predict(stack, data, parts["test"])
            for number in better:
                found[number].test = tested[number]
        progress(epoch)
        if all(epochs_waited >= patience for epochs_waited in waiting):
            break
    return found


def _predict(stack: Stack, data: Dataset, rows: Tensor) -> np.ndarray:
    parts = [
        stack.predict(Batch(*(part[numbers] for part in data.rows)), data.tables) for numbers in rows.split(_CHUNK)
    ]
    return torch.cat(parts, dim=1).double().numpy() if parts else np.empty((len(stack.seeds), 0))
