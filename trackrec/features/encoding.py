"""RecCoTs to vectors, while others are still being generated: batches of alike lengths, a few at once."""

import asyncio
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from trackrec.features.recovery import Caller, FailedError

# Texts that wait to be sorted by length before they are sent, in batches.
_SORTED_BATCHES = 8
_AT_ONCE = 4

Vector = npt.NDArray[np.float32]


class Encoding:
    """Encodes what it is given, in any order.

    Args:
        tasks: where the requests run; what fails there is a lost server.
        done: takes a text's key and its vector [width], or None where the encoder refuses it.
    """

    def __init__(
        self, caller: Caller, batch: int, tasks: asyncio.TaskGroup, done: Callable[[str, Vector | None], None]
    ) -> None:
        self._caller, self._batch, self._tasks, self._done = caller, batch, tasks, done
        self._waiting: list[tuple[str, str]] = []
        self._at_once = asyncio.Semaphore(_AT_ONCE)

    def add(self, key: str, text: str) -> None:
        self._waiting.append((key, text))
        if len(self._waiting) >= _SORTED_BATCHES * self._batch:
            self.flush()

    def flush(self) -> None:
        """Sends what waits, too."""
        waiting, self._waiting = sorted(self._waiting, key=lambda pair: (len(pair[1]), pair)), []
        for start in range(0, len(waiting), self._batch):
            self._tasks.create_task(self._encode(waiting[start : start + self._batch]))

    async def _encode(self, pairs: list[tuple[str, str]]) -> None:
        texts = [text for _, text in pairs]
        width = self._caller.encoder.width
        try:
            async with self._at_once:
                vectors = await self._caller.call(lambda _: self._caller.triton.encode(texts, width))
        except FailedError:
            if len(pairs) == 1:
                self._done(pairs[0][0], None)
                return
            # One of them may spoil the others' request.
            for pair in pairs:
                await self._encode([pair])
            return
        for (key, _), vector in zip(pairs, vectors, strict=True):
            self._done(key, vector)
