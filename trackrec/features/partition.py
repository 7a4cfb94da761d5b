"""The table's place, a folder or `gs://bucket/path`: single files that appear whole, and which dates are committed."""

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trackrec import storage
from trackrec.features.table import MANIFEST, SUCCESS, Manifest, date_folder, date_of
from trackrec.storage import gcs
from trackrec.storage.gcs import Location

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


@dataclass(frozen=True)
class Place:
    """A folder, here or in a bucket; `names` are relative to it, with "/"."""

    uri: str

    def __truediv__(self, name: str) -> "Place":
        return Place(f"{self.uri.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.uri

    @property
    def remote(self) -> bool:
        return storage.is_remote(self.uri)

    def files(self) -> dict[str, int]:
        """Sizes in bytes of all files below, by name; files that are still being written are left out."""
        if self.remote:
            return {name: stored.content.size for name, stored in gcs.objects(Location.parse(self.uri)).items()}
        root = Path(self.uri)
        found = ((path, str(path.relative_to(root))) for path in root.rglob("*") if path.is_file())
        return {name: path.stat().st_size for path, name in found if not path.name.startswith(".")}

    def folders(self) -> list[str]:
        """The names directly below, sorted."""
        if self.remote:
            place = Location.parse(self.uri)
            start = f"{place.path}/" if place.path else ""
            with gcs.explained(place, "list objects"):
                listed = gcs.client().list_blobs(place.bucket, prefix=start, delimiter="/")
                for _ in listed:  # the prefixes come with the pages
                    pass
                return sorted(name.removeprefix(start).rstrip("/") for name in listed.prefixes)
        root = Path(self.uri)
        return sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []

    def read(self, name: str) -> bytes | None:
        """A small file's content; None where there is none."""
        if not self.remote:
            try:
                return (Path(self.uri) / name).read_bytes()
            except FileNotFoundError:
                return None
        from google.api_core.exceptions import NotFound

        place = Location.parse(self.uri) / name
        with gcs.explained(place, "read"):
            try:
                return place.blob().download_as_bytes()
            except NotFound:
                return None

    def put(self, name: str, data: bytes) -> None:
        """Writes a small file, whole or not at all; what is there is replaced."""
        if not self.remote:
            storage.write_atomic(Path(self.uri) / name, data)
            return
        place = Location.parse(self.uri) / name
        with gcs.explained(place, "write"):
            from google.cloud.storage.retry import DEFAULT_RETRY

            # Whoever writes this object writes the same, or what shall replace it: trying again is safe.
            place.blob().upload_from_string(data, retry=DEFAULT_RETRY, checksum="crc32c")

    def put_file(self, name: str, source: Path) -> None:
        """Moves a file of this machine there; it appears whole, and `source` is gone."""
        if not self.remote:
            target = Path(self.uri) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            # The rename is in one file system only where the copy lies beside its target.
            waiting = target.with_name(f".{target.name}-{os.getpid()}")
            try:
                with source.open("rb") as read, waiting.open("wb") as written:
                    while block := read.read(1 << 20):
                        written.write(block)
                    written.flush()
                    os.fsync(written.fileno())
                waiting.replace(target)
                for left in target.parent.glob(f".{target.name}-*"):  # by a kill
                    left.unlink(missing_ok=True)
            except BaseException:
                waiting.unlink(missing_ok=True)
                raise
        else:
            place = Location.parse(self.uri) / name
            with gcs.explained(place, "write"):
                from google.cloud.storage.retry import DEFAULT_RETRY

                place.blob().upload_from_filename(str(source), retry=DEFAULT_RETRY, checksum="crc32c")
        source.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """Nothing is done where there is no such file."""
        if not self.remote:
            (Path(self.uri) / name).unlink(missing_ok=True)
            return
        from google.api_core.exceptions import NotFound

        place = Location.parse(self.uri) / name
        with gcs.explained(place, "delete"), suppress(NotFound):
            place.blob().delete()

    def arrow(self, name: str) -> "tuple[FileSystem, str]":
        """The file system and the path by which Arrow reads a file."""
        from pyarrow import fs

        if self.remote:
            return gcs.filesystem(), str(Location.parse(self.uri) / name).removeprefix(gcs.SCHEME)
        return fs.LocalFileSystem(), str(Path(self.uri) / name)


def read_manifest(out: Place, dt: str) -> Manifest | None:
    """The manifest of a committed date; None where it is not committed.

    Raises:
        CorruptError: the manifest is not the one that was committed.
        RemoteError: `out` cannot be read.
    """
    place = out / date_folder(dt)
    marker = place.read(SUCCESS)
    if marker is None:
        return None
    manifest = place.read(MANIFEST)
    if manifest is None or hashlib.sha256(manifest).hexdigest() != marker.decode().strip():
        raise storage.CorruptError(
            f"{place}/{MANIFEST} is not what {SUCCESS} was written for; delete {SUCCESS} and commit the date again"
        )
    return Manifest.model_validate_json(manifest)


def newest(out: Place, before: str | None = None) -> str | None:
    """The newest committed date, of those before `before` where that is given; None where there is none.

    Raises:
        RemoteError: `out` cannot be read.
    """
    dates = (date_of(name) for name in out.folders())
    for dt in sorted((dt for dt in dates if dt), reverse=True):
        if (before is None or dt < before) and (out / date_folder(dt)).read(SUCCESS) is not None:
            return dt
    return None
