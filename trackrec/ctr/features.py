"""From the tables to the tensors of CTR training: numbers for ids, and each row's newest older RecCoT.

Rows keep the interactions' order. Only the train split says which ids get numbers of their own: one that it has fewer
than `min_rows` times, or not at all, is UNKNOWN, in training too, so that UNKNOWN is learned. An unknown item keeps its
attributes, an unknown user history and RecCoT. Where no train id is rare, UNKNOWN keeps its first weights.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from trackrec.ctr.embedding import NONE, UNKNOWN, Batch, Tables, Vocabulary

_FIRST = UNKNOWN + 1


@dataclass(frozen=True)
class Names:
    """What has a number of its own, in the order of the numbers, which begin after UNKNOWN."""

    users: list[str]
    items: list[str]
    attributes: list[str]
    ratings: list[float]
    # The labels of earlier items that have no rating, numbered after the ratings.
    unrated: list[int]


@dataclass(frozen=True)
class Numbering:
    """Ids to numbers: of `names` those that training knows, of `catalogue` every item there is (`Tables`).

    A catalogue that has grown since training numbers its new items too: they are UNKNOWN, with their attributes.
    """

    names: Names
    catalogue: list[str]  # sorted

    def users(self, column: pa.ChunkedArray | pa.Array) -> np.ndarray:
        """int64 [R]: numbers of `Vocabulary.users`."""
        return _lookup(column, self.names.users)

    def items(self, column: pa.ChunkedArray | pa.Array) -> np.ndarray:
        """int64 [R]: rows of the catalogue."""
        return _lookup(column, self.catalogue)

    def histories(self, column: pa.ChunkedArray | pa.Array, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each row's newest `length` earlier items the rows of the catalogue and the numbers of their ratings, each
        int64 [R, length], NONE after the newest."""
        return self._numbered(_Newest.of(column, length))

    def own_items(self) -> np.ndarray:
        """int64 [catalogue]: `Tables.item`."""
        return np.concatenate([[NONE, UNKNOWN], _lookup(pa.array(self.catalogue, pa.string()), self.names.items)])

    def item_attributes(self, items: pa.Table) -> np.ndarray:
        """int64 [catalogue, most]: `Tables.item_attributes`, from table `items`."""
        attributes = dict(zip(items["item_id"].to_pylist(), items["attributes"].to_pylist(), strict=True))
        number = {name: place for place, name in enumerate(self.names.attributes, start=_FIRST)}
        own = [[number[name] for name in attributes[item] or [] if name in number] for item in self.catalogue]
        table = np.full((len(own) + _FIRST, max(1, max(map(len, own), default=1))), NONE, dtype=np.int64)
        for place, numbers in enumerate(own, start=_FIRST):
            table[place, : len(numbers)] = numbers
        return table

    def _numbered(self, newest: "_Newest") -> tuple[np.ndarray, np.ndarray]:
        items, ratings = (np.full(newest.inside.shape, NONE, dtype=np.int64) for _ in range(2))
        items[newest.inside] = self.items(newest.item)
        values, labels = np.array(self.names.ratings), np.array(self.names.unrated)
        numbers = np.empty(len(newest.rating), dtype=np.int64)
        rated = ~np.isnan(newest.rating)
        numbers[rated] = _numbered(newest.rating[rated], values, _FIRST)
        numbers[~rated] = _numbered(newest.label[~rated], labels, _FIRST + len(values))
        ratings[newest.inside] = numbers
        return items, ratings


@dataclass(frozen=True)
class Dataset:
    """All rows as tensors, and what they share."""

    rows: Batch  # each [R] or [R, L]
    labels: Tensor  # float32 [R]
    split: np.ndarray  # text [R]; "" is of no split
    row_id: np.ndarray  # [R]
    users: np.ndarray  # text [R]
    user_train_rows: np.ndarray  # [R]: how often the whole train split has the row's user
    item_train_rows: np.ndarray  # [R]
    tables: Tables
    vocabulary: Vocabulary
    names: Names

    def of_split(self, split: str) -> Tensor:
        """The numbers of a split's rows."""
        return torch.from_numpy(np.flatnonzero(self.split == split))

    def batch(self, numbers: Tensor) -> Batch:
        """The rows of these numbers, in their shape and order."""
        flat = numbers.flatten()
        # Indexing with a tensor takes twice as long.
        return Batch(*(part.index_select(0, flat).unflatten(0, numbers.shape) for part in self.rows))


def dataset(
    interactions: pa.Table,
    items: pa.Table,
    *,
    history_length: int,
    min_rows: int,
    recot: np.ndarray,
    vectors: Tensor,
    max_train_rows: int | None = None,
) -> Dataset:
    """
    Args:
        interactions, items: the tables of those names.
        history_length: L, the newest so many earlier items of a row.
        recot: [R], each row's row of `vectors`, NONE where there is no RecCoT (`recot_of_rows`).
        vectors: float32 [RecCoTs + 1, width]; width 0 where the model has no RecCoT field.
        max_train_rows: only the newest so many train rows are trained on, and say which ids there are; the older are of
            no split, but count in `user_train_rows` and `item_train_rows`.

    Raises:
        ValueError: the train split is empty.
    """
    split = interactions["split"].to_numpy(zero_copy_only=False).astype(object)
    whole = split == "train"
    if max_train_rows is not None:
        rows = np.flatnonzero(whole)
        by_age = rows[np.argsort(interactions["timestamp"].to_numpy()[rows], kind="stable")]
        split[by_age[: max(0, len(rows) - max_train_rows)]] = ""
    train = split == "train"
    if not train.any():
        raise ValueError("the interactions have no row in split 'train': there is nothing to train on")
    users = _known(interactions["user_id"], train, min_rows)
    known_items = _known(interactions["item_id"], train, min_rows)
    newest = _Newest.of(interactions["history"], history_length)
    ratings, unrated = _ratings(newest, train)
    names = Names(users, known_items, _attributes(items, set(known_items)), ratings, unrated)
    numbering = Numbering(names, sorted(items["item_id"].to_pylist()))
    columns = (
        numbering.users(interactions["user_id"]),
        numbering.items(interactions["item_id"]),
        *numbering._numbered(newest),
        recot.astype(np.int64),
    )
    return Dataset(
        rows=Batch(*(torch.from_numpy(column) for column in columns)),
        labels=torch.from_numpy(interactions["label"].to_numpy().astype(np.float32)),
        split=split,
        row_id=interactions["row_id"].to_numpy(),
        users=interactions["user_id"].to_numpy(zero_copy_only=False),
        user_train_rows=_train_rows(interactions["user_id"], whole),
        item_train_rows=_train_rows(interactions["item_id"], whole),
        tables=Tables(
            torch.from_numpy(numbering.own_items()), torch.from_numpy(numbering.item_attributes(items)), vectors
        ),
        vocabulary=Vocabulary(
            users=len(users) + _FIRST,
            items=len(known_items) + _FIRST,
            attributes=len(names.attributes) + _FIRST,
            ratings=len(ratings) + len(unrated) + _FIRST,
            vector_width=vectors.shape[1],
        ),
        names=names,
    )


def recot_of_rows(
    interactions: pa.Table, examples: pa.Table, contexts: pa.Table, vector_ids: Sequence[str]
) -> np.ndarray:
    """Each row's number in [NONE] + vector_ids: of its own context's RecCoT, else of its user's newest older one.

    An example's own context holds what came before it and nothing else. Of the user's other contexts only those count
    whose moment lies before the row's: at the very same moment one could hold the row itself.
    """
    number = {context_id: place for place, context_id in enumerate(vector_ids, start=NONE + 1)}
    own = {
        row_id: number[context_id]
        for row_id, context_id in zip(examples["row_id"].to_pylist(), examples["context_id"].to_pylist(), strict=True)
        if context_id in number
    }
    # Of equal histories one context is kept; whoever shares it finds it through an example of its own.
    moments: dict[str, list[tuple[int, int]]] = {}
    columns = (contexts[name].to_pylist() for name in ("context_id", "user_id", "as_of"))
    for context_id, user_id, as_of in zip(*columns, strict=True):
        if context_id in number:
            moments.setdefault(user_id, []).append((as_of, number[context_id]))
    for seen in moments.values():
        seen.sort()
    found = np.full(len(interactions), NONE, dtype=np.int64)
    columns = (interactions[name].to_pylist() for name in ("row_id", "user_id", "timestamp"))
    for place, (row_id, user_id, timestamp) in enumerate(zip(*columns, strict=True)):
        seen = moments.get(user_id, [])
        # (timestamp,) sorts before every (timestamp, number): what lies left of it is strictly older.
        older = bisect_left(seen, (timestamp,))
        if row_id in own:
            found[place] = own[row_id]
        elif older:
            found[place] = seen[older - 1][1]
    return found


def _known(column: pa.ChunkedArray, train: np.ndarray, min_rows: int) -> list[str]:
    """The values that have a number of their own, in its order."""
    values, counts = np.unique(column.to_numpy(zero_copy_only=False)[train].astype(str), return_counts=True)
    known: list[str] = values[counts >= min_rows].tolist()
    return known


def _lookup(column: pa.ChunkedArray | pa.Array, known: Iterable[str]) -> np.ndarray:
    places = pc.index_in(column, value_set=pa.array(known, type=pa.string()))
    return pc.fill_null(pc.add(places, _FIRST), UNKNOWN).to_numpy(zero_copy_only=False).astype(np.int64)


@dataclass(frozen=True)
class _Newest:
    """The newest earlier items of all rows, one after the other, and where they stand in [R, length]."""

    inside: np.ndarray  # bool [R, length]
    item: pa.Array  # text [inside]
    rating: np.ndarray  # [inside]; no number where there is none
    label: np.ndarray  # [inside]

    @classmethod
    def of(cls, column: pa.ChunkedArray | pa.Array, length: int) -> Self:
        lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        sizes = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        kept = np.minimum(sizes, length)
        inside = np.arange(length) < kept[:, None]
        # Only what is kept is looked up: a history may hold a hundred times more.
        places = (lists.offsets.to_numpy()[1:] - kept)[:, None] + np.arange(length)
        newest = lists.values.take(pa.array(places[inside]))
        rating, label = (newest.field(name).to_numpy(zero_copy_only=False) for name in ("rating", "label"))
        return cls(inside, newest.field("item_id"), rating, label)


def _ratings(newest: _Newest, train: np.ndarray) -> tuple[list[float], list[int]]:
    """The ratings in the train rows' histories, and the labels that stand for a rating where there is none."""
    rated, of_train = ~np.isnan(newest.rating), np.repeat(train, newest.inside.sum(1))
    values, labels = np.unique(newest.rating[of_train & rated]), np.unique(newest.label[of_train & ~rated])
    return values.tolist(), labels.tolist()


def _numbered(found: np.ndarray, known: np.ndarray, first: int) -> np.ndarray:
    """Each value's place in the sorted `known`, from `first` on; UNKNOWN where it is not there."""
    places = np.minimum(np.searchsorted(known, found), max(len(known) - 1, 0))
    return np.where(np.isin(found, known), places + first, UNKNOWN)


def _attributes(items: pa.Table, known_items: set[str]) -> list[str]:
    """An attribute that no known item has learns nothing, so it is left out."""
    attributes = dict(zip(items["item_id"].to_pylist(), items["attributes"].to_pylist(), strict=True))
    return sorted({name for item in known_items for name in attributes.get(item) or []})


def _train_rows(column: pa.ChunkedArray, train: np.ndarray) -> np.ndarray:
    values, inverse = np.unique(column.to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    return np.bincount(inverse[train], minlength=len(values))[inverse]
