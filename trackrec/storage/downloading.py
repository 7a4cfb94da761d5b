"""Objects from a bucket into a directory: in parallel, going on where a killed download stopped, then checked.

Until all have come and have the right checksums they lie beside the directory, with a journal of the parts that did.
"""

import contextlib
import fcntl
import functools
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from trackrec.storage import gcs
from trackrec.storage.gcs import Content, Location, RemoteError, explained, in_parallel
from trackrec.storage.publication import CorruptError, OccupiedError

_HASHED = 2**20


def download(source: Location, files: Mapping[str, Content], directory: Path, version: str) -> None:
    """Puts the objects `files` of `source` in `directory`, whole or not at all; nothing is done where they are.

    Args:
        version: tells other contents of the same names apart, in the name of the folder where unfinished files wait.

    Raises:
        CorruptError: an object's bytes do not have its checksum.
        OccupiedError: `directory` holds something else.
        RemoteError: an object cannot be read, or has a name that leads out of `directory`.
    """
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name:
            raise RemoteError(f"{source}: the object {name!r} has a name that no file here can have")
    directory = directory.resolve()
    waiting = directory.parent / f".{directory.name}-{version}"
    with alone(directory):
        if _holds(directory, files):
            return
        waiting.mkdir(exist_ok=True)
        new = waiting / "files"
        wanted = list(enumerate(sorted(files.items())))
        in_parallel(
            functools.partial(_fetch_part, source / name, content, part, new / name, waiting / f"journal-{index}")
            for index, (name, content) in wanted
            for part in gcs.parts(content.size)
        )
        in_parallel(
            functools.partial(_check, source / name, content, new / name, waiting / f"journal-{index}")
            for index, (name, content) in wanted
        )
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
        new.replace(directory)
        shutil.rmtree(waiting)


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Of two processes that bring something to one place, the second waits, and finds what the first has brought."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    path = directory.with_name(f".{directory.name}.lock")
    while True:
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # The one that held it before has deleted it: then this is no longer the lock that a third would take.
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                continue
            try:
                yield
            finally:
                path.unlink()
            return


def _holds(directory: Path, files: Mapping[str, Content]) -> bool:
    """Whether `directory` holds exactly `files`; if it is not there, or empty, it does not.

    Raises:
        OccupiedError: it holds something else.
    """
    if directory.is_dir():
        there = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
        if not there:
            return False
        if there.keys() == files.keys() and all(_content(path) == files[name] for name, path in there.items()):
            return True
    elif not directory.exists():
        return False
    raise OccupiedError(f"{directory} holds something else; name a new folder, or an empty one")


def _fetch_part(source: Location, content: Content, part: range, target: Path, journal: Path) -> None:
    line = f"{part.start}\n"
    if journal.is_file() and line in journal.read_text(encoding="ascii").splitlines(keepends=True):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT, 0o644)
    file = _At(descriptor, part.start)
    try:
        if part:
            _read(source, part, file)
    finally:
        os.close(descriptor)
    if file.offset != part.stop:
        raise CorruptError(f"{source} has another size than {content.size} bytes; publish it again")
    with journal.open("a", encoding="ascii") as done:
        done.write(line)


def _read(source: Location, part: range, file: "_At") -> None:
    from google.api_core.exceptions import NotFound

    with explained(source, "read"):
        try:
            # As it is stored, compressed or not: that is what the checksum is of. In one read: the client's own loop
            # hands over 8 KiB at a time, which costs more than the network does.
            source.blob().download_to_file(
                file, start=part.start, end=part.stop - 1, raw_download=True, single_shot_download=True, checksum=None
            )
        except NotFound as error:
            raise CorruptError(f"{source} is missing") from error


class _At:
    """Writes to a file from `offset` on, wherever other threads write to it."""

    def __init__(self, descriptor: int, offset: int) -> None:
        self.descriptor, self.offset = descriptor, offset

    def write(self, data: bytes) -> int:
        left = memoryview(data)
        while left:
            written = os.pwrite(self.descriptor, left, self.offset)
            left, self.offset = left[written:], self.offset + written
        return len(memoryview(data))


def _check(source: Location, content: Content, path: Path, journal: Path) -> None:
    if _content(path) != content:
        journal.unlink()  # the next try reads this file again
        path.unlink()
        raise CorruptError(f"{source} came with another checksum than it should have; try again")


def _content(path: Path) -> Content:
    import google_crc32c

    checksum, size = 0, 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_HASHED):
            checksum = google_crc32c.extend(checksum, data)
            size += len(data)
    return Content(size=size, crc32c=gcs.written(checksum))
