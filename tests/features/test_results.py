"""What a shard keeps on the disk."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from trackrec.features import results
from trackrec.features.results import Result, ShardLog
from trackrec.journal import Journal


def test_results_are_there_for_the_next_try(tmp_path: Path) -> None:
    async def first() -> None:
        async with ShardLog(tmp_path / "log") as log:
            await log.start()
            for number in range(3):
                log.add(str(number), Result("ok", f"text {number}", 5, 2, "stop", 0.5))

    async def second() -> None:
        async with ShardLog(tmp_path / "log") as log:
            assert log.results == {str(n): Result("ok", f"text {n}", 5, 2, "stop", 0.5) for n in range(3)}
            ((start, end),) = log.spans
            assert start <= end

    asyncio.run(first())
    asyncio.run(second())


def test_a_full_disk_ends_the_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_TOGETHER_SECONDS", 0.0)

    def append(self: Journal, record: dict[str, Any]) -> None:
        raise OSError("No space left on device")

    async def ask() -> None:
        async with ShardLog(tmp_path / "log") as log:
            monkeypatch.setattr(Journal, "append", append)
            for number in range(1000):
                log.add(str(number), Result("ok", "text"))
                await asyncio.sleep(0.01)
            monkeypatch.undo()

    with pytest.raises(OSError, match="No space left"):
        asyncio.run(ask())
