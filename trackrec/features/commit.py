"""A date's shards made one partition: checked, counted, and marked last as what readers may use."""

import datetime
import functools
import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trackrec.features import partition, table
from trackrec.features.partition import Place
from trackrec.features.table import FOOTER, STATUSES, Identity, Manifest, Quantiles, ShardEntry, ShardFacts
from trackrec.serving_config import FeaturesSettings
from trackrec.storage import gcs

_COUNTED = ["user_id", "status", "copied", "prompt_tokens", "recot_tokens", "seconds"]
# Where and how a job ran, not what it made.
_NOT_KEPT = {"triton", "out", "concurrency", "encoder_batch", "deadline_s", "retries", "max_failed"}


class CommitError(ValueError):
    """A date that cannot be committed, or is committed already with other rows; the message says what to do."""


def commit(settings: FeaturesSettings, out: str, dt: str, users: str | None = None) -> Manifest:
    """Writes the date's manifest and marker; of a date that is committed with the same rows, gives the manifest.

    Args:
        users: content hash of the table that the date is for (`Identity.users`); without one, the newest shard's.

    Raises:
        CommitError: a shard is missing or is of another job, users are not in order, no user has a RecCoT, too many
            failed, or other rows are committed.
        RemoteError: `out` cannot be read or written.
    """
    place = Place(out) / table.date_folder(dt)
    committed = partition.read_manifest(Place(out), dt)
    if committed is not None and users not in (None, committed.identity.users):
        raise refusal(place)
    facts = shard_facts(place)
    identity = _identity(facts, place, users)
    expected = -(-identity.num_users // identity.shard_users)
    missing = [number for number in range(expected) if number not in facts]
    if missing:
        raise CommitError(
            f"{place}: {len(missing)} of {expected} shards are missing, the first is {table.shard_path(missing[0])}; "
            "run the job for them, then commit again"
        )
    if committed is None:
        for number in facts.keys() - set(range(expected)):  # of an earlier job with smaller shards
            place.delete(table.shard_path(number))
    manifest = _manifest(settings, place, identity, [facts[number] for number in range(expected)])
    if committed is not None:
        if _same(committed, manifest):
            return committed
        raise refusal(place)
    counts = ", ".join(f"{count} {name}" for name, count in manifest.status.items() if count)
    if not manifest.status["ok"]:
        raise CommitError(
            f"{place}: no user has a RecCoT ({counts}), and rankers would lose those of earlier dates. The job's log "
            "says why; mend the server or the users' table and run the job again"
        )
    if manifest.status["failed"] > settings.max_failed * manifest.rows:
        raise CommitError(
            f"{place}: more users failed ({counts}) than the share `features.max_failed` allows "
            f"({settings.max_failed:g}), and rankers would lose their RecCoTs of earlier dates. The job's log says "
            "why; mend the server and run the job again, which asks for those that failed, or allow more"
        )
    written = manifest.model_dump_json(indent=2).encode() + b"\n"
    place.put(table.MANIFEST, written)
    place.put(table.SUCCESS, hashlib.sha256(written).hexdigest().encode() + b"\n")
    return manifest


def refusal(place: Place) -> CommitError:
    return CommitError(
        f"{place} is committed, with other users, models or settings, and readers use it; name another date, or delete "
        f"{place}/{table.SUCCESS} and run again to replace it"
    )


def shard_facts(place: Place) -> dict[int, ShardFacts]:
    """What the shards' files in a date's folder say of themselves, by number; files of nobody's are left out."""
    paths = [name for name in place.files() if name.endswith("/part.parquet")]
    found = gcs.in_parallel([functools.partial(_facts, place, path) for path in sorted(paths)])
    return {facts.shard: facts for path, facts in zip(sorted(paths), found, strict=True) if facts is not None}


def _facts(place: Place, path: str) -> ShardFacts | None:
    filesystem, inside = place.arrow(path)
    try:
        with filesystem.open_input_file(inside) as source:
            metadata = pq.read_metadata(source).metadata or {}
        facts = ShardFacts.model_validate_json(metadata[FOOTER])
    except (KeyError, ValueError):  # another program's; ArrowInvalid among them
        return None
    return facts if table.shard_path(facts.shard) == path else None


def _identity(facts: dict[int, ShardFacts], place: Place, users: str | None) -> Identity:
    candidates = [each for each in facts.values() if users in (None, each.identity.users)]
    if not candidates:
        raise CommitError(f"{place} holds no shard of these users; run the job, then commit")
    # The job in question is the one that wrote the last; another's files are what an earlier try has left.
    newest = max(candidates, key=lambda each: each.written).identity
    other = [number for number, each in facts.items() if each.identity != newest]
    count = -(-newest.num_users // newest.shard_users)
    wrong = sorted(number for number in other if number < count)
    if wrong:
        raise CommitError(
            f"{place}/{table.shard_path(wrong[0])} is of other users, models or settings than the newest shard; run "
            "the job again, which replaces it, then commit"
        )
    return newest


def _manifest(settings: FeaturesSettings, place: Place, identity: Identity, facts: Sequence[ShardFacts]) -> Manifest:
    sizes = place.files()
    status: Counter[str] = Counter()
    lengths: dict[str, list[np.ndarray]] = {"prompt_tokens": [], "recot_tokens": [], "seconds": []}
    entries: list[ShardEntry] = []
    copied = 0
    for number, _ in enumerate(facts):
        path = table.shard_path(number)
        filesystem, inside = place.arrow(path)
        rows = pq.read_table(inside, columns=_COUNTED, filesystem=filesystem, partitioning=None)
        expected = min(identity.shard_users, identity.num_users - number * identity.shard_users)
        ids = rows["user_id"].combine_chunks()
        _check_rows(ids, expected, entries[-1].last_user if entries else None, f"{place}/{path}")
        for each in rows["status"].value_counts().to_pylist():
            status[each["values"]] += each["counts"]
        copied += pc.sum(rows["copied"]).as_py() or 0
        ok = rows.filter(pc.equal(rows["status"], "ok"))
        for name, found in lengths.items():
            found.append(ok[name].drop_null().to_numpy())
        entries.append(
            ShardEntry(
                path=path, rows=rows.num_rows, bytes=sizes[path], first_user=ids[0].as_py(), last_user=ids[-1].as_py()
            )
        )
    worked = round(_union([span for each in facts for span in each.spans]), 3)
    cost = None if settings.usd_per_hour is None else settings.usd_per_hour * worked / 3600 / identity.num_users * 1000
    return Manifest(
        identity=identity,
        committed=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        rows=identity.num_users,
        status={name: status[name] for name in STATUSES},
        copied=copied,
        generated=sum(each.generated for each in facts),
        **{name: _quantiles(np.concatenate(found)) for name, found in lengths.items()},
        generator_seconds=worked,
        usd_per_hour=settings.usd_per_hour,
        usd_per_1000_users=cost,
        settings=settings.model_dump(mode="json", exclude=_NOT_KEPT),
        shards=entries,
    )


def _check_rows(ids: pa.Array, expected: int, last: str | None, path: str) -> None:
    if len(ids) != expected:
        raise CommitError(f"{path} has {len(ids)} rows, {expected} are expected; delete it and run the job again")
    ascending = pc.all(pc.less(ids[:-1], ids[1:])).as_py() if len(ids) > 1 else True
    if not ascending or (last is not None and ids[0].as_py() <= last):
        raise CommitError(f"{path}: its users do not ascend; delete it and run the job again")


def _quantiles(values: np.ndarray) -> Quantiles | None:
    if not len(values):
        return None
    p50, p95, p99 = (round(float(value), 4) for value in np.quantile(values, [0.5, 0.95, 0.99]))
    return Quantiles(p50=p50, p95=p95, p99=p99, mean=round(float(values.mean(dtype=np.float64)), 4))


def _union(spans: Sequence[tuple[float, float]]) -> float:
    """How long at least one of `spans` lasts, seconds."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _same(committed: Manifest, now: Manifest) -> bool:
    kept = {"identity", "rows", "status", "copied", "generated", "shards"}
    return committed.model_dump(include=kept) == now.model_dump(include=kept)
