"""From ids to the fields that every backbone takes; the RecCoT is one more of them, through the connector."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trackrec.ctr.layers import MLP

# Number 0 of every id: none (padding, or no RecCoT). Number 1: one that the train split has too rarely, or not at all.
NONE = 0
UNKNOWN = 1


class Batch(NamedTuple):
    """Rows as numbers; the tables they point into are shared by all rows."""

    user: Tensor  # [B]
    item: Tensor  # [B]: row of the catalogue (`Tables`)
    history: Tensor  # [B, L]: earlier items, rows of the catalogue too, oldest first, NONE after the newest
    history_rating: Tensor  # [B, L]: how they were rated, NONE where there is none
    recot: Tensor  # [B]: row of `Tables.vectors`; NONE: the user has no RecCoT yet


class Tables(NamedTuple):
    """What rows share. The catalogue holds every item with its attributes, those that training never saw as well."""

    item: Tensor  # [catalogue]: the item's own number, UNKNOWN where the train split has too few rows of it
    item_attributes: Tensor  # [catalogue, A]: the attributes of each item, NONE after the last
    vectors: Tensor  # [RecCoTs + 1, width]: encoded RecCoTs (e^p, eq. 7); row NONE is not used


class Embedded(NamedTuple):
    """What a backbone sees of a batch."""

    fields: Tensor  # [B, F, D]: user, item, attributes, history, RecCoT
    first_order: Tensor  # [B]: the sum of the fields' own weights, what a linear model would answer
    target: Tensor  # [B, 2 D]: the item judged
    history: Tensor  # [B, L, 2 D]: the earlier items, in the same space, with their ratings
    mask: Tensor  # bool [B, L]: where the history has an item


@dataclass(frozen=True)
class Vocabulary:
    """How many numbers of its own each kind has, NONE and UNKNOWN included, and the width of a RecCoT's vector.

    `vector_width` 0: the model has no RecCoT field.
    """

    users: int
    items: int
    attributes: int
    ratings: int
    vector_width: int


class Connector(nn.Module):
    """M: the RecCoT's vector from the encoder's space to a field's (paper 3.6): [B, width] to [B, D]."""

    def __init__(self, width: int, size: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.mlp = MLP(width, hidden)
        self.out = nn.Linear(hidden[-1], size)
        # What stands for a RecCoT where the user has none: learned.
        self.missing = nn.Parameter(torch.randn(size) * 0.01)

    def forward(self, vectors: Tensor, present: Tensor) -> Tensor:
        """
        Args:
            present: bool [B].
        """
        return torch.where(present[:, None], self.out(self.mlp(vectors)), self.missing)


class FieldEmbedding(nn.Module):
    """x and M(e^p) of eq. 8: the fields of a batch.

    Args:
        size: D, of a field.
        hidden: the connector's hidden layers.
    """

    def __init__(self, vocabulary: Vocabulary, size: int, hidden: Sequence[int] = (64,)) -> None:
        super().__init__()
        self.user = _table(vocabulary.users, size)
        self.item = _table(vocabulary.items, size)
        self.attribute = _table(vocabulary.attributes, size)
        self.rating = _table(vocabulary.ratings, 2 * size)
        self.user_weight = _table(vocabulary.users, 1)
        self.item_weight = _table(vocabulary.items, 1)
        self.attribute_weight = _table(vocabulary.attributes, 1)
        self.connector = Connector(vocabulary.vector_width, size, hidden) if vocabulary.vector_width else None
        self.recot_weight = nn.Linear(size, 1)

    def forward(self, batch: Batch, tables: Tables) -> Embedded:
        target, history = self._items(batch.item, tables), self._items(batch.history, tables)
        mask = batch.history != NONE
        history = history + self.rating(batch.history_rating)
        item, attributes = target.chunk(2, dim=-1)
        fields = [self.user(batch.user), item, attributes, masked_mean(history, mask).chunk(2, dim=-1)[0]]
        own = tables.item_attributes[batch.item]
        weights = masked_mean(self.attribute_weight(own), own != NONE)
        first_order = (self.user_weight(batch.user) + self.item_weight(tables.item[batch.item]) + weights)[:, 0]
        if self.connector is not None:
            recot = self.connector(tables.vectors[batch.recot], batch.recot != NONE)
            fields.append(recot)
            first_order = first_order + self.recot_weight(recot)[:, 0]
        return Embedded(torch.stack(fields, dim=1), first_order, target, history, mask)

    def _items(self, items: Tensor, tables: Tables) -> Tensor:
        """[..., 2 D] of items [...]: the item's own vector, then the mean of its attributes'."""
        attributes = tables.item_attributes[items]
        return torch.cat(
            [self.item(tables.item[items]), masked_mean(self.attribute(attributes), attributes != NONE)], dim=-1
        )


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over the second last dimension of values [..., n, D] where mask [..., n]; 0 where it is nowhere."""
    return (values * mask[..., None]).sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1)


def _table(numbers: int, size: int) -> nn.Embedding:
    table = nn.Embedding(numbers, size)
    nn.init.normal_(table.weight, std=0.01)
    return table
