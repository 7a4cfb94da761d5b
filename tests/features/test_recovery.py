"""Whose failure it is, with a server whose troubles come in an order that a real one cannot be told to keep."""

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from trackrec.features import recovery
from trackrec.features.client import RequestError, TroubleError
from trackrec.features.recovery import Caller, OtherModelsError, ServerLostError


class Scripted:
    """Answers each kind of call as the script for it says, and well when that has ended."""

    address = "here"
    connection = 0
    models: Any

    def __init__(self, *, probes: Iterable[bool] = (), contracts: Iterable[bool] = ()) -> None:
        self._probes, self._contracts = iter(probes), iter(contracts)
        self.models = Model, Model

    async def generate(self, *_: Any, alone: bool = False) -> str:
        return self._answer(self._probes)

    async def contracts(self) -> tuple[Any, Any]:
        self._answer(self._contracts)
        return self.models

    async def encode(self, *_: Any) -> None: ...

    async def served(self, _: str) -> int:
        return 1

    async def reload(self, *_: Any) -> None: ...

    def abort(self) -> None: ...

    def _answer(self, well: Iterable[bool]) -> str:
        if not next(iter(well), True):
            raise TroubleError("UNAVAILABLE: failed to connect")
        return "answer"


class Model:
    opening = closing = ""
    width = 1


def called(triton: Any, attempts: list[tuple[float, bool]], *, deadline_s: float, retries: int = 1) -> str:
    """What comes of a call whose attempts take so many seconds and end well or not."""
    script = iter(attempts)

    async def attempt(_: bool) -> str:
        seconds, well = next(script)
        await asyncio.sleep(seconds)
        if not well:
            raise TroubleError("UNAVAILABLE: Socket closed")
        return "answer"

    async def run() -> str:
        async with Caller(triton, deadline_s=deadline_s, retries=retries) as caller:
            return await caller.call(attempt)

    return asyncio.run(run())


def test_a_call_has_its_whole_time_again_when_the_server_was_lost() -> None:
    assert called(Scripted(probes=[False]), [(0.6, False), (0.6, True)], deadline_s=1) == "answer"


def test_a_server_that_is_lost_again_before_it_is_well_costs_no_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_FIRST_PAUSE_SECONDS", 0.01)
    # At the start its contracts are there, twice; when it comes back, the second time.
    # Between these, before each probe.
    triton = Scripted(probes=[False, True], contracts=[True, True, True, True, False])
    assert called(triton, [(0, False), (0, False), (0, True)], deadline_s=10) == "answer"


class Release(Model):
    """Another version."""


@pytest.mark.parametrize("refused", [False, True])
def test_what_came_over_a_connection_to_another_version_does_not_count(refused: bool) -> None:
    triton = Scripted()

    async def attempt(_: bool) -> str:
        triton.connection, triton.models = 1, (Release, Model)
        if refused:
            raise RequestError("INVALID_ARGUMENT: too long for me")
        return "the other's answer"

    async def run() -> None:
        async with Caller(triton, deadline_s=5, retries=1) as caller:
            with pytest.raises(OtherModelsError, match="run it again"):
                await caller.call(attempt)

    asyncio.run(run())


def test_what_another_version_answered_does_not_count_though_the_first_is_back() -> None:
    triton = Scripted()
    answers = iter(["the other's answer", "answer"])

    async def attempt(_: bool) -> str:
        answer = next(answers)
        # There and back, with no error and before anyone looks.
        triton.connection += 2 if answer != "answer" else 0
        return answer

    async def run() -> str:
        async with Caller(triton, deadline_s=5, retries=1) as caller:
            return await caller.call(attempt)

    assert asyncio.run(run()) == "answer"


def test_a_connection_that_broke_with_nothing_under_way_is_looked_behind_first() -> None:
    triton = Scripted()

    async def attempt(_: bool) -> str:
        raise AssertionError("it went to another version")

    async def run() -> None:
        async with Caller(triton, deadline_s=5, retries=1) as caller:
            triton.connection, triton.models = 1, (Release, Model)
            with pytest.raises(OtherModelsError):
                await caller.call(attempt)

    asyncio.run(run())


def test_other_models_behind_the_same_connection_are_found_before_a_shard_is_published() -> None:
    triton = Scripted()

    async def run() -> None:
        async with Caller(triton, deadline_s=5, retries=1) as caller:
            await caller.same_models()
            triton.models = Model, Release
            with pytest.raises(OtherModelsError):
                await caller.same_models()

    asyncio.run(run())


def test_a_connection_that_never_lasts_is_given_up() -> None:
    class Breaking(Scripted):
        async def contracts(self) -> tuple[Any, Any]:
            self.connection += 1
            return self.models

    with pytest.raises(ServerLostError, match="the connection was lost 5 times"):
        called(Breaking(), [], deadline_s=0.3)
