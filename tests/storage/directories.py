"""Directories to move about, and what is in a bucket."""

import random
from pathlib import Path

from google.cloud.storage import Client

from trackrec import storage
from trackrec.config import ScoreSettings


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def write(directory: Path, files: dict[str, bytes]) -> Path:
    """A directory as people put it together: no manifest."""
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


def publish(directory: Path, files: dict[str, bytes]) -> Path:
    """A stage's output."""
    with storage.publish("score", ScoreSettings(), inputs={}, outputs={"out": directory}) as job:
        write(job.outputs["out"], files)
    return directory


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def generations(bucket: str) -> dict[str, int]:
    """Every object of a bucket with its generation, which changes whenever the object is written."""
    return {blob.name: blob.generation for blob in Client().list_blobs(bucket.removeprefix("gs://"))}
