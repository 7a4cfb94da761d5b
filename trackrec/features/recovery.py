"""Calls that outlive a lost server: tries again, and who is to blame when an answer does not come.

A failure alone says little: a killed python model answers INTERNAL for ever while the server calls itself ready, and
requests that were with it are never answered. So on any failure, and when nothing has come for a while, a small request
of our own asks. If it is answered, the failure is the user's; if not, the server is lost: all that is under way is
given up, the model is loaded again where the server lets a client do so, and every request goes out once more.

An address may lead to several servers, some of another version, and gRPC connects again by itself. So an answer counts
only if it came over a connection behind which the models were found to be the job's (`_certain`), and they are looked
at once more before a shard is published (`same_models`): a server may be given other models while the connection stays.
What this does not find out: a server that is given other models and the old ones back between two looks, and a proxy
that spreads the requests of one connection over several servers.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from trackrec.features import wire
from trackrec.features.client import DeadModelError, RequestError, Triton, TroubleError
from trackrec.serving.contract import ContractError

log = logging.getLogger(__name__)

# Without an answer for so long, the server is asked whether it is well.
_SILENCE_SECONDS = 5.0
_PROBE_SECONDS, _SHORT_PROBE_SECONDS = 20.0, 3.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 10.0
# A request that was with the server in so many losses goes out alone from then on: maybe it is what kills it.
_SUSPECT = 2
_HELLO = "Hello"
# gRPC's words of a server that is not there; of one that is, UNAVAILABLE is said of a model.
_UNREACHABLE = "failed to connect"

# Times that a connection may break before the models behind it are known.
_LOOKS = 5

T = TypeVar("T")


class ServerLostError(RuntimeError):
    """Triton is gone and does not come back; the message says what to do."""


class OtherModelsError(ServerLostError):
    """Triton serves other models than at the start: what it answered last may be theirs."""


class FailedError(Exception):
    """One request that cannot be answered, by a server that is well."""


class _Trouble(NamedTuple):
    model: str
    why: str
    # It may only be busy.
    slow: bool = False
    # To load it anew may help.
    reload: bool = False


class Caller:
    """Makes calls to one server; an asynchronous context manager.

    Args:
        deadline_s: of a call, with all tries, from when it went out or from when a lost server came back; and how long
            a lost server is waited for.
        retries: of a call that fails while the server is well, and losses that a call may live through.
    """

    def __init__(self, triton: Triton, *, deadline_s: float, retries: int) -> None:
        self.triton = triton
        self._deadline_s, self._retries = deadline_s, retries
        self._well = asyncio.Event()
        self._alone = asyncio.Lock()
        self._check: asyncio.Task[bool] | None = None
        self._given_up: ServerLostError | None = None
        self._under_way = 0
        # Answers of the generator since it was loaded, when it was looked at last.
        self._served = 0
        # Over this connection the models were looked at (`Triton.connection`).
        self._known = -1
        # Of anything, failures too; and of an answer.
        self._last_sign = self._last_answer = time.monotonic()

    async def __aenter__(self) -> "Caller":
        await self._first_look()
        self._well.set()
        self._watchdog = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watchdog.cancel()
        if self._check:
            self._check.cancel()

    async def call(self, attempt: Callable[[bool], Awaitable[T]]) -> T:
        """
        Args:
            attempt: makes the request; its argument is whether it goes out with care, on a stream of its own.

        Raises:
            FailedError: the server refuses it, or it fails again and again, or takes too long.
            ServerLostError: see there.
        """
        try:
            async with asyncio.timeout(self._deadline_s) as limit:
                # Nearly every call is answered at once.
                try:
                    return await self._through_losses(attempt, False, limit)
                except TroubleError:
                    if not self._retries:
                        raise
                async for again in AsyncRetrying(
                    retry=retry_if_exception_type(TroubleError),
                    stop=stop_after_attempt(self._retries),
                    wait=wait_exponential_jitter(2 * _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS),
                    reraise=True,
                ):
                    if again.retry_state.attempt_number == 1:
                        await asyncio.sleep(random.uniform(0, 2 * _FIRST_PAUSE_SECONDS))
                    with again:
                        return await self._through_losses(attempt, True, limit)
        except (TroubleError, RequestError, wire.AnswerError) as error:
            raise FailedError(str(error)) from error
        except TimeoutError as error:
            if time.monotonic() - self._last_answer > self._deadline_s:
                self._given_up = ServerLostError(
                    f"Triton at {self.triton.address} has answered nothing for {self._deadline_s:g} s. Restart it, "
                    "then run the same command again: it goes on with the users that are not done"
                )
                raise self._given_up from error
            raise FailedError(f"no answer within {self._deadline_s:g} s") from error
        raise AssertionError("tenacity returns or raises")

    async def same_models(self) -> None:
        """
        Raises:
            OtherModelsError: what has been answered may be another version's.
            ServerLostError: see there.
        """
        try:
            await self.call(lambda _: self._look())
        except FailedError as error:
            raise ServerLostError(
                f"Triton at {self.triton.address} does not tell its models' versions ({error}); see that it serves, "
                "then run the same command again: it goes on with the users that are not done"
            ) from error

    async def _through_losses(
        self, attempt: Callable[[bool], Awaitable[T]], careful: bool, limit: asyncio.Timeout
    ) -> T:
        """An answer, or a failure while the server is well; whenever the server was lost, it is asked again."""
        for losses in range(self._retries + 1):
            suspect = losses >= _SUSPECT
            if suspect:
                await self._uncounted(self._alone.acquire(), limit)
            try:
                await self._until_well(limit)
                connection = self._known
                return await self._certain(attempt, careful or losses > 0)
            except TroubleError as error:
                if await self._is_well(limit, error) and connection == self._known:
                    raise
                # What had been done for it went with the server.
                limit.reschedule(asyncio.get_running_loop().time() + self._deadline_s)
            finally:
                if suspect:
                    self._alone.release()
        raise FailedError(f"the server was lost with it {self._retries + 1} times")

    async def _certain(self, attempt: Callable[[bool], Awaitable[T]], careful: bool) -> T:
        """An answer or a refusal of the job's models; of others', maybe, it is trouble."""
        connection = self._known
        try:
            answer = await self._counted(attempt, careful)
        except (RequestError, wire.AnswerError):
            if connection == self.triton.connection:
                raise
        else:
            if connection == self.triton.connection:
                return answer
        raise TroubleError("the connection was lost, and another server may have answered")

    async def _counted(self, attempt: Callable[[bool], Awaitable[T]], careful: bool) -> T:
        if not self._under_way:
            self._last_sign = time.monotonic()
        self._under_way += 1
        try:
            answer = await attempt(careful)
            self._last_answer = time.monotonic()
            return answer
        finally:
            self._under_way -= 1
            self._last_sign = time.monotonic()

    async def _until_well(self, limit: asyncio.Timeout) -> None:
        if not self._well.is_set():
            await self._uncounted(self._well.wait(), limit)
        if self._given_up:
            raise self._given_up
        if self.triton.connection != self._known:
            await self._is_well(limit)

    async def _is_well(self, limit: asyncio.Timeout, error: TroubleError | None = None) -> bool:
        """Whether the server has been well all along; returns when it is well (again)."""
        if self._given_up:
            raise self._given_up
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._ask(error))
        return await self._uncounted(asyncio.shield(self._check), limit)

    async def _uncounted(self, waiting: Awaitable[T], limit: asyncio.Timeout) -> T:
        """Waits with the caller's clock stopped."""
        left = (limit.when() or 0.0) - asyncio.get_running_loop().time()
        limit.reschedule(None)
        try:
            return await waiting
        finally:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time() + max(left, 0.0))

    async def _watch(self) -> None:
        """Requests that a dead model has taken along get no answer; this finds out."""
        while True:
            await asyncio.sleep(_SILENCE_SECONDS / 2)
            silent = time.monotonic() - self._last_sign > _SILENCE_SECONDS
            if self._under_way and silent and self._well.is_set() and (self._check is None or self._check.done()):
                self._check = asyncio.create_task(self._ask())
                # Who waits for an answer hears of what comes out.
                self._check.add_done_callback(lambda check: check.cancelled() or check.exception())

    async def _ask(self, error: TroubleError | None = None) -> bool:
        # Behind requests to a model that is dead the probe would wait long to hear of it.
        dead = _Trouble(error.model, str(error), reload=True) if isinstance(error, DeadModelError) else None
        if not dead:
            # First of all: other models may refuse the probe, or answer it otherwise, and are well all the same.
            await self._unlike_before()
        trouble = dead or await self._trouble(_PROBE_SECONDS)
        self._last_sign = time.monotonic()
        if trouble is None or trouble.slow:
            trouble = await self._unlike_before()
        if trouble is None:
            return True
        self._well.clear()
        log.warning("Triton at %s is lost (%s: %s); waiting for it", self.triton.address, trouble.model, trouble.why)
        try:
            self.triton.abort()
            await self._come_back(trouble)
        except ServerLostError as lost:
            self._given_up = lost
        finally:
            self._well.set()
        if self._given_up:
            raise self._given_up
        log.warning("Triton at %s is back", self.triton.address)
        return False

    async def _trouble(self, seconds: float) -> "_Trouble | None":
        """What is wrong with a model that does not answer."""
        model = wire.GENERATOR
        try:
            async with asyncio.timeout(seconds):
                sampling = '{"max_tokens": 1, "temperature": 0.0}'
                hello = self.generator.opening + _HELLO + self.generator.closing
                await self.triton.generate(hello, sampling, alone=True)
                # Loaded anew by another client: what the model before had taken is never answered.
                served, before = await self.triton.served(model), self._served
                self._served = served
                if served < before:
                    return _Trouble(model, "the model was loaded anew")
                model = wire.ENCODER
                await self.triton.encode([_HELLO], self.encoder.width)
        except TroubleError as error:
            why = str(error)
            return _Trouble(model, why, reload=_UNREACHABLE not in why)
        except wire.AnswerError as error:
            return _Trouble(model, str(error))
        except TimeoutError:
            return _Trouble(model, f"no answer within {seconds:g} s", slow=True)
        except RequestError as error:
            # "Unknown model": it is being loaded anew, or someone has unloaded it.
            return _Trouble(model, str(error), reload=True)
        self._last_answer = time.monotonic()
        return None

    async def _come_back(self, trouble: "_Trouble") -> None:
        until = time.monotonic() + self._deadline_s
        pause = _FIRST_PAUSE_SECONDS
        while (left := until - time.monotonic()) > 0:
            # Jitter: other pods of the job wait for the same server, and one of them is enough to load a model.
            await asyncio.sleep(random.uniform(pause / 2, pause))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            await self._unlike_before()
            found = await self._trouble(min(_SHORT_PROBE_SECONDS if trouble.reload else _PROBE_SECONDS, left))
            found = found or await self._unlike_before()
            if found is None:
                return
            if not found.slow:
                trouble = found
            if trouble.reload:
                try:
                    await self.triton.reload(trouble.model, max(until - time.monotonic(), 1.0))
                except (TroubleError, RequestError) as error:
                    log.info("loading %s again: %s", trouble.model, error)
                self._served = 0
                trouble = trouble._replace(reload=False)
        raise ServerLostError(
            f"Triton at {self.triton.address} has been lost for {self._deadline_s:g} s "
            f"({trouble.model}: {trouble.why}); see that it serves, then run the same "
            "command again: it goes on with the users that are not done"
        )

    async def _first_look(self) -> None:
        until = time.monotonic() + min(self._deadline_s, 60.0)
        while True:
            try:
                self.generator, self.encoder = await self.triton.contracts()
                self._served = await self.triton.served(wire.GENERATOR)
                await self._look()
                return
            except (TroubleError, RequestError) as error:
                if time.monotonic() > until:
                    raise ServerLostError(
                        f"Triton at {self.triton.address} does not answer ({error}); give HOST:PORT of the gRPC "
                        "endpoint of a server with an exported repository, e.g. of `trackrec serve`"
                    ) from error
                await asyncio.sleep(0.5)

    async def _unlike_before(self) -> "_Trouble | None":
        try:
            await self._look()
        except (TroubleError, RequestError) as error:  # lost once more
            return _Trouble(wire.GENERATOR, str(error))
        return None

    async def _look(self) -> None:
        """Compares the models behind the connection with the job's.

        Raises:
            OtherModelsError: they are others; from now on every call says so.
            RequestError, TroubleError: no answer, or none that a connection outlives.
        """
        for _ in range(_LOOKS):
            connection = self.triton.connection
            try:
                same = await self.triton.contracts() == (self.generator, self.encoder)
            except ContractError:  # another release's
                same = False
            if not same:
                self._given_up = OtherModelsError(
                    f"Triton at {self.triton.address} now serves other models than when the job began; run it again: "
                    "all RecCoTs of a date are of one version"
                )
                self.triton.abort()
                raise self._given_up
            if connection == self.triton.connection:
                self._known = connection
                return
        raise TroubleError(f"the connection was lost {_LOOKS} times while the models' versions were asked for")
