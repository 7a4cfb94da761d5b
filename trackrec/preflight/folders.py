"""A model's folder on this machine or in a bucket: what lies in it, and its small files; no weights are copied."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trackrec.storage import RemoteError, gcs

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
        if not is_bucket(self.uri):
            try:
                return (Path(self.uri) / name).read_bytes()
            except OSError as error:
                raise RemoteError(f"{self.uri}/{name}: cannot be read: {error.strerror}") from error
        location = gcs.Location.parse(self.uri) / name
        with gcs.explained(location, "read"):
            return bytes(location.blob().download_as_bytes(timeout=_SECONDS, retry=_retry()))


def is_bucket(uri: str) -> bool:
    return uri.startswith(gcs.SCHEME)


def can_be_read(uri: str) -> bool:
    """Whether `uri` is of a kind that is read here: a path or gs://."""
    return is_bucket(uri) or "://" not in uri


def open_folder(uri: str) -> Folder:
    """
    Raises:
        RemoteError: nothing lies there, or it cannot be listed; says why.
    """
    sizes: dict[str, int] = {}
    if is_bucket(uri):
        location = gcs.Location.parse(uri)
        prefix = f"{location.path}/" if location.path else ""
        with gcs.explained(location, "list objects"):
            for blob in _listed(location.bucket, prefix, delimiter="/"):
                sizes[blob.name.removeprefix(prefix)] = blob.size
    elif Path(uri).is_dir():
        sizes = {path.name: path.stat().st_size for path in Path(uri).iterdir() if path.is_file()}
    if not sizes:
        raise RemoteError(f"{uri}: there is no folder with files; upload it, or mend the address")
    return Folder(uri, sizes)


def exists(uri: str) -> bool:
    """Whether a file or a folder lies there.

    Raises:
        RemoteError: that cannot be found out.
    """
    if not is_bucket(uri):
        return Path(uri).exists()
    location = gcs.Location.parse(uri)
    with gcs.explained(location, "list objects"):
        # gs://bucket/raw is no folder because gs://bucket/raw-old is there.
        inside = f"{location.path}/" if location.path else ""
        if next(_listed(location.bucket, inside), None):
            return True
        return bool(location.path) and location.blob().exists(timeout=_SECONDS, retry=_retry())


def _listed(bucket: str, prefix: str, delimiter: str | None = None) -> Iterator["Blob"]:
    blobs = gcs.client().list_blobs(
        bucket, prefix=prefix, delimiter=delimiter, max_results=_MOST, timeout=_SECONDS, retry=_retry()
    )
    yield from blobs


def _retry() -> "Retry":
    """The client's own retries, for as long as a check before a run may take."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(_SECONDS)
