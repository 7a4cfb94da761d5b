"""Google Cloud Storage's client, and its errors as one line that says what to do.

`google-cloud-storage` is in few images, so it is imported by what uses it. Where `STORAGE_EMULATOR_HOST` is set, the
client talks to that server without credentials.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from google.cloud.storage import Blob, Client

SCHEME = "gs://"


class RemoteError(OSError):
    """A bucket, or a folder elsewhere, that cannot be read or written; the message says why and what to do."""


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
