"""A ranker (`trackrec.ctr.ranker`) for one user and many candidates at a time.

What depends on the user or on the item alone is computed once: an item's fields when the model is loaded, a RecCoT's
field when its table is (`trackrec.serving.feature_table`), a user's fields once a request. What is left for each
candidate is the backbone. The scores are those of `Ranker` on the same rows.
"""

import warnings
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from trackrec.ctr import ranker as rankers
from trackrec.ctr.embedding import NONE, UNKNOWN, Embedded, FieldEmbedding, masked_mean
from trackrec.ctr.features import Numbering
from trackrec.data import schema

_FIRST = UNKNOWN + 1
# Candidates in one pass: more are not faster, and of each there are L earlier items in memory, some layers wide.
_CHUNK = 2000


class Users(NamedTuple):
    """What a feature table knows of users, one row each."""

    history: Tensor  # int32 [U, L]: rows of the catalogue, oldest first, NONE after the newest
    history_rating: Tensor  # int32 [U, L]
    recot: Tensor  # float32 [U, D + 1]: the connector's output; [U, 0] where the ranker has no such field


class Scorer:
    """
    Args:
        directory: a ranker's, with the table `items` beside it: `ranker/`, `items.parquet`.
        seed: which of the ranker's models.

    Raises:
        LookupError: the ranker was not trained under that seed.
        SchemaError: `items.parquet` lacks a column.
    """

    def __init__(self, directory: Path, seed: int) -> None:
        self.config, model = rankers.load(directory / "ranker", seed)
        path = schema.path_of(directory, "items")
        schema.check(pq.read_schema(path), "items", str(path))
        items = pq.read_table(path, columns=["item_id", "attributes"])
        self.numbering = Numbering(self.config.names, sorted(items["item_id"].to_pylist()))
        embedding = model.embedding
        self.connector = embedding.connector
        # By what a request holds: bytes.
        self._users = {name.encode(): k for k, name in enumerate(self.config.names.users, start=_FIRST)}
        self._items = {name.encode(): k for k, name in enumerate(self.numbering.catalogue, start=_FIRST)}
        with torch.inference_mode(False), torch.no_grad():
            own, attributes = (
                torch.from_numpy(table) for table in (self.numbering.own_items(), self.numbering.item_attributes(items))
            )
            self._program = _compiled(_Rows(model, own, attributes), self.config)

    @property
    def length(self) -> int:
        """L, of a user's history."""
        return self.config.history_length

    @property
    def reads_recot(self) -> bool:
        return self.connector is not None

    def no_one(self) -> Users:
        """One row for a user of whom nothing is known: no history, and the RecCoT's learned stand-in."""
        empty = torch.zeros(1, self.length, dtype=torch.int32)
        with torch.no_grad():
            recot = torch.zeros(1, 0) if self.connector is None else self.connector.missing[None].clone()
        return Users(empty, empty, recot)

    def recots(self, vectors: np.ndarray, present: np.ndarray) -> np.ndarray:
        """The connector's output: float32 [R, D + 1] from vectors [R, width] and whether a row has one, bool [R]."""
        assert self.connector is not None
        with torch.inference_mode():
            found: np.ndarray = self.connector(torch.from_numpy(vectors), torch.from_numpy(present)).numpy()
        return found

    def score(self, user_ids: Sequence[bytes], users: Users, item_ids: Sequence[Sequence[bytes]]) -> list[np.ndarray]:
        """P(liked) of each user's candidates, in their order: float32 [candidates].

        Args:
            user_ids: [n], UTF-8; `users` has their rows in this order.
            item_ids: each user's candidates, UTF-8.
        """
        numbers = [list(map(self._items.get, ids, repeat(UNKNOWN))) for ids in item_ids]
        counts = np.array([len(ids) for ids in numbers])
        user = torch.tensor(list(map(self._users.get, user_ids, repeat(UNKNOWN))))
        item = torch.tensor([number for ids in numbers for number in ids])
        owner = np.repeat(np.arange(len(counts)), counts)
        scores = np.empty(len(owner), dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, len(owner), _CHUNK):
                rows = slice(start, start + _CHUNK)
                # Only the users of these rows: neighbours.
                first, last = owner[rows][0], owner[rows][-1] + 1
                own = torch.from_numpy(owner[rows] - first)
                known = (part[first:last] for part in users)
                scores[rows] = self._program(user[first:last], *known, item[rows], own).numpy()
        return np.split(scores, np.cumsum(counts)[:-1])


class _Rows(nn.Module):
    """The fields of `FieldEmbedding`, put together from what is known of users and of items, then the backbone."""

    user: Tensor  # [users, D]
    user_weight: Tensor  # [users]
    rating: Tensor  # [ratings, D]
    # By rows of the catalogue: the item, the mean of its attributes, and the sum of their first-order weights.
    item: Tensor  # [catalogue, D]
    described: Tensor  # [catalogue, D]
    item_weight: Tensor  # [catalogue]

    def __init__(self, model: rankers.Ranker, own: Tensor, attributes: Tensor) -> None:
        super().__init__()
        embedding = model.embedding
        described = attributes != NONE
        rating = (
            embedding.rating.weight if embedding.rating is not None else torch.zeros(1, embedding.user.embedding_dim)
        )
        tables = {
            "user": embedding.user.weight,
            "user_weight": embedding.user_weight.weight[:, 0],
            "rating": rating,
            "item": embedding.item.weight[own],
            "described": masked_mean(embedding.attribute.weight[attributes], described),
            "item_weight": _first_order(embedding, own, attributes),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.detach().clone())
        self.backbone = model.backbone
        self.rated, self.reads = embedding.rating is not None, embedding.connector is not None

    def forward(
        self, user: Tensor, history: Tensor, history_rating: Tensor, recot: Tensor, item: Tensor, owner: Tensor
    ) -> Tensor:
        """
        Args:
            user: [n]; history, history_rating: [n, L]; recot: [n, D + 1].
            item: [B], rows of the catalogue; owner: [B], rows of the users.

        Returns: [B], P(liked).
        """
        mask = history != NONE
        earlier = self.item[history]
        if self.rated:
            earlier = earlier + self.rating[history_rating]
        weight = self.user_weight[user]
        of_user = [self.user[user], masked_mean(earlier, mask)]
        if self.reads:
            vector, own_weight = recot.split([recot.shape[1] - 1, 1], dim=1)
            of_user.insert(1, vector)
            weight = weight + own_weight[:, 0]
        target = self.item[item]
        # The order of `FieldEmbedding`: user, item, attributes, RecCoT, history.
        known = torch.stack(of_user, dim=1)[owner]
        fields = torch.cat([known[:, :1], target[:, None], self.described[item][:, None], known[:, 1:]], dim=1)
        first_order = weight[owner] + self.item_weight[item]
        logits: Tensor = self.backbone(Embedded(fields, first_order, target, earlier[owner], mask[owner]))
        return logits.sigmoid()


def _first_order(embedding: FieldEmbedding, own: Tensor, attributes: Tensor) -> Tensor:
    """[catalogue]: an item's own weight and the mean of its attributes'."""
    described = masked_mean(embedding.attribute_weight.weight[attributes], attributes != NONE)
    return (embedding.item_weight.weight[own] + described)[:, 0]


def _compiled(rows: _Rows, config: rankers.RankerConfig) -> torch.jit.ScriptModule:
    """The same kernels without the Python between them, which takes longer than they do."""
    users, candidates, length = 3, 7, config.history_length
    numbers = torch.ones(users, length, dtype=torch.int32)
    width = config.embedding_size + 1 if rows.reads else 0
    example = (
        torch.ones(users, dtype=torch.int64), numbers, numbers, torch.zeros(users, width),
        torch.ones(candidates, dtype=torch.int64), torch.arange(candidates) % users,
    )  # fmt: skip
    with warnings.catch_warnings():
        # It warns of each size that becomes a constant: D, L and the fields are, rows are not (its test scores others).
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        program = torch.jit.freeze(torch.jit.trace(rows.eval(), example, check_trace=False))
    return program
