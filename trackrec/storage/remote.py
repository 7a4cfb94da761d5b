"""Directories elsewhere: in a bucket (`gs://`) or in another folder of this machine.

Both are published whole. In a bucket a marker names the folder that holds the files (`trackrec.storage.marker`); here
the directory appears with its manifest, as a stage's output does. Readers refuse what was not published.
"""

import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from trackrec.storage import downloading, gcs, marker, publication, uploading
from trackrec.storage.gcs import Location, RemoteError
from trackrec.storage.publication import MANIFEST, CorruptError, NotPublishedError, OccupiedError

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset
    from pyarrow.fs import FileSystem

# How long a check before a run tries to reach a bucket.
_CHECK_SECONDS = 20.0


def is_remote(uri: str) -> bool:
    return uri.startswith(gcs.SCHEME)


def upload(directory: Path, uri: str, *, replace: bool = False) -> str:
    """Publishes a directory at `uri`, and gives the URI of its files. What is there already, equal, is not sent again.

    In a bucket that URI is of a folder which never changes, whatever is published at `uri` later: a pipeline should
    name it, since Kubeflow's cache knows an artifact by its URI alone. Killed, it goes on where it stopped when called
    again. Of two writers of different files one wins.

    Args:
        uri: `gs://bucket/path`, or a path here; a directory that goes to a path must have been published.
        replace: publish even if other files are published there. In a bucket their folder is kept for its readers.

    Raises:
        CorruptError: a file has changed since the directory was published, or arrived otherwise than it was sent.
        NotPublishedError: it goes to a path here and has no manifest.
        OccupiedError: other files are there.
        RemoteError: `uri` cannot be written, or another writer was first.
    """
    if is_remote(uri):
        return str(uploading.upload(directory, Location.parse(uri), replace))
    _copy(directory, Path(uri), replace)
    return uri


def download(uri: str, directory: Path) -> None:
    """Puts what is published at `uri` in `directory`, whole or not at all; killed, it goes on when called again.

    Raises:
        CorruptError: a file does not have its checksum.
        NotPublishedError: `uri` has no marker.
        OccupiedError: `directory` holds something else.
        RemoteError: `uri` cannot be read.
    """
    if not is_remote(uri):
        _copy(Path(uri), directory, replace=False)
        return
    place = Location.parse(uri)
    found = marker.required(place)
    downloading.download(place / found.folder, found.files, directory, found.folder)


def published(uri: str) -> bool:
    """Whether something is published at `uri`.

    Raises:
        RemoteError: `uri` cannot be read.
    """
    try:
        resolve(uri)
    except NotPublishedError:
        return False
    return True


def resolve(uri: str) -> str:
    """The URI of the files that are published at `uri` now: a path itself; in a bucket a folder that never changes.

    Raises:
        NotPublishedError: `uri` has no marker.
        RemoteError: `uri` cannot be read.
    """
    if is_remote(uri):
        place = Location.parse(uri)
        return str(place / marker.required(place).folder)
    publication.read_manifest(Path(uri))
    return uri


def dataset(uri: str, name: str) -> "Dataset":
    """A published Parquet file, or folder of such, read where it lies: from a bucket come only the columns asked for.

    Args:
        name: the file's or folder's name in what is published at `uri`, e.g. "interactions.parquet".

    Raises:
        FileNotFoundError: what is published there has no such file.
        NotPublishedError: `uri` has no marker.
        RemoteError: `uri` cannot be read.
    """
    from pyarrow import dataset as arrow

    filesystem: FileSystem | None = None
    if is_remote(uri):
        place = Location.parse(uri)
        found = marker.required(place)
        names, start, filesystem = list(found.files), str(place / found.folder), gcs.filesystem()
    else:
        names, start = list(publication.read_manifest(Path(uri)).files), uri
    chosen = [known for known in names if known == name or known.startswith(f"{name}/")]
    if not chosen:
        raise FileNotFoundError(f"{uri} holds no {name}; it holds {', '.join(sorted(names))}")
    return arrow.dataset(
        [f"{start.removeprefix(gcs.SCHEME)}/{file}" for file in sorted(chosen)], filesystem=filesystem, format="parquet"
    )


def localize(uri: str, cache: Path) -> Path:
    """What lies at `gs://…` as a file or folder in `cache`, downloaded once for each content; killed, it goes on.

    Raw data and models that were put into a bucket by other means have no marker: then an object, or all objects below
    `uri`, are taken as they are. A published place gives its files, and a folder named by its contents must hold them.

    Raises:
        CorruptError: a file does not have its checksum.
        NotPublishedError: an upload there has not finished.
        RemoteError: nothing lies there, or it cannot be read.
    """
    place, single = Location.parse(uri), None
    if found := marker.read(place):
        place, files = place / found[0].folder, found[0].files
    elif place.path and (content := gcs.content(place)):
        place, single = place.parent()
        files = {single: content}
    else:
        files = {name: stored.content for name, stored in gcs.objects(place).items()}
        if not files:
            raise RemoteError(f"{uri}: nothing lies there; check the name")
        if any(marker.is_ours(name.partition("/")[0]) for name in files):
            raise NotPublishedError(f"{uri} has no {marker.MARKER}: its upload has not finished; upload it again")
    listing = json.dumps(sorted((name, content.model_dump()) for name, content in files.items()))
    version = hashlib.sha256(f"{place}\n{listing}".encode()).hexdigest()[:32]
    target = cache / version / (place.parent()[1] or place.bucket)
    try:
        downloading.download(place, files, target, "new")
    except OccupiedError:  # it was whole once, and has been damaged since
        shutil.rmtree(target)
        downloading.download(place, files, target, "new")
    if not found and not single and marker.is_folder(target.name):
        held = {str(p.relative_to(target)): publication.file_hash(p) for p in target.rglob("*") if p.is_file()}
        if marker.folder_of(held) != target.name:
            shutil.rmtree(target.parent)
            raise NotPublishedError(f"{uri} lacks files that its name stands for: upload it again, to the end")
    return target / single if single else target


def check_writable(uri: str) -> None:
    """Writes something small under `uri` (`gs://bucket/path`, or a path here) and deletes it; leaves nothing behind.

    Raises:
        RemoteError: it cannot be written; the message says why.
    """
    if is_remote(uri):
        gcs.check_writable(Location.parse(uri), _CHECK_SECONDS)
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


def _copy(source: Path, target: Path, replace: bool) -> None:
    """Copies a published directory; it appears whole, and what a killed copy has brought is not copied again."""
    manifest = publication.read_manifest(source)
    target = target.resolve()
    waiting = target.parent / f".{target.name}-{manifest.content_hash[:32]}"
    with downloading.alone(target):
        if target.is_file() or (target.is_dir() and any(target.iterdir())):
            if (target / MANIFEST).is_file() and publication.content_hash(target) == manifest.content_hash:
                publication.verify(target)
                return
            if not replace:
                raise OccupiedError(f"{target} holds something else; name a new folder, or an empty one")
        waiting.mkdir(exist_ok=True)
        gcs.in_parallel(
            functools.partial(_copy_file, source / name, waiting / name, sha256)
            for name, sha256 in manifest.files.items()
        )
        shutil.copyfile(source / MANIFEST, waiting / MANIFEST)
        publication.swap(waiting, target)


def _copy_file(source: Path, target: Path, sha256: str) -> None:
    if target.is_file() and publication.file_hash(target) == sha256:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    if publication.file_hash(target) != sha256:
        raise CorruptError(f"{source} differs from its checksum; delete {source.parent} and run again")
