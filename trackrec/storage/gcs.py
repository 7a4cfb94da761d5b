"""Google Cloud Storage: the client, what lies under a URI, and errors as one line that says what to do.

`google-cloud-storage` is in few images, so it is imported by what uses it. Where `STORAGE_EMULATOR_HOST` is set, the
client talks to that server without credentials.
"""

import base64
import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

from pydantic import BaseModel

if TYPE_CHECKING:
    from google.cloud.storage import Blob, Client
    from pyarrow.fs import GcsFileSystem

SCHEME = "gs://"
# What one request moves: large enough that a request's own time does not count, small enough to hold one a thread.
PART = 16 * 2**20
# Requests at once; the client keeps ten connections open.
THREADS = 8

T = TypeVar("T")


class RemoteError(OSError):
    """A bucket, or a folder elsewhere, that cannot be read or written; the message says why and what to do."""


class Content(BaseModel, frozen=True):
    """What a file or an object holds; `crc32c` is in Cloud Storage's writing (base64)."""

    size: int
    crc32c: str


@dataclass(frozen=True)
class Stored:
    """An object as it lies in its bucket."""

    content: Content
    generation: int


@dataclass(frozen=True)
class Location:
    """`gs://bucket/path`; `path` has no slash at its end and may be empty (the whole bucket)."""

    bucket: str
    path: str

    @classmethod
    def parse(cls, uri: str) -> Self:
        """
        Raises:
            RemoteError: `uri` names no bucket.
        """
        bucket, _, path = uri.removeprefix(SCHEME).partition("/")
        if not uri.startswith(SCHEME) or not bucket:
            raise RemoteError(f"{uri!r} names no bucket; give gs://BUCKET/PATH")
        return cls(bucket, path.rstrip("/"))

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.path}".rstrip("/")

    def __truediv__(self, name: str) -> "Location":
        return Location(self.bucket, f"{self.path}/{name}" if self.path else name)

    def parent(self) -> tuple["Location", str]:
        """The location that this one is directly under, and its name there."""
        above, _, name = self.path.rpartition("/")
        return Location(self.bucket, above), name

    def blob(self) -> "Blob":
        return client().bucket(self.bucket).blob(self.path)


def client() -> "Client":
    """This process's client.

    Raises:
        RemoteError: google-cloud-storage is not installed, or there are no credentials.
    """
    return _client(os.environ.get("STORAGE_EMULATOR_HOST"), os.getpid())


@functools.cache
def _client(emulator: str | None, process: int) -> "Client":
    """One client for each server and process: connections do not survive a fork."""
    try:
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud.storage import Client
    except ImportError as error:
        raise RemoteError("gs:// needs google-cloud-storage: pip install 'trackrec[gcs]'") from error
    try:
        # Listing and moving objects names no project; without one, the client does not look for it.
        return Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "none"))
    except DefaultCredentialsError as error:
        raise RemoteError(
            "no Google credentials: run as a service account with workload identity, or "
            "`gcloud auth application-default login`"
        ) from error


@contextlib.contextmanager
def explained(location: Location, doing: str) -> Iterator[None]:
    """Turns the client's errors into a RemoteError; `doing` is what was tried, e.g. "write"."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except exceptions.NotFound as error:
        raise RemoteError(f"{location}: no such bucket or object; check the name") from error
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise RemoteError(
            f"{location}: no right to {doing}; grant this account roles/storage.objectUser on the bucket"
        ) from error
    except GoogleAuthError as error:
        raise RemoteError(f"{location}: Google refuses the credentials ({error}); log in again") from error
    except RemoteError:
        raise
    except (exceptions.GoogleAPIError, OSError) as error:
        raise RemoteError(f"{location}: could not {doing}: {error}") from error  # OSError: no connection


def filesystem() -> "GcsFileSystem":
    """Arrow's reader of the same buckets; a path there is `bucket/path`."""
    from pyarrow.fs import GcsFileSystem

    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if not emulator:
        return GcsFileSystem()
    scheme, _, address = emulator.rpartition("://")
    return GcsFileSystem(anonymous=True, endpoint_override=address, scheme=scheme or "http")


def content(location: Location) -> Content | None:
    """What the object at `location` holds; None where there is none."""
    from google.api_core.exceptions import NotFound

    blob = location.blob()
    with explained(location, "read"):
        try:
            blob.reload()
        except NotFound:
            return None
    return Content(size=blob.size, crc32c=blob.crc32c)


def objects(location: Location) -> dict[str, Stored]:
    """What lies under `location`, by the part of its name that follows."""
    start = f"{location.path}/" if location.path else ""
    with explained(location, "list objects"):
        found = client().list_blobs(
            location.bucket, prefix=start, fields="items(name,size,crc32c,generation),nextPageToken"
        )
        return {
            blob.name.removeprefix(start): Stored(Content(size=blob.size, crc32c=blob.crc32c), blob.generation)
            for blob in found
            if not blob.name.endswith("/")  # what the console makes for an empty folder
        }


def crc32c(data: bytes) -> str:
    import google_crc32c

    return written(google_crc32c.value(data))


def written(checksum: int) -> str:
    """A CRC-32C as Cloud Storage writes it."""
    return base64.b64encode(checksum.to_bytes(4, "big")).decode()


def parts(size: int) -> list[range]:
    """The bytes of each request that moves a file of `size` bytes; an empty file takes one."""
    return [range(start, min(start + PART, size)) for start in range(0, max(size, 1), PART)]


def in_parallel(tasks: Iterable[Callable[[], T]]) -> list[T]:
    """Runs `tasks` in threads; the first failure ends it all, once the requests under way have ended."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    failed = [error for future in futures if not future.cancelled() and (error := future.exception())]
    if failed:
        raise failed[0]
    return [future.result() for future in futures]


def check_writable(location: Location, seconds: float) -> None:
    """Writes an empty object under `location` and deletes it, within about `seconds`.

    Raises:
        RemoteError: it cannot be written or deleted.
    """
    probe = location / f".trackrec-probe-{os.urandom(8).hex()}"
    with explained(location, "write and delete objects"):
        from google.cloud.storage.retry import DEFAULT_RETRY

        retry = DEFAULT_RETRY.with_timeout(seconds)
        blob = probe.blob()
        blob.upload_from_string(b"", timeout=seconds, retry=retry)
        blob.delete(timeout=seconds, retry=retry)
