"""Triton over asyncio gRPC: a few long-lived streams that many requests to the generator share, and plain calls.

A stream shared by requests costs half of what a stream for each does. It tells of a failure only in words; so a request
that failed there is sent again on a stream of its own, which gives the status code.
"""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Self, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trackrec.features import wire
from trackrec.features.wire import ENCODER, GENERATOR, Generated
from trackrec.serving.contract import CHANNEL, EncoderContract, GeneratorContract

_STREAMS = 4
_CHANNEL = [
    # Without this, a machine that has vanished is noticed after the system's quarter of an hour.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # After a restart the server is looked for often; the default grows to two minutes.
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", -1),
    *CHANNEL,
]
# The server's, not the request's failure, or maybe so.
_SERVER = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.NOT_FOUND,
)

# The server's words of a python model whose process is gone, and the model's name in them.
_DEAD = re.compile(r"Stub process '(\w+?)_\d+_\d+' is not healthy")

T = TypeVar("T")


class RequestError(Exception):
    """The server refuses this request, whenever it is sent."""


class TroubleError(Exception):
    """A failure that may pass: UNAVAILABLE, INTERNAL, a stream that broke."""


class DeadModelError(TroubleError):
    """The model's process has ended; the server says so to one request a second, and never starts it again."""

    def __init__(self, message: str, model: str) -> None:
        super().__init__(message)
        self.model = model


class Triton:
    """A connection; an asynchronous context manager.

    Args:
        address: HOST:PORT of the server's gRPC endpoint.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        # Grows whenever the connection comes or goes: behind one number there is one server.
        self.connection = 0
        self._streams: list[_Stream] = []
        self._turn = itertools.count()
        self._calls: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self.address, options=_CHANNEL)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._counter = asyncio.create_task(self._count_connections())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.abort()
        self._counter.cancel()
        await self._channel.close()

    async def _count_connections(self) -> None:
        # gRPC connects again by itself, to whichever server the address leads to then. It reports the change before any
        # answer that comes over the new connection.
        while True:
            await self._channel.wait_for_state_change(self._channel.get_state())
            self.connection += 1

    def abort(self) -> None:
        """Ends all requests under way with a TroubleError: no answer will come from a model that is gone."""
        for stream in self._streams:
            stream.close(TroubleError("the server was lost"))
        self._streams = []
        for call in list(self._calls):
            call.cancel()

    async def generate(self, text: str, sampling: str, *, alone: bool = False) -> Generated:
        """One RecCoT.

        Args:
            alone: on a stream of its own.

        Raises:
            RequestError, TroubleError: see there.
        """
        request = wire.generate_request(text, sampling)
        if not alone:
            try:
                return wire.read_generated(await self._stream().ask(request))
            except _StreamedError as error:
                known = _known(str(error))
                if known:
                    raise known from error
        return wire.read_generated(await self._awaited(self._ask_alone(request)))

    async def encode(self, texts: list[str], width: int) -> npt.NDArray[np.float32]:
        """Vectors [texts, width].

        Raises:
            RequestError, TroubleError: see there.
        """
        response = await self._awaited(self._unary("ModelInfer", wire.encode_request(texts)))
        return wire.read_vectors(response, len(texts), width)

    async def contracts(self) -> tuple[GeneratorContract, EncoderContract]:
        """
        Raises:
            ContractError: a model has none, or another.
            TroubleError: no answer.
        """
        configs = [
            await self._unary("ModelConfig", service_pb2.ModelConfigRequest(name=name), timeout=10)
            for name in (GENERATOR, ENCODER)
        ]
        return GeneratorContract.of(configs[0]), EncoderContract.of(configs[1])

    async def reload(self, model: str, seconds: float) -> None:
        """Loads a model anew, where the server's control mode is explicit; nothing where another client is about it.

        Raises:
            RequestError, TroubleError: it is not, or the model does not load.
        """
        index = await self._unary("RepositoryIndex", service_pb2.RepositoryIndexRequest(), timeout=10)
        states = {each.state for each in index.models if each.name == model}
        if states & {"LOADING", "UNLOADING"}:
            return
        if "READY" in states:
            # Of a model whose files have not changed, a load alone does nothing.
            unload = service_pb2.RepositoryModelUnloadRequest(model_name=model)
            await self._unary("RepositoryModelUnload", unload, timeout=seconds)
        await self._unary(
            "RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name=model), timeout=seconds
        )

    async def served(self, model: str) -> int:
        """How many requests the model has answered since it was loaded."""
        request = service_pb2.ModelStatisticsRequest(name=model)
        statistics = await self._unary("ModelStatistics", request, timeout=10)
        return sum(each.inference_stats.success.count for each in statistics.model_stats)

    def _stream(self) -> "_Stream":
        self._streams = [stream for stream in self._streams if not stream.closed]
        # One of an earlier connection is left to end: its server goes on answering there while it drains.
        usable = [stream for stream in self._streams if stream.connection == self.connection]
        if len(usable) < _STREAMS:
            usable.append(_Stream(self._stub, self.connection))
            self._streams.append(usable[-1])
        return usable[next(self._turn) % len(usable)]

    async def _awaited(self, call: Coroutine[Any, Any, T]) -> T:
        """`call`, which `abort` can end."""
        task = asyncio.ensure_future(call)
        self._calls.add(task)
        try:
            await asyncio.wait([task])
        finally:
            self._calls.discard(task)
            if not task.done():  # whoever waited has given up
                task.cancel()
        if task.cancelled():
            raise TroubleError("the server was lost")
        return task.result()

    async def _ask_alone(self, request: service_pb2.ModelInferRequest) -> list[service_pb2.ModelInferResponse]:
        responses = []
        # With this the server ends the stream with the failure's status code.
        call = self._stub.ModelStreamInfer(metadata=(("triton_grpc_error", "true"),))
        try:
            await call.write(request)
            await call.done_writing()
            async for response in call:
                if response.error_message:
                    raise _known(response.error_message) or TroubleError(response.error_message)
                responses.append(response.infer_response)
                if wire.is_last(response.infer_response):
                    break
        except grpc.aio.AioRpcError as error:
            raise _explained(error) from error
        except asyncio.InvalidStateError as error:
            raise TroubleError("the stream broke") from error
        finally:
            call.cancel()
        if not responses:
            raise TroubleError("the stream ended without an answer")
        return responses

    async def _unary(self, method: str, request: Any, timeout: float | None = None) -> Any:
        try:
            return await getattr(self._stub, method)(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise _explained(error) from error


class _StreamedError(Exception):
    """What the server says on a shared stream of a request that failed; the stream goes on."""


class _Stream:
    """One stream; requests go out in turn, answers come as they are ready and are told apart by id."""

    def __init__(self, stub: service_pb2_grpc.GRPCInferenceServiceStub, connection: int) -> None:
        self.connection = connection
        self.closed = False
        self._ids = itertools.count()
        self._outgoing: asyncio.Queue[service_pb2.ModelInferRequest | None] = asyncio.Queue()
        self._waiting: dict[str, asyncio.Future[list[service_pb2.ModelInferResponse]]] = {}
        self._parts: dict[str, list[service_pb2.ModelInferResponse]] = {}
        self._call = stub.ModelStreamInfer(self._requests())
        self._reader = asyncio.create_task(self._read())

    async def ask(self, request: service_pb2.ModelInferRequest) -> list[service_pb2.ModelInferResponse]:
        """All responses to one request.

        Raises:
            _StreamedError: the request failed.
            TroubleError: the stream broke.
        """
        request.id = str(next(self._ids))
        future = self._waiting[request.id] = asyncio.get_running_loop().create_future()
        self._outgoing.put_nowait(request)
        try:
            return await future
        finally:
            # An answer that comes after this belongs to nobody.
            self._waiting.pop(request.id, None)
            self._parts.pop(request.id, None)

    def close(self, reason: Exception) -> None:
        if self.closed:
            return
        self.closed = True
        self._call.cancel()
        self._outgoing.put_nowait(None)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(reason)

    async def _requests(self) -> AsyncIterator[service_pb2.ModelInferRequest]:
        while (request := await self._outgoing.get()) is not None:
            yield request

    async def _read(self) -> None:
        try:
            async for response in self._call:
                self._deliver(response)
        except grpc.aio.AioRpcError as error:
            self.close(TroubleError(f"{error.code().name}: {error.details()}"))
        except asyncio.CancelledError:
            self.close(TroubleError("the stream was cancelled"))
        else:
            self.close(TroubleError("the server ended the stream"))

    def _deliver(self, response: service_pb2.ModelStreamInferResponse) -> None:
        answer = response.infer_response
        future = self._waiting.get(answer.id)
        if response.error_message:
            failed = [future] if future else list(self._waiting.values()) if not answer.id else []
            for each in failed:
                if not each.done():
                    each.set_exception(_StreamedError(response.error_message))
        elif future and not future.done():
            parts = self._parts.setdefault(answer.id, [])
            parts.append(answer)
            if wire.is_last(answer):
                future.set_result(parts)


def is_too_long(message: str) -> bool:
    """Whether the generator refuses a prompt for its length: vLLM's words, of several releases."""
    lowered = message.lower()
    return any(words in lowered for words in ("maximum model length", "maximum context length", "prompt is too long"))


def _known(message: str) -> Exception | None:
    """What the words alone tell."""
    if is_too_long(message):
        return RequestError(message)
    dead = _DEAD.search(message)
    return DeadModelError(message, dead[1]) if dead else None


def _explained(error: grpc.aio.AioRpcError) -> Exception:
    text = f"{error.code().name}: {error.details()}"
    if known := _known(text):
        return known
    if error.code() not in (*_SERVER, grpc.StatusCode.DEADLINE_EXCEEDED):
        return RequestError(text)
    return TroubleError(text)
