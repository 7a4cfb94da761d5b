"""Directories that appear whole: written aside, then published with a manifest that is the commit marker.

Every stage's output directory carries `manifest.json`: stage, settings, input hashes, code version, counts, timings,
peak memory and a checksum a file. A reader refuses a directory without one. Work that must survive a kill (finished
shards, training checkpoints) lies in a work directory named by what the stage computes, so the next try finds it.
"""

import contextlib
import datetime as dt
import functools
import hashlib
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import trackrec

MANIFEST = "manifest.json"
# Where a run keeps what a killed stage resumes from; a pod mounts a volume there.
WORK_ENV = "TRACKREC_WORK"


class NotPublishedError(FileNotFoundError):
    """A directory without a manifest: unfinished, or not a stage's output."""


class CorruptError(ValueError):
    """A published file that no longer has the checksum its manifest gives."""


class OccupiedError(FileExistsError):
    """An output's place holds what the same stage did not write; it is never overwritten."""


class Manifest(BaseModel):
    """What `manifest.json` holds. `facts` are the stage's own counts and measures (numbers, or short lists of them)."""

    stage: str
    code: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    seconds: float
    peak_memory_bytes: int
    published: str
    facts: dict[str, Any]
    files: dict[str, str]

    @property
    def content_hash(self) -> str:
        """Hash of the files alone: equal for two runs that wrote the same bytes."""
        return _sha256(json.dumps(sorted(self.files.items())).encode())


@dataclass
class Publication:
    """A stage at work: `outputs` maps each output's name to the directory to write in; `work` survives a kill."""

    outputs: dict[str, Path]
    work: Path
    facts: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def publish(
    stage: str, settings: BaseModel, *, inputs: Mapping[str, Path], outputs: Mapping[str, Path], seed: int | str = 0
) -> Iterator[Publication]:
    """Runs a stage's body; on success its output directories appear whole, on failure none does.

    Args:
        inputs: directories or files by name; their content hashes go into the manifest and name the work directory.
        outputs: where each output goes; several may share one directory. What the same stage published there before is
            replaced.
        seed: anything besides settings and inputs that changes the result (seed, iteration).

    Raises:
        OccupiedError: something else lies where an output goes, or an input lies inside it.
    """
    started = time.monotonic()
    targets = {name: Path(path).resolve() for name, path in outputs.items()}
    for target in set(targets.values()):
        _refuse_occupied(target, stage, inputs)
    hashes = {name: content_hash(path) for name, path in inputs.items()}
    # Another code's unfinished work is none of ours: shards and checkpoints of both would make one output.
    what = [stage, settings.model_dump(mode="json"), hashes, str(seed), code_version()]
    work = work_root() / f"{stage}-{_sha256(json.dumps(what).encode())[:16]}"
    staging: dict[Path, Path] = {}
    for target in targets.values():
        if target not in staging:
            target.parent.mkdir(parents=True, exist_ok=True)
            staging[target] = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    job = Publication({name: staging[target] for name, target in targets.items()}, work)
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield job
        for folder in staging.values():
            manifest = Manifest(
                stage=stage,
                code=code_version(),
                settings=settings.model_dump(mode="json"),
                inputs=hashes,
                seconds=round(time.monotonic() - started, 3),
                peak_memory_bytes=_peak_memory(),
                published=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
                facts=job.facts,
                files={str(p.relative_to(folder)): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()},
            )
            (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for target in staging:
            _refuse_occupied(target, stage, inputs)  # again: something may have come there since
        for target, folder in staging.items():
            folder.chmod(0o755)
            swap(folder, target)
        shutil.rmtree(work, ignore_errors=True)
    finally:
        for folder in staging.values():
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds something to go on with, or is gone already
            work.rmdir()


def _refuse_occupied(target: Path, stage: str, inputs: Mapping[str, Path]) -> None:
    for name, path in inputs.items():
        if Path(path).resolve().is_relative_to(target):
            raise OccupiedError(f"{target} holds the input {name} ({path}); write to another folder")
    try:
        manifest = read_manifest(target)
        own = {MANIFEST, *manifest.files} if manifest.stage == stage else set()
    except (OSError, ValueError):  # none, or none that can be read
        own = set()
    known = {place for name in own for place in (target / name, *(target / name).parents)}
    there = [target] if target.is_file() else target.rglob("*")
    foreign = next((path for path in there if path not in known), None)
    if foreign:
        raise OccupiedError(f"{foreign} is no output of stage {stage!r}; give a new folder, or an empty one")


def swap(new: Path, target: Path) -> None:
    """Puts `new` in the place of `target`. A kill in between leaves nothing there, and what was there beside it."""
    if not target.exists():
        new.replace(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    target.replace(old)
    try:
        new.replace(target)
    except OSError:
        old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@functools.cache
def code_version() -> str:
    """The release, and a hash of the library's sources as they lie here."""
    digest = hashlib.sha256()
    package = Path(trackrec.__file__).parent
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(package)}\n{file_hash(path)}\n".encode())
    return f"{trackrec.__version__}+{digest.hexdigest()[:12]}"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a published directory.

    Raises:
        NotPublishedError: there is none.
    """
    path = Path(directory) / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotPublishedError(
            f"{directory} has no {MANIFEST}: the stage that writes it has not finished, or it is no stage's output. "
            "Run that stage again, or point at another directory."
        ) from error


def numbers(directory: Path | str) -> dict[str, float]:
    """The manifest's facts that are single numbers: what a stage shows on its artifact."""
    return {
        name: value for name, value in read_manifest(Path(directory)).facts.items() if isinstance(value, int | float)
    }


def content_hash(path: Path) -> str:
    """Hash of what lies at `path`: by its manifest where it has one, else (raw data, say) by reading it whole.

    Raises:
        FileNotFoundError: nothing lies there.
    """
    path = Path(path)
    if path.is_file():
        return file_hash(path)
    if (path / MANIFEST).is_file():
        return read_manifest(path).content_hash
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist")
    files = {str(p.relative_to(path)): file_hash(p) for p in sorted(path.rglob("*")) if p.is_file()}
    return _sha256(json.dumps(sorted(files.items())).encode())


def verify(directory: Path, *names: str) -> None:
    """Checks the files `names` of a published directory, all without any, against their checksums.

    Raises:
        NotPublishedError: the directory has no manifest.
        CorruptError: names the first file that is missing or differs.
    """
    files = read_manifest(directory).files
    for name in names or files:
        path = Path(directory) / name
        if not path.is_file() or file_hash(path) != files.get(name):
            raise CorruptError(f"{path} is missing or differs from its checksum; delete {directory} and run again")


def work_root() -> Path:
    """`$TRACKREC_WORK`, or a folder under the system's temporary one."""
    return Path(os.environ.get(WORK_ENV) or Path(tempfile.gettempdir()) / "trackrec-work")


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def link(path: Path, target: Path) -> None:
    """Points the symbolic link `path` to `target`, at once: a reader finds the old or the new.

    Raises:
        OccupiedError: something else lies at `path`.
    """
    if path.exists() and not path.is_symlink():
        raise OccupiedError(f"{path} is no link; move it away")
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _peak_memory() -> int:
    """Peak resident memory of this process, bytes (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
