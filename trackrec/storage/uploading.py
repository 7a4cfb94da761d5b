"""A directory into a bucket: in parallel, going on where a killed upload stopped, checked, then published.

A small file is one request. A large one goes up in parts, several at once, that Cloud Storage then composes into one
object. The parts that a killed upload has left are found by names and checksums, so nothing need be kept here.
"""

import contextlib
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trackrec.storage import gcs, marker
from trackrec.storage.gcs import Content, Location, Stored, explained, in_parallel
from trackrec.storage.marker import Marker
from trackrec.storage.publication import MANIFEST, CorruptError, OccupiedError, read_manifest

if TYPE_CHECKING:
    from google.cloud.storage import Blob

# How many objects one request composes.
_COMPOSED = 32
_HASHED = 2**20


@dataclass(frozen=True)
class _File:
    path: Path
    sha256: str
    content: Content


def upload(directory: Path, place: Location, replace: bool) -> Location:
    """See `trackrec.storage.upload`."""
    files = _read(directory)
    new = Marker.of(
        {name: file.sha256 for name, file in files.items()}, {name: file.content for name, file in files.items()}
    )
    found = marker.read(place)
    if found and found[0].content == new.content:
        return place / found[0].folder
    if found and not replace:
        raise OccupiedError(f"{place} holds another publication; name another place, or ask to replace it")
    folder, scratch = place / new.folder, place / marker.scratch_of(new.folder)
    there, parts = gcs.objects(folder), gcs.objects(scratch)
    missing = {name: file for name, file in files.items() if name not in there or there[name].content != file.content}
    last = missing.pop(MANIFEST, None)
    small = {name: file for name, file in missing.items() if file.content.size <= gcs.PART}
    large = {name: file for name, file in missing.items() if file.content.size > gcs.PART}
    in_parallel(
        [functools.partial(_put, file, folder / name, there.get(name)) for name, file in small.items()]
        + [
            functools.partial(
                _put_part, file, part, scratch / _part_name(name, part), parts.get(_part_name(name, part))
            )
            for name, file in large.items()
            for part in gcs.parts(file.content.size)
        ]
    )
    in_parallel(
        functools.partial(_compose, file, name, folder / name, scratch, there.get(name)) for name, file in large.items()
    )
    if last:  # Kubeflow copies the folder without the marker: this tells a stage that it is whole.
        _put(last, folder / MANIFEST, there.get(MANIFEST))
    now = marker.write(place, new, found[1] if found else 0)
    _clear(scratch)
    return place / now.folder


def _read(directory: Path) -> dict[str, _File]:
    """The files of `directory` by their names in it, each read once.

    Raises:
        FileNotFoundError: it holds none, or is no folder.
        CorruptError: it is a stage's output and a file differs from its manifest.
    """
    paths = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no folder; name the one that holds what is to be uploaded")
    if not paths:
        raise FileNotFoundError(f"{directory} holds no file to upload")
    files = dict(zip(paths, in_parallel(functools.partial(_hashed, path) for path in paths.values()), strict=True))
    if MANIFEST in files:
        for name, sha256 in read_manifest(directory).files.items():
            if name not in files or files[name].sha256 != sha256:
                raise CorruptError(f"{directory / name} is missing or differs from its checksum; nothing was published")
    return files


def _hashed(path: Path) -> _File:
    import google_crc32c

    digest, checksum, size = hashlib.sha256(), 0, 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_HASHED):
            digest.update(data)
            checksum = google_crc32c.extend(checksum, data)
            size += len(data)
    return _File(path, digest.hexdigest(), Content(size=size, crc32c=gcs.written(checksum)))


def _put(file: _File, target: Location, there: Stored | None) -> None:
    data = file.path.read_bytes()
    if Content(size=len(data), crc32c=gcs.crc32c(data)) != file.content:
        raise CorruptError(f"{file.path} has changed while it was uploaded; nothing was published")
    _send(data, target, there)


def _put_part(file: _File, part: range, target: Location, there: Stored | None) -> None:
    with file.path.open("rb") as opened:
        opened.seek(part.start)
        data = opened.read(len(part))
    if there is None or there.content != Content(size=len(data), crc32c=gcs.crc32c(data)):
        _send(data, target, there)


def _send(data: bytes, target: Location, there: Stored | None) -> None:
    """Writes one object; Cloud Storage's checksum of what it has must be that of `data`."""
    from google.api_core.exceptions import PreconditionFailed
    from google.cloud.storage.exceptions import DataCorruption

    blob = target.blob()
    with explained(target, "write"):
        try:
            blob.upload_from_string(data, checksum="crc32c", if_generation_match=there.generation if there else 0)
        except PreconditionFailed:  # another upload of the same files, or the first try of this one
            blob.reload()
        except DataCorruption as error:
            raise CorruptError(f"{target} arrived with another checksum; upload again") from error
    if blob.crc32c != gcs.crc32c(data):
        raise CorruptError(f"{target} arrived with another checksum; upload again")


def _compose(file: _File, name: str, target: Location, scratch: Location, there: Stored | None) -> None:
    """Makes one object of a file's parts."""
    from google.api_core.exceptions import NotFound, PreconditionFailed
    from google.cloud.storage.retry import DEFAULT_RETRY

    sources = [(scratch / _part_name(name, part)).blob() for part in gcs.parts(file.content.size)]
    blob = target.blob()
    with explained(target, "compose its parts"):
        try:
            sources = _fewer(sources, scratch, name)
            blob.compose(sources, if_generation_match=there.generation if there else 0, retry=DEFAULT_RETRY)
        except (
            NotFound,
            PreconditionFailed,
        ):  # another upload of the same files has composed it, and cleared its parts
            pass
        blob.reload()
    if blob.crc32c != file.content.crc32c:
        raise CorruptError(f"{target} arrived with another checksum, or {file.path} has changed; upload again")


def _fewer(sources: Sequence["Blob"], scratch: Location, name: str) -> list["Blob"]:
    """Objects in a row of the same bytes, few enough for one request."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    level = 0
    while len(sources) > _COMPOSED:
        groups = [sources[start : start + _COMPOSED] for start in range(0, len(sources), _COMPOSED)]
        joined = [(scratch / f"{name}/joined-{level}-{index:05}").blob() for index in range(len(groups))]
        for blob, group in zip(joined, groups, strict=True):
            blob.compose(group, retry=DEFAULT_RETRY)  # whoever composes these parts writes the same
        sources, level = joined, level + 1
    return list(sources)


def _part_name(name: str, part: range) -> str:
    return f"{name}/{part.start:016}"


def _clear(scratch: Location) -> None:
    from google.api_core.exceptions import NotFound

    def delete(name: str) -> None:
        doing = explained(scratch, "delete the parts of large files, which it no longer needs")
        with doing, contextlib.suppress(NotFound):  # another upload of the same files has
            (scratch / name).blob().delete()

    in_parallel(functools.partial(delete, name) for name in gcs.objects(scratch))
