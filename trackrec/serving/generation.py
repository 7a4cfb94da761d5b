"""The generator's engine at work for many clients: one thread takes its steps, another answers.

Nothing here knows Triton: `Request` is what an answer goes to.
"""

import queue
import threading
import time
import traceback
from collections.abc import Callable
from typing import Protocol, cast

from trackrec.llm.continuous import ContinuousEngine, Progress, Sampling
from trackrec.llm.engine import PromptTooLongError

# How often clients are asked whether they still wait.
_POLL_SECONDS = 0.05


class UnhealthyError(RuntimeError):
    """The engine failed in a step: it is not used again."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(
            f"the model is unavailable: its engine failed with {type(cause).__name__}: {cause}; load it anew"
        )


class CancelledError(RuntimeError):
    """The client no longer waits."""

    def __init__(self) -> None:
        super().__init__("the request was cancelled")


class Request(Protocol):
    """A client's request. Its methods are called from one thread, not the one that submits it."""

    prompt: list[int]
    sampling: Sampling
    stream: bool

    def __hash__(self) -> int: ...

    def answer(self, progress: Progress) -> None:
        """More of the text; the last time with a finish reason."""
        ...

    def fail(self, error: Exception) -> None:
        """The end: `PromptTooLongError` or ValueError (the request is wrong), `CancelledError`, `UnhealthyError`."""
        ...

    def cancelled(self) -> bool: ...


class Generation:
    """
    Args:
        engine: belongs to this object's thread from now on.
        on_failure: called once if a step fails, after which every request is answered with `UnhealthyError`.
        on_step: called after each step, from the engine's thread.
    """

    def __init__(
        self,
        engine: ContinuousEngine,
        *,
        on_failure: Callable[[BaseException], None],
        on_step: Callable[[ContinuousEngine], None] = lambda engine: None,
    ) -> None:
        self._engine, self._on_failure, self._on_step = engine, on_failure, on_step
        # None: no more requests will come.
        self._inbox: queue.SimpleQueue[tuple[Request, bool] | None] = queue.SimpleQueue()
        # None: no more answers will.
        self._outbox: queue.SimpleQueue[tuple[Request, Progress | Exception] | None] = queue.SimpleQueue()
        # Those that are not answered to their end.
        self._live: set[Request] = set()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._work, self._respond)]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request) -> None:
        """Returns at once."""
        with self._lock:
            self._live.add(request)
        self._inbox.put((request, True))

    def close(self) -> None:
        """Ends when all requests so far are answered."""
        self._inbox.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        engine, failure, closing = self._engine, None, False
        under_way: set[Request] = set()
        while not closing or under_way:
            try:
                # Waits only where there is nothing to do.
                while not closing:
                    message = self._inbox.get(block=not under_way)
                    if message is None:
                        closing = True
                    else:
                        self._take(*message, under_way, failure)
            except queue.Empty:
                pass
            if not under_way:
                continue
            try:
                for progress in engine.step():
                    request = cast(Request, progress.id)
                    self._outbox.put((request, progress))
                    if progress.finish_reason is not None:
                        under_way.discard(request)
                self._on_step(engine)
            except Exception as error:
                traceback.print_exc()
                failure = UnhealthyError(error)
                for request in under_way:
                    self._outbox.put((request, failure))
                under_way.clear()
                self._on_failure(error)
        self._outbox.put(None)

    def _take(self, request: Request, wanted: bool, under_way: set[Request], failure: Exception | None) -> None:
        """A new request, or the end of one whose client has gone."""
        if not wanted:
            # Its answer may have gone out meanwhile.
            if self._engine.cancel(request):
                under_way.discard(request)
                self._outbox.put((request, CancelledError()))
                self._on_step(self._engine)
            return
        if failure is not None:
            self._outbox.put((request, failure))
            return
        try:
            self._engine.add(request, request.prompt, request.sampling, stream=request.stream)
            under_way.add(request)
        except (PromptTooLongError, ValueError) as error:
            self._outbox.put((request, error))

    def _respond(self) -> None:
        gone: set[Request] = set()
        asked = time.monotonic()
        while True:
            try:
                message = self._outbox.get(timeout=_POLL_SECONDS)
                if message is None:
                    return
                self._send(*message)
            except queue.Empty:
                pass
            # Also where answers come without a pause.
            if time.monotonic() - asked > _POLL_SECONDS:
                with self._lock:
                    live = set(self._live)
                gone &= live
                for request in live - gone:
                    if request.cancelled():
                        gone.add(request)
                        self._inbox.put((request, False))
                asked = time.monotonic()

    def _send(self, request: Request, what: Progress | Exception) -> None:
        last = isinstance(what, Exception) or what.finish_reason is not None
        if last:
            with self._lock:
                self._live.discard(request)
        try:
            if isinstance(what, Exception):
                request.fail(what)
            else:
                request.answer(what)
        except Exception:
            # One client's connection; the others' requests go on.
            traceback.print_exc()
