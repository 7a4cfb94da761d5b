"""Directories that appear whole, on this machine and in a bucket.

`publication` writes a stage's output directories; `remote` moves directories to and from `gs://` and other folders.
"""

from trackrec.storage.publication import (
    MANIFEST,
    WORK_ENV,
    CorruptError,
    Manifest,
    NotPublishedError,
    OccupiedError,
    Publication,
    code_version,
    content_hash,
    file_hash,
    link,
    numbers,
    publish,
    read_manifest,
    verify,
    work_root,
    write_atomic,
)
from trackrec.storage.remote import (
    RemoteError,
    check_writable,
    dataset,
    download,
    is_remote,
    localize,
    published,
    resolve,
    upload,
)

__all__ = [
    "MANIFEST",
    "WORK_ENV",
    "CorruptError",
    "Manifest",
    "NotPublishedError",
    "OccupiedError",
    "Publication",
    "RemoteError",
    "check_writable",
    "code_version",
    "content_hash",
    "dataset",
    "download",
    "file_hash",
    "is_remote",
    "link",
    "localize",
    "numbers",
    "publish",
    "published",
    "read_manifest",
    "resolve",
    "upload",
    "verify",
    "work_root",
    "write_atomic",
]
