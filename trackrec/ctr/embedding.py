"""From ids to the fields that every backbone takes; the RecCoT is one more of them, through the connector."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trackrec.ctr.layers import MLP, Lookup

# Number 0 of every id: none (padding, or no RecCoT). Number 1: one that the train split has too rarely, or not at all.
NONE = 0
UNKNOWN = 1


class Batch(NamedTuple):
    """Rows as numbers; the tables they point into are shared by all rows."""

    user: Tensor  # [B]
    item: Tensor  # [B]: row of the catalogue (`Tables`)
    history: Tensor  # [B, L]: earlier items, rows of the catalogue too, oldest first, NONE after the newest
    history_rating: Tensor  # [B, L]: how they were rated, or liked where there is no rating; NONE after the newest
    recot: Tensor  # [B]: row of `Tables.vectors`; NONE: the user has no RecCoT yet


class Tables(NamedTuple):
    """What rows share. The catalogue holds every item with its attributes, those that training never saw as well."""

    item: Tensor  # [catalogue]: the item's own number, UNKNOWN where the train split has too few rows of it
    item_attributes: Tensor  # [catalogue, A]: the attributes of each item, NONE after the last
    vectors: Tensor  # [RecCoTs + 1, width]: encoded RecCoTs (e^p, eq. 7); row NONE is not used


class Embedded(NamedTuple):
    """What a backbone sees of a batch."""

    fields: Tensor  # [B, F, D]: user, item, attributes, RecCoT (where the model has it), history
    first_order: Tensor  # [B]: the own weights of user, item, attributes and RecCoT, summed: a linear model's answer
    target: Tensor  # [B, D]: the item judged
    history: Tensor  # [B, L, D]: the earlier items, each with how it was rated
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
        self.user = Lookup(vocabulary.users, size)
        self.item = Lookup(vocabulary.items, size)
        self.attribute = Lookup(vocabulary.attributes, size)
        # A log whose train histories are empty tells of none.
        self.rating = Lookup(vocabulary.ratings, size) if vocabulary.ratings > UNKNOWN + 1 else None
        self.connector = Connector(vocabulary.vector_width, size + 1, hidden) if vocabulary.vector_width else None
        # The first-order weights apart: a table D wide is gathered in whole vector registers, one D + 1 wide is not.
        self.user_weight = Lookup(vocabulary.users, 1)
        self.item_weight = Lookup(vocabulary.items, 1)
        self.attribute_weight = Lookup(vocabulary.attributes, 1)

    def forward(self, batch: Batch, tables: Tables) -> Embedded:
        target, attributes = tables.item[batch.item], tables.item_attributes[batch.item]
        described, mask = attributes != NONE, batch.history != NONE
        items = self.item(torch.cat([target[:, None], tables.item[batch.history]], dim=1))
        # Split rather than sliced: a slice's gradient is padded with zeros and added, a split's is put together.
        item, history = items.split([1, batch.history.shape[1]], dim=1)
        if self.rating is not None:
            history = history + self.rating(batch.history_rating)
        found = [self.user(batch.user), item[:, 0], masked_mean(self.attribute(attributes), described)]
        first_order = self.user_weight(batch.user) + self.item_weight(target)
        first_order = first_order + masked_mean(self.attribute_weight(attributes), described)
        if self.connector is not None:
            recot = self.connector(tables.vectors[batch.recot], batch.recot != NONE)
            vector, weight = recot.split([recot.shape[1] - 1, 1], dim=1)
            found.append(vector)
            first_order = first_order + weight
        fields = torch.stack([*found, masked_mean(history, mask)], dim=1)
        return Embedded(fields, first_order[:, 0], item[:, 0], history, mask)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over the second last dimension of values [..., n, D] where mask [..., n]; 0 where it is nowhere."""
    # Cast and divided while small: a product of numbers with a bool mask is slow, forward and backward.
    weights = mask.to(values.dtype)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    return (values * weights[..., None]).sum(-2)
