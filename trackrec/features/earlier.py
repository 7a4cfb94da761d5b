"""The newest earlier date's rows, from which unchanged users are copied instead of generated again.

That is only a saving: of a date that cannot be read, as when a file of it was deleted, nothing is copied.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trackrec.features import partition
from trackrec.features.partition import Place
from trackrec.features.table import Identity, Manifest, ShardEntry, date_folder
from trackrec.storage import CorruptError, RemoteError

log = logging.getLogger(__name__)

_COLUMNS = ["user_id", "recot", "embedding", "prompt_hash", "prompt_tokens", "recot_tokens", "finish_reason"]
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Earlier:
    """A committed date of the same models and the same type of vectors."""

    place: Place
    manifest: Manifest

    def rows(self, user_ids: pa.Array) -> pa.Table:
        """The rows "ok" of these users, who ascend; of the files, only those that may hold one are read."""
        first, last = user_ids[0].as_py(), user_ids[-1].as_py()
        found: list[pa.Table] = []
        for shard in self.manifest.shards:
            if shard.last_user < first or shard.first_user > last:
                continue
            try:
                found += self._rows(shard, user_ids)
            except RemoteError:
                raise  # it passes, and another try of the pod copies
            except (OSError, pa.ArrowInvalid) as error:
                log.warning("%s/%s cannot be read; its users are generated: %s", self.place, shard.path, error)
        return pa.concat_tables(found) if found else pa.table({name: [] for name in _COLUMNS})

    def _rows(self, shard: ShardEntry, user_ids: pa.Array) -> Iterator[pa.Table]:
        filesystem, path = self.place.arrow(shard.path)
        with filesystem.open_input_file(path) as source, pq.ParquetFile(source, pre_buffer=False) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[*_COLUMNS, "status"]):
                rows = pa.Table.from_batches([batch])
                wanted = pc.and_(
                    pc.is_in(rows["user_id"], value_set=user_ids), pc.equal(rows["status"], pa.scalar("ok"))
                )
                if pc.any(wanted).as_py():
                    yield rows.filter(wanted).select(_COLUMNS)


def find(out: Place, identity: Identity) -> Earlier | None:
    """None where no earlier date is committed, or the newest is another model's, whose RecCoTs are none of ours.

    Raises:
        RemoteError: `out` cannot be read.
    """
    dt = partition.newest(out, before=identity.dt)
    try:
        manifest = partition.read_manifest(out, dt) if dt else None
    except CorruptError as error:
        log.warning("nothing is copied: %s", error)
        return None
    if dt is None or manifest is None or _models(manifest.identity) != _models(identity):
        return None
    return Earlier(out / date_folder(dt), manifest)


def by_user(rows: pa.Table) -> Mapping[str, tuple[int, str]]:
    """Each user's row number and prompt hash."""
    ids, hashes = rows["user_id"].to_pylist(), rows["prompt_hash"].to_pylist()
    return {user: (row, prompt) for row, (user, prompt) in enumerate(zip(ids, hashes, strict=True))}


def _models(identity: Identity) -> dict[str, Any]:
    return identity.model_dump(include={"generator_version", "encoder_version", "width", "embedding_dtype"})
