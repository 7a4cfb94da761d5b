"""Progress bars for long work: live on a terminal, an occasional line in a pod's log."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, total: int | None = None, unit: str = "it") -> "tqdm[T]":
    """`tqdm` over `items`; without a terminal it prints at most every ten seconds."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(items, desc=description, total=total, unit=unit, mininterval=interval, dynamic_ncols=True)
