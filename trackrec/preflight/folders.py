"""A model's folder on this machine or in a bucket: what lies in it, and its small files; no weights are copied."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trackrec.storage import CorruptError, RemoteError, gcs, is_remote, marker

if TYPE_CHECKING:
    from google.api_core.retry import Retry
    from google.cloud.storage import Blob

# A tokenizer's file has some ten MB; what is much larger is not one.
_LARGEST = 100 * 2**20
# How long a bucket is tried.
_SECONDS = 20.0
# Objects looked at: no model's folder has more.
_MOST = 1000


@dataclass(frozen=True)
class Folder:
    """`sizes`: bytes of each file directly in it, by name."""

    uri: str
    sizes: Mapping[str, int]

    def read(self, name: str) -> bytes:
        """A small file.

        Raises:
            RemoteError: it cannot be read, or is larger than any file that is read here.
        """
        if self.sizes[name] > _LARGEST:
            raise RemoteError(f"{self.uri}/{name} has {self.sizes[name]} bytes, more than a file of this kind has")
        if not is_remote(self.uri):
            try:
                return (Path(self.uri) / name).read_bytes()
            except OSError as error:
                raise RemoteError(f"{self.uri}/{name}: cannot be read: {error.strerror}") from error
        location = gcs.Location.parse(self.uri) / name
        with gcs.explained(location, "read"):
            return bytes(location.blob().download_as_bytes(timeout=_SECONDS, retry=_retry()))


def can_be_read(uri: str) -> bool:
    """Whether `uri` is of a kind that is read here: a path or gs://."""
    return is_remote(uri) or "://" not in uri


def open_folder(uri: str) -> Folder:
    """
    Raises:
        RemoteError: nothing lies there, its files lie deeper, or it cannot be listed; says why.
    """
    sizes: dict[str, int] = {}
    if is_remote(uri):
        location = gcs.Location.parse(uri)
        refuse_place(location)
        prefix = f"{location.path}/" if location.path else ""
        with gcs.explained(location, "list objects"):
            for blob in _listed(location.bucket, prefix, most=_MOST, delimiter="/"):
                sizes[blob.name.removeprefix(prefix)] = blob.size
    elif Path(uri).is_dir():
        sizes = {path.name: path.stat().st_size for path in Path(uri).iterdir() if path.is_file()}
    if not sizes:
        raise RemoteError(f"{uri}: there is no folder with files; upload it, or mend the address")
    return Folder(uri, sizes)


def exists(uri: str) -> bool:
    """Whether a file or a folder lies there.

    Raises:
        RemoteError: that cannot be found out, or its files lie deeper.
    """
    if not is_remote(uri):
        return Path(uri).exists()
    location = gcs.Location.parse(uri)
    refuse_place(location)
    with gcs.explained(location, "list objects"):
        # gs://bucket/raw is no folder because gs://bucket/raw-old is there, however much that holds: an object of just
        # this name comes first of all that begin so, and a folder's are asked for on their own.
        inside = f"{location.path}/" if location.path else ""
        named = any(blob.name == location.path for blob in _listed(location.bucket, location.path, most=1))
        return named or any(True for _ in _listed(location.bucket, inside, most=1))


def refuse_place(location: gcs.Location) -> None:
    """
    Raises:
        RemoteError: `trackrec put` has published there; names the folder that a run on a cluster must be given.
    """
    name = (location / marker.MARKER).path
    with gcs.explained(location, "list objects"):
        there = any(blob.name == name for blob in _listed(location.bucket, name, most=1))
    try:
        found = marker.read(location) if there else None
    except CorruptError as error:
        raise RemoteError(str(error)) from error
    if found:
        folder = location / found[0].folder
        raise RemoteError(f"{location}: the files lie in a folder of it; give {folder}, as `trackrec put` prints it")


def _listed(bucket: str, prefix: str, *, most: int, delimiter: str | None = None) -> Iterator["Blob"]:
    blobs = gcs.client().list_blobs(
        bucket, prefix=prefix, delimiter=delimiter, max_results=most, timeout=_SECONDS, retry=_retry()
    )
    yield from blobs


def _retry() -> "Retry":
    """The client's own retries, for as long as a check before a run may take."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(_SECONDS)
