"""The table of RecCoT vectors as one tensor, and the controls that stand in for it."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from trackrec.evaluation.controls import shuffle_between_users


class VectorError(ValueError):
    """A table of vectors that training must not use; the message says what is wrong with it."""


def of_table(table: pa.Table, width: int) -> tuple[list[str], Tensor]:
    """The contexts, and their vectors after a first row of zeros (which stands for NONE): [contexts + 1, width].

    Raises:
        VectorError: the table is empty, a context has two vectors, or a vector is of another width or holds a number
            that is not finite.
    """
    names: list[str] = table["context_id"].to_pylist()
    if not names:
        raise VectorError("the table of vectors is empty")
    if len(set(names)) < len(names):
        raise VectorError("a context has several vectors; `encode` writes one a context")
    column = table["vector"].combine_chunks()
    widths = np.diff(column.offsets.to_numpy())
    if (widths != width).any():
        place = int(np.flatnonzero(widths != width)[0])
        raise VectorError(
            f"the vector of context {names[place]} has {widths[place]} numbers, `train_ctr.vector_width` is {width}; "
            "set it to the encoder's width, or encode with the encoder that the config means"
        )
    found = column.flatten().to_numpy(zero_copy_only=False).reshape(len(names), width)
    finite = np.isfinite(found).all(axis=1)
    if not finite.all():
        raise VectorError(
            f"{(~finite).sum()} of {len(names)} vectors hold a number that is not finite (first: context "
            f"{names[int(np.flatnonzero(~finite)[0])]}); encode again"
        )
    return names, torch.cat([torch.zeros(1, width), torch.from_numpy(found.astype(np.float32))])


def random_in_place_of(vectors: Tensor, seed: int) -> Tensor:
    """Normal numbers of each column's own mean and spread: a control that knows the context and nothing of the text."""
    real = vectors[1:]
    drawn = torch.randn(real.shape, generator=torch.Generator().manual_seed(seed))
    return torch.cat([vectors[:1], drawn * real.std(0, correction=0) + real.mean(0)])


def shuffled_between_users(
    names: list[str], vectors: Tensor, owners: Mapping[str, frozenset[str]], seed: int
) -> Tensor:
    """Each context's vector replaced by one of other users, whatever their split or moment (`controls` says which keep
    their own).

    A user's contexts get vectors of several users, so this control says nothing of a user's own style over time.

    Args:
        owners: the users of each context.

    Raises:
        ValueError: a user owns too many of the contexts.
    """
    givers = shuffle_between_users({name: owners[name] for name in names}, seed)
    place = {name: number for number, name in enumerate(names, start=1)}
    return vectors[[0, *(place[givers[name]] for name in names)]]
