"""The engine's thread, without Triton: clients that come and go, and an engine that fails."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.llm.test_transformers_engine import PROMPTS, engine_of
from trackrec.llm.continuous import ContinuousEngine, Progress, Sampling
from trackrec.llm.engine import PromptTooLongError
from trackrec.llm.models import load_model, load_tokenizer
from trackrec.serving.generation import CancelledError, Generation, UndeliveredError, UnhealthyError

GREEDY = Sampling(temperature=0, repetition_penalty=0.2, max_tokens=12)
ENDLESS = Sampling(temperature=0, ignore_eos=True, max_tokens=None)


class Client:
    """A request, and what it got."""

    def __init__(self, prompt: list[int], sampling: Sampling = GREEDY, *, stream: bool = False) -> None:
        self.prompt, self.sampling, self.stream = prompt, sampling, stream
        self.text, self.tokens = "", 0
        self.error: Exception | None = None
        self.started, self.done, self.gone = threading.Event(), threading.Event(), threading.Event()

    def answer(self, progress: Progress) -> None:
        assert not self.done.is_set()
        self.started.set()
        self.text += progress.text
        self.tokens += progress.num_tokens
        if progress.finish_reason is not None:
            self.done.set()

    def fail(self, error: Exception) -> None:
        assert not self.done.is_set()
        self.error = error
        self.done.set()

    def cancelled(self) -> bool:
        return self.gone.is_set()

    def wait(self) -> "Client":
        assert self.done.wait(60)
        return self


@pytest.fixture
def engine(tiny_model: Path) -> ContinuousEngine:
    return ContinuousEngine(load_tokenizer(tiny_model), load_model(tiny_model, tiny_model, dtype="float32"), max_rows=4)


@pytest.fixture
def failures() -> list[BaseException]:
    return []


@pytest.fixture
def generation(engine: ContinuousEngine, failures: list[BaseException]) -> Iterator[Generation]:
    generation = Generation(engine, on_failure=failures.append)
    yield generation
    generation.close()


def test_many_clients_at_once(generation: Generation, engine: ContinuousEngine, tiny_model: Path) -> None:
    expected = dict(engine_of(tiny_model).greedy(PROMPTS, max_tokens=12, repetition_penalty=0.2))
    clients = [Client(PROMPTS[i % 5], stream=i % 2 == 0) for i in range(30)]
    threads = [
        threading.Thread(target=lambda own: [generation.submit(c) for c in own], args=(clients[k::3],))
        for k in range(3)
    ]
    for thread in threads:
        thread.start()
    for i, client in enumerate(clients):
        client.wait()
        assert (client.text, client.tokens) == (expected[i % 5].text, expected[i % 5].num_tokens)
    # Steps wrote the tokens of four rows each, nearly always.
    assert engine.written_tokens / engine.decoding_steps > 3


def test_a_wrong_request_fails_alone(generation: Generation) -> None:
    wrong = [Client(list(range(5000))), Client([]), Client(PROMPTS[0], Sampling(lora="none"))]
    right = Client(PROMPTS[0])
    for client in [*wrong, right]:
        generation.submit(client)
    assert right.wait().error is None and right.tokens > 1
    assert [type(client.wait().error) for client in wrong] == [PromptTooLongError, ValueError, ValueError]


def test_a_client_that_goes_frees_its_place(generation: Generation, engine: ContinuousEngine) -> None:
    """Four that would write thousands of tokens fill the engine; a fifth gets its turn when one of them goes."""
    endless = [Client(PROMPTS[0], ENDLESS, stream=True) for _ in range(4)]
    waiting, fifth = Client(PROMPTS[1], ENDLESS), Client(PROMPTS[2])
    for client in [*endless, waiting, fifth]:
        generation.submit(client)
    assert endless[3].started.wait(60)
    # One that waits, and one that runs.
    waiting.gone.set()
    assert isinstance(waiting.wait().error, CancelledError)
    assert not fifth.started.is_set()
    endless[0].gone.set()
    assert isinstance(endless[0].wait().error, CancelledError)
    assert fifth.wait().error is None
    assert not any(client.done.is_set() for client in endless[1:])
    for client in endless[1:]:
        client.gone.set()
    assert all(isinstance(client.wait().error, CancelledError) for client in endless)
    assert engine.running == engine.waiting == 0


def test_closing_answers_what_is_under_way(engine: ContinuousEngine) -> None:
    generation = Generation(engine, on_failure=lambda error: None)
    clients = [Client(PROMPTS[i % 5]) for i in range(10)]
    for client in clients:
        generation.submit(client)
    generation.close()
    assert all(client.done.is_set() and client.tokens for client in clients)


def test_a_failed_engine_answers_everyone(
    generation: Generation, engine: ContinuousEngine, failures: list[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = engine.model.forward, 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", failing)
    # Some run and some wait when it fails.
    clients = [Client(PROMPTS[0]) for _ in range(8)]
    for client in clients:
        generation.submit(client)
    errors = [client.wait().error for client in clients]
    assert all(isinstance(error, UnhealthyError) for error in errors)
    assert "unavailable: its engine failed with RuntimeError: out of memory; load it anew" in str(errors[0])
    late = Client(PROMPTS[0])
    generation.submit(late)
    assert isinstance(late.wait().error, UnhealthyError)
    assert [str(error) for error in failures] == ["out of memory"]
    assert calls == 8


def test_a_server_that_unloads_no_model_answers_all_the_same(
    engine: ContinuousEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(error: BaseException) -> None:
        raise RuntimeError("models are not unloaded on demand")

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.model, "forward", failing)
    generation = Generation(engine, on_failure=refuse)
    for _ in range(2):
        client = Client(PROMPTS[0])
        generation.submit(client)
        assert isinstance(client.wait().error, UnhealthyError)
    generation.close()


class Unreached(Client):
    """Its third part, or the last before that, cannot be sent."""

    parts = 0

    def answer(self, progress: Progress) -> None:
        self.parts += 1
        if self.parts == 3 or progress.finish_reason is not None:
            raise MemoryError("no shared memory left")
        super().answer(progress)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_misses_a_part_is_told_to_ask_again(
    generation: Generation, engine: ContinuousEngine, stream: bool
) -> None:
    """Instead of a text with a hole, or none for ever; its place is free again."""
    unreached = Unreached(PROMPTS[0], ENDLESS if stream else GREEDY, stream=stream)
    generation.submit(unreached)
    error = unreached.wait().error
    assert isinstance(error, UndeliveredError) and "no shared memory left; ask again" in str(error)
    assert unreached.parts == (3 if stream else 1)
    after = Client(PROMPTS[1])
    generation.submit(after)
    assert after.wait().error is None
    generation.close()
    assert engine.running == engine.waiting == 0
