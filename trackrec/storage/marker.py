"""The commit marker of a directory in a bucket: the one object that is ever replaced, and last to be written.

    gs://bucket/place/published.json          the marker; names the folder
    gs://bucket/place/sha256-0f3a…/…          the files, under a name that follows from their contents

A folder's name is a hash of what it holds, so that another publication never writes into it, and its URI says all that
Kubeflow's cache must know. Who has read the marker keeps reading one publication, whatever is published since.
"""

import datetime as dt
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import BaseModel, Field, ValidationError

from trackrec.storage.gcs import Content, Location, RemoteError, explained, objects
from trackrec.storage.publication import MANIFEST, CorruptError, NotPublishedError

MARKER = "published.json"
_SCRATCH = ".parts-"
_FOLDER = r"sha256-[0-9a-f]{32}"


class Marker(BaseModel):
    """What `published.json` holds. `content` is a hash of the files but for the stage's manifest, which tells times."""

    folder: Annotated[str, Field(pattern=f"^{_FOLDER}$")]
    content: str
    published: str
    files: dict[str, Content]

    @classmethod
    def of(cls, hashes: Mapping[str, str], files: Mapping[str, Content]) -> Self:
        """
        Args:
            hashes: each file's SHA-256, by name.
            files: each file's size and CRC-32C, by name.
        """
        return cls(
            folder=folder_of(hashes),
            content=_hash({name: value for name, value in hashes.items() if name != MANIFEST}),
            published=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            files=dict(files),
        )


def folder_of(hashes: Mapping[str, str]) -> str:
    """The name of the folder that holds files with these SHA-256."""
    return f"sha256-{_hash(hashes)[:32]}"


def is_folder(name: str) -> bool:
    return re.fullmatch(_FOLDER, name) is not None


def scratch_of(folder: str) -> str:
    """Where the parts of its large files wait."""
    return f"{_SCRATCH}{folder}"


def is_ours(name: str) -> bool:
    """Whether an upload, finished or not, makes a folder of this name."""
    return is_folder(name.removeprefix(_SCRATCH))


def read(place: Location) -> tuple[Marker, int] | None:
    """The marker of `place` and its generation; None where there is none.

    Raises:
        CorruptError: there is one that cannot be read.
        RemoteError: it cannot be read.
    """
    from google.api_core.exceptions import NotFound, PreconditionFailed

    blob = (place / MARKER).blob()
    while True:
        with explained(place, "read"):
            try:
                blob.reload()
            except NotFound:
                return None
            try:
                text = blob.download_as_bytes(if_generation_match=blob.generation, checksum="crc32c")
            except (NotFound, PreconditionFailed):  # replaced in between
                continue
        try:
            return Marker.model_validate_json(text), int(blob.generation)
        except ValidationError as error:
            raise CorruptError(f"{place / MARKER} cannot be read; publish {place} again, elsewhere") from error


def required(place: Location) -> Marker:
    """
    Raises:
        NotPublishedError: `place` has no marker.
        RemoteError: there is no such bucket, or it cannot be read.
    """
    found = read(place)
    if found is None:
        objects(place)  # where there is no bucket, this says so
        raise NotPublishedError(
            f"{place} has no {MARKER}: its upload has not finished, or nothing was published there. "
            "Upload it again, or name another place."
        )
    return found[0]


def write(place: Location, marker: Marker, generation: int) -> Marker:
    """Publishes `marker` in the place of the one of `generation`, 0 for none; gives the marker that is there then.

    Raises:
        RemoteError: another writer was first, with other files.
    """
    from google.api_core.exceptions import PreconditionFailed

    text = marker.model_dump_json(indent=2)
    with explained(place, "publish"):
        try:
            (place / MARKER).blob().upload_from_string(
                text, content_type="application/json", checksum="crc32c", if_generation_match=generation
            )
            return marker
        except PreconditionFailed:
            pass
    now = read(place)
    # The same files, from another writer or from this one, whose first try did arrive.
    if now is None or now[0].content != marker.content:
        raise RemoteError(f"{place}: another writer has published other files there meanwhile; nothing was replaced")
    return now[0]


def _hash(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()
