"""What a shard has so far, on this machine's disk: a killed job asks only for the RecCoTs that were under way."""

import asyncio
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from trackrec.features.table import Status
from trackrec.journal import Journal

# Records of so long go to the disk together: one at a time, the disk would be what takes the time.
_TOGETHER_SECONDS = 0.05


class Result(NamedTuple):
    """What came of a prompt; without a text where the generator refuses it."""

    status: Status
    text: str | None = None
    prompt_tokens: int | None = None
    tokens: int | None = None
    finish_reason: str | None = None
    seconds: float | None = None


class ShardLog:
    """`results` by prompt hash, of earlier tries; an asynchronous context manager.

    Raises:
        JournalBusyError: on opening, another process works on the same shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal = Journal(path)
        self.results: dict[str, Result] = {}
        # When the generator worked, one span for each try; seconds since 1970.
        self._spans: list[tuple[float, float]] = []
        for record in self._journal.records:
            if "started" in record:
                self._spans.append((record["started"], record["started"]))
                continue
            self._spans[-1] = (self._spans[-1][0], record["at"])
            self.results |= {key: Result(*result) for key, result in record["results"].items()}
        self._waiting: dict[str, Result] = {}
        self._some = asyncio.Event()
        self._started: float | None = None

    @property
    def spans(self) -> list[tuple[float, float]]:
        """Those of earlier tries, and this one's until now."""
        return [*self._spans, *([(self._started, time.time())] if self._started is not None else [])]

    def add(self, key: str, result: Result) -> None:
        """
        Raises:
            OSError: earlier results could not be written: those that follow would be asked for in vain.
        """
        if self._writer.done():
            self._writer.result()
        self._waiting[key] = result
        self._some.set()

    async def start(self) -> None:
        """Before the first request of this try."""
        self._started = time.time()
        await asyncio.to_thread(self._journal.append, {"started": self._started})

    async def __aenter__(self) -> Self:
        self._writer = asyncio.create_task(self._write())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        if self._waiting:
            self._journal.append(self._taken())
        self._journal.__exit__(kind, error, trace)

    async def _write(self) -> None:
        while True:
            await self._some.wait()
            await asyncio.sleep(_TOGETHER_SECONDS)
            # To the end, also where this task is cancelled meanwhile: two threads must not write at once.
            writing = asyncio.ensure_future(asyncio.to_thread(self._journal.append, self._taken()))
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                await writing
                raise

    def _taken(self) -> dict[str, Any]:
        self._some.clear()
        waiting, self._waiting = self._waiting, {}
        return {"at": time.time(), "results": waiting}
