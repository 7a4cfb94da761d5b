"""Directories elsewhere: in a bucket (`gs://`) or in another folder of this machine."""

import tempfile
from pathlib import Path

from trackrec.storage import gcs
from trackrec.storage.gcs import RemoteError

__all__ = ["RemoteError", "check_writable"]

# How long a check before a run tries to reach a bucket.
_CHECK_SECONDS = 20.0


def check_writable(uri: str) -> None:
    """Writes something small under `uri` (`gs://bucket/path`, or a path here) and deletes it; leaves nothing behind.

    Raises:
        RemoteError: it cannot be written; the message says why.
    """
    if uri.startswith(gcs.SCHEME):
        gcs.check_writable(gcs.Location.parse(uri), _CHECK_SECONDS)
        return
    folder = Path(uri).absolute()
    # The folder itself need not be there yet; what will hold it must be one that it can be made in.
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(prefix=".trackrec-probe-", dir=folder):
            pass
    except OSError as error:
        raise RemoteError(f"{uri}: cannot write in {folder}: {error.strerror}") from error
