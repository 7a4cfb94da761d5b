"""A committed date of the feature table (`trackrec.features`) as arrays that a ranker's processes map into memory.

Built once for a date and a ranker, by whichever process is first; the others find it. All in it is as the ranker takes
it: histories as numbers, RecCoTs as the connector's output. So a user costs a search and one gather an array.
"""

import contextlib
import hashlib
import io
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from trackrec.features import table as features
from trackrec.features.partition import Place
from trackrec.serving.scorer import Scorer, Users
from trackrec.storage.downloading import alone

# Rows in memory while a table is built.
_ROWS = 4096
# By hash: its users' rows. By row: where the id begins. The ids, one after the other.
_HASH, _ROW, _STARTS, _IDS = "hash.npy", "row.npy", "starts.npy", "ids.npy"
# By row; row 0 is nobody's.
_USERS = tuple(f"{name}.npy" for name in Users._fields)
# A folder that no process has looked at for so long belongs to none.
_KEPT_SECONDS = 3600.0
# What follows a Parquet file's footer: its length (4 bytes) and a mark.
_TAIL = 8


class FeatureTableError(ValueError):
    """A date that must not be served; the message says what is wrong with it."""


class FeatureTable:
    """One date's users; in memory is only what was asked for, and that once for all processes.

    Args:
        folder: what `open_or_build` made.
    """

    def __init__(self, folder: Path, dt: str) -> None:
        self.folder, self.dt = folder, dt
        self._hash, self._row, self._starts, self._ids = (_mapped(folder / n) for n in (_HASH, _ROW, _STARTS, _IDS))
        self._users = [_mapped(folder / name) for name in _USERS]

    def __len__(self) -> int:
        return len(self._hash)

    def rows(self, user_ids: Sequence[bytes]) -> np.ndarray:
        """int64 [n]: each user's row (ids in UTF-8), 0 of one that the date does not have."""
        hashes = np.array([hash_of(user) for user in user_ids], dtype=np.uint64)
        places = np.searchsorted(self._hash, hashes).tolist()
        found = [
            self._row_of(user, hashes[k], place) for k, (user, place) in enumerate(zip(user_ids, places, strict=True))
        ]
        return np.array(found, dtype=np.int64)

    def users(self, rows: np.ndarray) -> Users:
        """What is known of the users of these rows; of row 0 nothing."""
        return Users(*(torch.from_numpy(part[rows]) for part in self._users))

    def _row_of(self, user: bytes, hashed: np.uint64, place: int) -> int:
        # Two users may share a hash: the id decides.
        while place < len(self._hash) and self._hash[place] == hashed:
            row = int(self._row[place])
            if self._ids[self._starts[row - 1] : self._starts[row]].tobytes() == user:
                return row
            place += 1
        return 0


def hash_of(user: bytes) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(user, digest_size=8).digest(), "little")


def open_or_build(
    date: Place,
    manifest: features.Manifest,
    scorer: Scorer,
    *,
    version: str,
    encoder_version: str | None,
    cache: Path,
) -> FeatureTable:
    """A committed date's arrays for a ranker, from `cache`, or built there: whole or not at all, by one process.

    Args:
        date: the date's folder.
        version: the ranker's content hash.
        encoder_version: whose vectors it takes; None of a ranker without RecCoTs.

    Raises:
        FeatureTableError: the date is not what its manifest says, or its vectors are not the ranker's.
        OSError: a file cannot be read or written.
    """
    dt = manifest.identity.dt
    key = hashlib.sha256(f"{manifest.model_dump_json()}\n{version}\n{encoder_version}".encode()).hexdigest()
    folder = cache / f"dt={dt}-{key[:32]}"
    with alone(folder):
        with contextlib.suppress(FileNotFoundError):
            os.utime(folder)
            try:
                return FeatureTable(folder, dt)
            except (FileNotFoundError, ValueError):  # cut short: the machine went down before its disk had all
                shutil.rmtree(folder)
        waiting = Path(tempfile.mkdtemp(prefix=".building-", dir=cache))
        try:
            _build(date, manifest, scorer, encoder_version, waiting)
            waiting.rename(folder)
        except BaseException:
            shutil.rmtree(waiting, ignore_errors=True)
            raise
        return FeatureTable(folder, dt)


def remove_unused(cache: Path, seconds: float = _KEPT_SECONDS) -> None:
    """Removes folders that no process has touched for `seconds`; one that still maps such a folder keeps its pages."""
    for folder in (*cache.glob("dt=*"), *cache.glob(".building-*"), *cache.glob(".removing-*")):
        with contextlib.suppress(FileNotFoundError):
            if folder.stat().st_mtime < time.time() - seconds:
                # Renamed first: whoever opens it finds all of it, or nothing and builds it anew.
                gone = folder if folder.name.startswith(".") else folder.rename(cache / f".removing-{folder.name}")
                shutil.rmtree(gone)


def _build(date: Place, manifest: features.Manifest, scorer: Scorer, encoder_version: str | None, out: Path) -> None:
    """Writes the arrays; of the whole date only the hashes and where the ids begin are in memory at once."""
    found, width, total = manifest.identity, scorer.config.vocabulary.vector_width, manifest.rows
    if encoder_version is not None and (found.encoder_version, found.width) != (encoder_version, width):
        raise FeatureTableError(
            f"its vectors are of encoder {found.encoder_version}, width {found.width}; the ranker was trained on those "
            f"of {encoder_version}, width {width}: write the features with the encoder of the ranker's export"
        )
    columns = ["user_id", "history"] + (["embedding", "encoder_version"] if encoder_version is not None else [])
    nobody = [part.numpy() for part in scorer.no_one()]
    hashes, starts = np.empty(total, dtype=np.uint64), np.zeros(total + 1, dtype=np.int64)
    done, last = 0, None
    with contextlib.ExitStack() as files:
        writers = [
            files.enter_context(_Writer(out / name, (total + 1, part.shape[1]), part.dtype))
            for name, part in zip(_USERS, nobody, strict=True)
        ]
        ids = files.enter_context((out / "ids").open("wb"))
        for writer, part in zip(writers, nobody, strict=True):
            writer.write(part)
        for batch in _batches(date, manifest, columns):
            os.utime(out)  # or `remove_unused` would take a long build for one that was killed
            if batch["user_id"].null_count:
                raise FeatureTableError("it has rows without a user; write the date's shards again")
            names = [name.encode() for name in batch["user_id"].to_pylist()]
            if not all(a < b for a, b in itertools.pairwise(names if last is None else [last, *names])):
                raise FeatureTableError("its users are not in their order, each once; write the date's shards again")
            last, rows = names[-1], slice(done, done + len(names))
            hashes[rows] = [hash_of(name) for name in names]
            starts[rows.start + 1 : rows.stop + 1] = starts[done] + np.cumsum([len(name) for name in names])
            ids.write(b"".join(names))
            parts = scorer.numbering.histories(batch["history"], scorer.length)
            recots = np.empty((len(names), 0), dtype=np.float32)
            if encoder_version is not None:
                recots = scorer.recots(*_vectors(batch, width, encoder_version))
            for writer, part in zip(writers, (*parts, recots), strict=True):
                writer.write(part)
            done = rows.stop
    order = np.argsort(hashes, kind="stable")
    np.save(out / _HASH, hashes[order])
    np.save(out / _ROW, (order + 1).astype(np.int32))
    np.save(out / _STARTS, starts)
    with _Writer(out / _IDS, (int(starts[-1]),), np.dtype(np.uint8)) as writer, (out / "ids").open("rb") as written:
        shutil.copyfileobj(written, writer.file)
    (out / "ids").unlink()


def _batches(date: Place, manifest: features.Manifest, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of all shards, in their order.

    Raises:
        FeatureTableError: a shard is not there, or not as the manifest has it.
    """
    sizes = date.files()
    if sum(shard.rows for shard in manifest.shards) != manifest.rows:
        raise FeatureTableError(f"its shards do not make up the {manifest.rows} rows of {features.MANIFEST}")
    for shard in manifest.shards:
        if sizes.get(shard.path) != shard.bytes:
            raise FeatureTableError(
                f"{date}/{shard.path} has {sizes.get(shard.path, 'no')} bytes, {features.MANIFEST} says {shard.bytes}; "
                "write the shard again and commit the date again"
            )
        filesystem, path = date.arrow(shard.path)
        try:
            with filesystem.open_input_file(path) as source, _opened(source) as file:
                if missing := set(columns) - set(file.schema_arrow.names):
                    raise FeatureTableError(f"{date}/{shard.path} lacks the columns {', '.join(sorted(missing))}")
                if file.metadata.num_rows != shard.rows:
                    raise FeatureTableError(f"{date}/{shard.path} has {file.metadata.num_rows} rows, not {shard.rows}")
                yield from (batch for batch in file.iter_batches(_ROWS, columns=columns) if batch.num_rows)
        except pa.ArrowException as error:
            raise FeatureTableError(f"{date}/{shard.path} cannot be read: {error}; write it again") from error


def _opened(source: pa.NativeFile) -> pq.ParquetFile:
    """The file with vectors as lists of any length.

    The server's numpy is older than the newest Arrow takes, and Arrow before 26 cannot read a list of fixed length that
    is null. That the length is fixed stands in Arrow's own schema in the footer; under another name nobody reads it.
    """
    size = source.size()
    if size < _TAIL:
        raise pa.ArrowInvalid("it is no Parquet file")
    footer = int.from_bytes(source.read_at(4, size - _TAIL), "little")
    if footer > size - _TAIL:
        raise pa.ArrowInvalid("it is no Parquet file")
    content = source.read_at(footer + _TAIL, size - footer - _TAIL)
    metadata = pq.read_metadata(io.BytesIO(content.replace(b"ARROW:schema", b"ARROW:hidden")))
    return pq.ParquetFile(source, metadata=metadata)


def _vectors(batch: pa.RecordBatch, width: int, encoder_version: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 [R, width], zeros where there is none, and where there is one, bool [R]."""
    column = batch["embedding"]
    present = column.is_valid().to_numpy(zero_copy_only=False)
    others = pc.unique(batch["encoder_version"].filter(column.is_valid())).to_pylist()
    if set(others) - {encoder_version}:
        raise FeatureTableError(f"it has vectors of the encoders {others}; the ranker takes those of {encoder_version}")
    vectors = np.zeros((batch.num_rows, width), dtype=np.float32)
    if set(pc.unique(pc.list_value_length(column)).to_pylist()) - {None, width}:
        raise FeatureTableError(f"it has vectors of another width than {width}; encode these users again")
    vectors[present] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    if not np.isfinite(vectors).all():
        raise FeatureTableError("it has vectors with numbers that are not finite; encode these users again")
    return vectors, present


class _Writer:
    """An array on the disk, written row after row."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.file, self.dtype = path.open("wb"), dtype
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def write(self, rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


def _mapped(path: Path) -> np.ndarray:
    # "c": pages are shared as long as nobody writes, and torch takes no array that must not be written.
    return np.asarray(np.load(path, mmap_mode="c"))
