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


class UndeliveredError(RuntimeError):
    """A part of the answer could not be sent, so the rest is of no use."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"the answer could not be sent: {type(cause).__name__}: {cause}; ask again")


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
        """The end: `PromptTooLongError` or ValueError (the request is wrong), or one of this module's errors."""
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
        # The engine's thread: requests that it works on, and why it no longer does.
        self._under_way: set[Request] = set()
        self._failure: UnhealthyError | None = None
        self._closing = False
        # Those that are not answered to their end; the other thread's: those of them whose client has gone.
        self._live: set[Request] = set()
        self._gone: set[Request] = set()
        # Those that were told to ask again, and of whom the engine does not know it yet.
        self._undelivered: set[Request] = set()
        self._asked = time.monotonic()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._work, self._respond)]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request) -> None:
        """Returns at once."""
        with self._lock:
            self._live.add(request)
            # Under the lock: that its client has gone must not overtake it.
            self._inbox.put((request, True))

    def close(self) -> None:
        """Ends when all requests so far are answered."""
        self._inbox.put(None)
        for thread in self._threads:
            thread.join()

    # Each turn of a loop is a call, whose frame ends before the next one waits: no answered request is held meanwhile.

    def _work(self) -> None:
        while not self._closing or self._under_way:
            while not self._closing and self._take():
                pass
            if self._under_way:
                self._step()
        self._outbox.put(None)

    def _take(self) -> bool:
        """A new request, or the end of one whose client has gone; False if there is none. Waits if there is no work."""
        try:
            message = self._inbox.get(block=not self._under_way)
        except queue.Empty:
            return False
        if message is None:
            self._closing = True
            return False
        request, wanted = message
        if not wanted:
            # Its answer may have gone out meanwhile.
            if self._engine.cancel(request):
                self._under_way.discard(request)
                self._outbox.put((request, CancelledError()))
                self._on_step(self._engine)
        elif self._failure is not None:
            self._outbox.put((request, self._failure))
        else:
            try:
                self._engine.add(request, request.prompt, request.sampling, stream=request.stream)
                self._under_way.add(request)
            # Whatever it is: this thread goes on for the others.
            except Exception as error:
                self._outbox.put((request, error.with_traceback(None)))
        return True

    def _step(self) -> None:
        try:
            for progress in self._engine.step():
                request = cast(Request, progress.id)
                self._outbox.put((request, progress))
                if progress.finish_reason is not None:
                    self._under_way.discard(request)
            self._on_step(self._engine)
        except Exception as error:
            traceback.print_exc()
            self._failure = UnhealthyError(error)
            for request in self._under_way:
                self._outbox.put((request, self._failure))
                self._engine.cancel(request)
            self._under_way.clear()
            try:
                self._on_failure(error)
            except Exception:
                # A server that unloads no model on demand: this thread goes on to answer requests.
                traceback.print_exc()

    def _respond(self) -> None:
        while self._answer():
            # Also where answers come without a pause.
            if time.monotonic() - self._asked > _POLL_SECONDS:
                self._ask()
                self._asked = time.monotonic()

    def _answer(self) -> bool:
        """Sends one answer, if there is one soon; False after the last."""
        try:
            message = self._outbox.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            return True
        if message is None:
            return False
        self._send(*message)
        return True

    def _ask(self) -> None:
        """Whether the clients still wait."""
        with self._lock:
            live = set(self._live)
        self._gone &= live
        for request in live - self._gone:
            if request.cancelled():
                self._gone.add(request)
                self._inbox.put((request, False))

    def _send(self, request: Request, what: Progress | Exception) -> None:
        last = isinstance(what, Exception) or what.finish_reason is not None
        if request in self._undelivered:
            if last:
                self._undelivered.discard(request)
            return
        if last:
            self._forget(request)
        try:
            if isinstance(what, Exception):
                request.fail(what)
            else:
                request.answer(what)
        except Exception as error:
            # One client's connection, or no room in shared memory; the others' requests go on.
            traceback.print_exc()
            if not isinstance(what, Exception):
                self._give_up(request, error.with_traceback(None), known=last)

    def _give_up(self, request: Request, error: Exception, *, known: bool) -> None:
        """Tells the client, who would wait for ever or take a text with a hole for whole.

        Args:
            known: the engine has done with it.
        """
        self._forget(request)
        if not known:
            self._undelivered.add(request)
            self._inbox.put((request, False))
        try:
            request.fail(UndeliveredError(error))
        except Exception:
            traceback.print_exc()

    def _forget(self, request: Request) -> None:
        with self._lock:
            self._live.discard(request)
