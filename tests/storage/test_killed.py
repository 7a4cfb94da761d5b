"""Uploads and downloads that are killed (kill -9) and go on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.storage.directories import files_of, generations, noise, write
from tests.storage.proxy import between
from trackrec import storage
from trackrec.storage import gcs

PART = 2**16
# A part of a large file is as large as a small file here, and the child waits a moment before each request's file is
# read, so that the kill comes in the middle.
CHILD = f"""
import pathlib, sys, time
from trackrec import storage
from trackrec.storage import gcs
gcs.PART, gcs.THREADS = {PART}, 2
crc32c = gcs.crc32c
gcs.crc32c = lambda data: time.sleep(0.02) or crc32c(data)
"""


def killed(code: str, half_way: Callable[[], bool]) -> None:
    """Runs `code` in a process and kills it as soon as `half_way` holds."""
    process = subprocess.Popen([sys.executable, "-c", CHILD + code], env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    until = time.monotonic() + 60
    while not half_way():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    assert process.wait(timeout=10) == -signal.SIGKILL


@pytest.mark.parametrize(
    "files", [{f"{index:02}": noise(PART, index) for index in range(50)}, {"one": noise(50 * PART)}]
)
def test_a_killed_upload_goes_on(
    files: dict[str, bytes], bucket: str, gcs_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "PART", PART)
    directory = write(tmp_path / "in", files)
    killed(
        f"storage.upload(pathlib.Path({str(directory)!r}), {bucket + '/v'!r})", lambda: len(generations(bucket)) >= 10
    )
    arrived = generations(bucket)
    assert 10 <= len(arrived) < 50 and not storage.published(f"{bucket}/v")
    with between(gcs_server, monkeypatch) as proxy:
        storage.upload(directory, f"{bucket}/v")
    # The others and the marker.
    assert len(proxy.sent) == 50 - len(arrived) + 1
    after = generations(bucket)
    assert len(after) == len(files) + 1 and {name: after[name] for name in arrived.keys() & after.keys()} == {
        name: arrived[name] for name in arrived.keys() & after.keys()
    }
    storage.download(f"{bucket}/v", tmp_path / "out")
    assert files_of(tmp_path / "out") == files


@pytest.mark.parametrize(
    "files", [{f"{index:02}": noise(PART, index) for index in range(50)}, {"one": noise(50 * PART)}]
)
def test_a_killed_download_goes_on(
    files: dict[str, bytes], bucket: str, gcs_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "PART", PART)
    storage.upload(write(tmp_path / "in", files), f"{bucket}/v")

    def arrived() -> int:
        journals = tmp_path.glob(".out-*/journal-*")
        return sum(len(path.read_text().split()) for path in journals)

    with between(gcs_server, monkeypatch) as proxy:
        slowly = "import trackrec.storage.downloading as d; pwrite = d.os.pwrite\n"
        slowly += "d.os.pwrite = lambda *given: time.sleep(0.02) or pwrite(*given)\n"
        killed(
            f"{slowly}storage.download({bucket + '/v'!r}, pathlib.Path({str(tmp_path / 'out')!r}))",
            lambda: arrived() >= 10,
        )
        have = arrived()
        assert 10 <= have < 50 and not (tmp_path / "out").exists()
        del proxy.seen[:]
        storage.download(f"{bucket}/v", tmp_path / "out")
        read = [request for request in proxy.seen if "alt=media" in request and "/sha256-" in request]
    assert len(read) == 50 - have
    assert files_of(tmp_path / "out") == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
