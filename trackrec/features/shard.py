"""One shard of the table: a block of users in, one Parquet file out, which appears whole."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trackrec.features import earlier as earlier_rows
from trackrec.features import table, wire
from trackrec.features.client import is_too_long
from trackrec.features.earlier import Earlier
from trackrec.features.encoding import Encoding, Vector
from trackrec.features.partition import Place
from trackrec.features.prompts import Prompt, bare_history, prompts
from trackrec.features.recovery import Caller, FailedError
from trackrec.features.results import Result, ShardLog
from trackrec.features.table import Identity, ShardFacts

log = logging.getLogger(__name__)

_COMPRESSION = "zstd"
# Rendering prompts, the loop looks after the answers that have come so often.
_YIELD_ROWS = 16


@dataclass(frozen=True)
class Job:
    """What all shards of a job share."""

    identity: Identity
    # The date's folder.
    place: Place
    # Where unfinished shards keep what they have.
    work: Path
    caller: Caller
    earlier: Earlier | None
    # Of requests to the generator.
    slots: asyncio.Semaphore
    encoder_batch: int
    # Takes the rows that are finished.
    advance: Callable[[int], None]


@dataclass(frozen=True)
class ShardCounts:
    rows: int
    copied: int
    generated: int
    status: Counter[str]


def unfinished(work: Path, number: int) -> tuple[Path, Path]:
    """What a shard keeps in `work`: its journal, and its file while it is being written."""
    return work / f"shard-{number:05}.jsonl", work / f"shard-{number:05}.parquet"


async def write_shard(job: Job, number: int, users: pa.Table, fed: asyncio.Event) -> ShardCounts:
    """
    Args:
        users: the block's rows, ascending by user_id.
        fed: set when all requests are with the generator, so that the next shard's can follow.

    Raises:
        JournalBusyError: another process works on this shard.
        OtherModelsError, ServerLostError: see there; what the generator answered is kept.
    """
    path, _ = unfinished(job.work, number)
    async with ShardLog(path) as kept:
        shard = _Shard(job, users, kept)
        try:
            async with asyncio.TaskGroup() as tasks:
                await shard.feed(tasks)
                fed.set()
        except BaseExceptionGroup as group:
            raise _first(group) from group
        await job.caller.same_models()
        content = await asyncio.to_thread(shard.content)
        status = Counter(content["status"].to_pylist())
        facts = ShardFacts(
            identity=job.identity,
            shard=number,
            generated=shard.generated,
            failed=status["failed"],
            spans=kept.spans,
            written=time.time(),
        )
        await asyncio.to_thread(_publish, job, number, content, facts)
    if not facts.failed:
        path.unlink(missing_ok=True)
    return ShardCounts(content.num_rows, len(shard.copied), shard.generated, status)


class _Shard:
    """A shard while it is being filled."""

    def __init__(self, job: Job, users: pa.Table, kept: ShardLog) -> None:
        self.job, self.users, self._kept = job, users, kept
        self.generated = sum(result.seconds is not None for result in kept.results.values())
        # By row: its prompt; by prompt hash: what came of it, and its vector's place.
        self._prompts: list[Prompt] = []
        self._results: dict[str, Result] = {}
        self._unencoded: set[str] = set()
        self._places: dict[str, int] = {}
        self._vectors = np.zeros((users.num_rows, job.identity.width), dtype=job.identity.embedding_dtype)
        self._waiting: Counter[str] = Counter()
        # By row: the earlier row that it is a copy of.
        self.copied: dict[int, int] = {}
        self._earlier: pa.Table | None = None
        self._sampling = wire.sampling_parameters(job.caller.generator)

    async def feed(self, tasks: asyncio.TaskGroup) -> None:
        """Asks for all that is neither kept nor copied; returns when the last request is out."""
        encoding = Encoding(self.job.caller, self.job.encoder_batch, tasks, self._encoded)
        before: Any = {}
        if self.job.earlier:
            self._earlier = await asyncio.to_thread(self.job.earlier.rows, self.users["user_id"].combine_chunks())
            before = earlier_rows.by_user(self._earlier)
        ids = self.users["user_id"].to_pylist() if before else []
        started = False
        asked: list[asyncio.Task[None]] = []
        for prompt in prompts(self.users, self.job.caller.generator):
            self._prompts.append(prompt)
            if prompt.row % _YIELD_ROWS == 0:
                await asyncio.sleep(0)
            if prompt.hash is None or prompt.text is None:
                self.job.advance(1)
                continue
            row, known = before.get(ids[prompt.row], (0, None)) if before else (0, None)
            if known == prompt.hash:
                self.copied[prompt.row] = row
                self.job.advance(1)
                continue
            if prompt.hash in self._results:  # an equal prompt's is there already
                self.job.advance(1)
                continue
            if prompt.hash in self._waiting:
                self._waiting[prompt.hash] += 1
                continue
            if kept := self._kept.results.get(prompt.hash):
                self._came(prompt.hash, kept, encoding)
                self.job.advance(1)
                continue
            if not started:
                await self._kept.start()
                started = True
            self._waiting[prompt.hash] = 1
            await self.job.slots.acquire()
            asked.append(tasks.create_task(self._ask(prompt.hash, prompt.text, encoding)))
        tasks.create_task(self._flush_after(asked, encoding))

    async def _flush_after(self, asked: list[asyncio.Task[None]], encoding: Encoding) -> None:
        if asked:
            await asyncio.wait(asked)
        encoding.flush()

    async def _ask(self, key: str, text: str, encoding: Encoding) -> None:
        seconds = 0.0

        async def attempt(careful: bool) -> wire.Generated:
            nonlocal seconds
            started = time.monotonic()
            generated = await self.job.caller.triton.generate(text, self._sampling, alone=careful)
            seconds = time.monotonic() - started
            return generated

        try:
            answer = await self.job.caller.call(attempt)
            # A prompt that leaves no room for the whole RecCoT would have it cut off.
            fits = answer.prompt_tokens <= self.job.caller.generator.max_prompt_tokens
            if fits:
                result = Result(
                    "ok", answer.text, answer.prompt_tokens, answer.tokens, answer.finish_reason, round(seconds, 4)
                )
            else:
                result = Result("too_long", prompt_tokens=answer.prompt_tokens, seconds=round(seconds, 4))
        except FailedError as error:
            result = Result("too_long" if is_too_long(str(error)) else "failed")
            if result.status == "failed":
                log.warning("a user's RecCoT failed: %s", error)
        finally:
            self.job.slots.release()
        if result.seconds is not None:
            self.generated += 1
        if result.status != "failed":  # the next try asks again
            self._kept.add(key, result)
        self._came(key, result, encoding)
        self.job.advance(self._waiting.pop(key))

    def _came(self, key: str, result: Result, encoding: Encoding) -> None:
        self._results[key] = result
        if result.text is not None:
            encoding.add(key, result.text)

    def _encoded(self, key: str, vector: Vector | None) -> None:
        # Out of float16's range it would be no number.
        converted = None if vector is None else vector.astype(self._vectors.dtype)
        if converted is None or not np.isfinite(converted).all():
            log.warning("a RecCoT's vector failed")
            self._unencoded.add(key)
            return
        place = self._places[key] = len(self._places)
        self._vectors[place] = converted

    def content(self) -> pa.Table:
        """The shard's rows (`table.schema`)."""
        identity = self.job.identity
        schema = table.schema(identity.width, identity.embedding_dtype)
        earlier = [] if self._earlier is None else self._earlier.drop_columns("embedding").to_pylist()
        shown = [self._shown(prompt, earlier) for prompt in self._prompts]
        columns: dict[str, Any] = {name: [] for name in shown[0]}
        for row in shown:
            for name, value in row.items():
                columns[name].append(value)
        rows = len(shown)
        return pa.table(
            [
                self.users["user_id"],
                self.users["as_of"],
                pa.array(columns["status"], pa.string()),
                pa.array(columns["recot"], pa.string()),
                self._embedding(schema.field("embedding").type),
                pa.array([identity.generator_version] * rows, pa.string()),
                pa.array([identity.encoder_version] * rows, pa.string()),
                pa.array([prompt.hash for prompt in self._prompts], pa.string()),
                pa.array(columns["prompt_tokens"], pa.int32()),
                pa.array(columns["recot_tokens"], pa.int32()),
                pa.array(columns["finish_reason"], pa.string()),
                pa.array(columns["seconds"], pa.float32()),
                pa.array([prompt.row in self.copied for prompt in self._prompts], pa.bool_()),
                bare_history(self.users["history"]),
            ],
            schema=schema,
        )

    def _shown(self, prompt: Prompt, earlier: list[dict[str, Any]]) -> dict[str, Any]:
        names = ("status", "recot", "prompt_tokens", "recot_tokens", "finish_reason", "seconds")
        if prompt.row in self.copied:
            row = earlier[self.copied[prompt.row]]
            return {name: row.get(name) for name in names} | {"status": "ok"}
        if prompt.hash is None:
            return dict.fromkeys(names) | {"status": prompt.status}
        result = self._results[prompt.hash]
        if prompt.hash in self._unencoded:
            return dict.fromkeys(names) | {"status": "failed"}
        values = (result.status, result.text, result.prompt_tokens, result.tokens, result.finish_reason, result.seconds)
        return dict(zip(names, values, strict=True))

    def _embedding(self, kind: pa.DataType) -> pa.Array:
        width, dtype = self.job.identity.width, self._vectors.dtype
        vectors = np.zeros((len(self._prompts), width), dtype=dtype)
        missing = np.zeros(len(self._prompts), dtype=bool)
        copies = np.empty((0, width), dtype=dtype)
        if self.copied and self._earlier is not None:
            chunks = self._earlier["embedding"].chunks
            copies = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks])
            copies = copies.reshape(-1, width)
        for prompt in self._prompts:
            if prompt.row in self.copied:
                vectors[prompt.row] = copies[self.copied[prompt.row]]
            elif prompt.hash in self._places:
                vectors[prompt.row] = self._vectors[self._places[prompt.hash]]
            else:
                missing[prompt.row] = True
        values = pa.array(vectors.reshape(-1))
        return pa.FixedSizeListArray.from_arrays(values, type=kind, mask=pa.array(missing))


def _publish(job: Job, number: int, content: pa.Table, facts: ShardFacts) -> None:
    _, waiting = unfinished(job.work, number)
    metadata = {table.FOOTER: facts.model_dump_json().encode()}
    pq.write_table(
        content.replace_schema_metadata(metadata),
        waiting,
        compression=_COMPRESSION,
        # The other columns have hardly two values that are equal.
        use_dictionary=[
            "status",
            "generator_version",
            "encoder_version",
            "finish_reason",
            "history.list.element.item_id",
        ],
    )
    job.place.put_file(table.shard_path(number), waiting)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
