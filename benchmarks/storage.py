"""Uploads and downloads: `trackrec.storage` beside google-cloud-storage's client, one file after the other and by its
transfer manager, against one server on this machine.

    python -m benchmarks.storage --small 200 --large-mb 500

Two directories: many files of 1 MB, and one large file. What ours does more, it does within its time: SHA-256 of all
that is uploaded, checks of what has come, and the marker. The server computes checksums too, of whatever it stores, and
shares the cores: of a large upload most of the time is the server's, so the client's own CPU time stands beside it.
"""

import argparse
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from google.cloud.storage import Bucket, Client, transfer_manager

from tests import gcs
from trackrec import storage

MB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=200, help="files of 1 MB in the first directory")
    parser.add_argument("--large-mb", type=int, default=500, help="size of the one file in the second")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is shown")
    parser.add_argument("--folder", type=Path, help="where the files lie; a temporary folder by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        directories = {
            f"{given.small} x 1 MB": write(Path(folder) / "small", [MB] * given.small),
            f"1 x {given.large_mb} MB": write(Path(folder) / "large", [given.large_mb * MB]),
        }
        for name, directory in directories.items():
            compare(name, directory, given.rounds)


def write(directory: Path, sizes: list[int]) -> Path:
    directory.mkdir()
    noise = random.Random(0)
    for index, size in enumerate(sizes):
        with (directory / f"{index:04}.bin").open("wb") as file:
            for _ in range(0, size, MB):
                file.write(noise.randbytes(MB))
    return directory


def compare(name: str, directory: Path, rounds: int) -> None:
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for label, (up, down) in WAYS.items():
            # A server of its own for each, so that none is slowed by what others have left in memory.
            with gcs.server(), tempfile.TemporaryDirectory(dir=directory.parent) as folder:
                bucket = Client().create_bucket("benchmark")
                back = Path(folder) / "back"
                seconds.setdefault(("upload", label), []).append(timed(up, bucket, directory))
                seconds.setdefault(("download", label), []).append(timed(down, bucket, directory, back))
                for path in directory.iterdir():
                    assert storage.file_hash(back / path.name) == storage.file_hash(path), label
    size = sum(path.stat().st_size for path in directory.iterdir()) / MB
    print(f"\n{name:<14}{'':<18}{'seconds':>9}{'MB/s':>9}{'ratio':>8}{'client CPU s':>14}")
    for (doing, label), taken in seconds.items():
        wall, cpu = (statistics.median(values) for values in zip(*taken, strict=True))
        plain = statistics.median(wall for wall, _ in seconds[doing, "client, one by one"])
        print(f"{doing:<10}{label:<22}{wall:>9.2f}{size / wall:>9.0f}{plain / wall:>8.2f}{cpu:>14.2f}", flush=True)


def timed(call: Callable[..., None], *given: Bucket | Path) -> tuple[float, float]:
    """Seconds by the clock, and of CPU in this process and those it started."""
    wall, cpu = time.perf_counter(), _cpu()
    call(*given)
    return time.perf_counter() - wall, _cpu() - cpu


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def plain_up(bucket: Bucket, directory: Path) -> None:
    for path in directory.iterdir():
        bucket.blob(f"v/{path.name}").upload_from_filename(path)


def plain_down(bucket: Bucket, directory: Path, back: Path) -> None:
    back.mkdir()
    for path in directory.iterdir():
        bucket.blob(f"v/{path.name}").download_to_filename(back / path.name)


def manager_up(bucket: Bucket, directory: Path) -> None:
    names = [path.name for path in directory.iterdir()]
    transfer_manager.upload_many_from_filenames(
        bucket, names, source_directory=str(directory), blob_name_prefix="v/", raise_exception=True
    )


def manager_down(bucket: Bucket, directory: Path, back: Path) -> None:
    back.mkdir()
    for path in directory.iterdir():
        if path.stat().st_size > transfer_manager.TM_DEFAULT_CHUNK_SIZE:
            transfer_manager.download_chunks_concurrently(bucket.blob(f"v/{path.name}"), str(back / path.name))
            return
    names = [path.name for path in directory.iterdir()]
    transfer_manager.download_many_to_path(
        bucket, names, destination_directory=str(back), blob_name_prefix="v/", raise_exception=True
    )


def our_up(bucket: Bucket, directory: Path) -> None:
    storage.upload(directory, f"gs://{bucket.name}/v")


def our_down(bucket: Bucket, directory: Path, back: Path) -> None:
    storage.download(f"gs://{bucket.name}/v", back)


WAYS = {
    "client, one by one": (plain_up, plain_down),
    "transfer manager": (manager_up, manager_down),
    "trackrec.storage": (our_up, our_down),
}

if __name__ == "__main__":
    main()
