"""The whole job: users in, a date's shards out, and the commit. Several pods run it side by side, each its shards."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from trackrec import storage
from trackrec.features import earlier, partition, table, wire
from trackrec.features.client import Triton
from trackrec.features.commit import refusal, shard_facts
from trackrec.features.partition import Place
from trackrec.features.recovery import Caller, OtherModelsError
from trackrec.features.shard import Job, ShardCounts, unfinished, write_shard
from trackrec.features.table import Identity
from trackrec.features.users import Users, open_users
from trackrec.progress import track
from trackrec.serving.contract import EncoderContract, GeneratorContract
from trackrec.serving_config import FeaturesSettings
from trackrec.shards import WHOLE, Shard

# While the last RecCoTs of one are written, the next one's requests keep the generator busy.
_OPEN_SHARDS = 3


@dataclass
class Done:
    """What a call of `run_shards` did; shards that were there already are not in the counts."""

    identity: Identity
    rows: int = 0
    copied: int = 0
    generated: int = 0
    status: Counter[str] = field(default_factory=Counter)
    # Shards of an earlier try.
    skipped: int = 0

    def add(self, counts: ShardCounts) -> None:
        self.rows += counts.rows
        self.copied += counts.copied
        self.generated += counts.generated
        self.status += counts.status


def run_shards(settings: FeaturesSettings, users: Path, out: str, dt: str, shard: Shard = WHOLE) -> Done:
    """Writes the date's shards k with k % `shard.of` == `shard.number`, but for those that are there.

    Killed, it goes on when called again: finished shards are skipped, and of the others only those RecCoTs are asked
    for again that were under way. So are those that failed, until the date is committed.

    Args:
        users: a published directory with table `users`, a Parquet file, or a folder of such.
        out: the table's place, a folder or `gs://bucket/path`.
        dt: the date YYYY-MM-DD.

    Raises:
        CommitError: the date is committed with other users, models or settings.
        ContractError: the served models were not exported by `export`, or by another release.
        JournalBusyError: another process works on the same shards.
        RemoteError: `out` cannot be read or written.
        SchemaError, UsersError: the users' table cannot be used.
        OtherModelsError: Triton serves other models than at the start; its unfinished shards are to be begun anew.
        ServerLostError: Triton is gone and does not come back; nothing that it answered is lost.
    """
    table.date_folder(dt)
    opened = open_users(users, storage.work_root() / "features")
    return asyncio.run(_run(settings, opened, Place(out), dt, shard))


async def _run(settings: FeaturesSettings, users: Users, out: Place, dt: str, shard: Shard) -> Done:
    async with (
        Triton(settings.triton) as triton,
        Caller(triton, deadline_s=settings.deadline_s, retries=settings.retries) as caller,
    ):
        identity = _identity(settings, users, dt, caller.generator, caller.encoder)
        await asyncio.to_thread(users.check_domain, caller.generator.domain)
        place = out / table.date_folder(dt)
        committed = await asyncio.to_thread(partition.read_manifest, out, dt)
        if committed is not None and committed.identity != identity:
            raise refusal(place)
        there = await asyncio.to_thread(shard_facts, place)
        own = range(shard.number, users.num_blocks(settings.shard_users), shard.of)
        found = [number for number in own if number in there and there[number].identity == identity]
        # Those whom the server failed are asked for again, the others of their shards are kept.
        skipped = [number for number in found if committed is not None or not there[number].failed]
        done = Done(identity, skipped=len(skipped))
        work = work_folder(identity, out)
        _clear(work, skipped)
        if committed is not None or len(skipped) == len(own):
            return done
        work.mkdir(parents=True, exist_ok=True)
        total = sum(min(settings.shard_users, users.rows - number * settings.shard_users) for number in own)
        with track(iter(()), f"RecCoTs of {dt}", total=total, unit="user") as bar:
            bar.update(sum(min(settings.shard_users, users.rows - k * settings.shard_users) for k in skipped))
            job = Job(
                identity=identity,
                place=place,
                work=work,
                caller=caller,
                earlier=await asyncio.to_thread(earlier.find, out, identity),
                slots=asyncio.Semaphore(settings.concurrency),
                encoder_batch=settings.encoder_batch,
                advance=lambda rows: _advance(bar, rows),
            )
            try:
                await _write_all(job, users.blocks(settings.shard_users, shard, skipped), done)
            except OtherModelsError:
                # What unfinished shards have may be the others', and must not be gone on with when these are back.
                _clear(work, own)
                raise
        _clear(work)
        return done


def work_folder(identity: Identity, out: Place) -> Path:
    """Where all pods of a job keep what their unfinished shards have."""
    return storage.work_root() / f"features/{_hash([identity.model_dump(), str(out)])[:16]}"


def _clear(work: Path, finished: Sequence[int] = ()) -> None:
    """Removes what `finished` shards have left in `work`, killed after their file was there, and `work` once empty."""
    for number in finished:
        for left in unfinished(work, number):
            left.unlink(missing_ok=True)
    with suppress(OSError):  # other pods keep theirs there
        work.rmdir()


def _advance(bar: "tqdm[Any]", rows: int) -> None:
    bar.update(rows)


async def _write_all(job: Job, blocks: Iterator[tuple[int, pa.Table]], done: Done) -> None:
    opened = asyncio.Semaphore(_OPEN_SHARDS)

    async def write(number: int, users: pa.Table, fed: asyncio.Event) -> None:
        try:
            done.add(await write_shard(job, number, users, fed))
        finally:
            opened.release()

    try:
        async with asyncio.TaskGroup() as tasks:
            while True:
                await opened.acquire()
                block = await asyncio.to_thread(next, blocks, None)
                if block is None:
                    break
                fed = asyncio.Event()
                tasks.create_task(write(*block, fed))
                del block
                await fed.wait()
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group


def _identity(
    settings: FeaturesSettings, users: Users, dt: str, generator: GeneratorContract, encoder: EncoderContract
) -> Identity:
    return Identity(
        dt=dt,
        users=users.content_hash,
        num_users=users.rows,
        shard_users=settings.shard_users,
        generator_version=generator.model_version,
        encoder_version=encoder.model_version,
        width=encoder.width,
        embedding_dtype=settings.embedding_dtype,
        generation=_hash([generator.model_dump(mode="json"), wire.sampling_parameters(generator)]),
    )


def _hash(what: list[Mapping[str, object] | str]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
