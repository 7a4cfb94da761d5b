"""Writers and readers of one place at once, each a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.storage.directories import files_of, noise, publish, write
from trackrec import storage

# Waits for the line that starts all at once.
WRITER = """
import pathlib, sys
from trackrec import storage
from trackrec.storage import marker
place, directory, replace = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3] == "replace"
write = marker.write
def last(*given):
    print("ready", flush=True)
    sys.stdin.readline()
    return write(*given)
marker.write = last
try:
    print(storage.upload(directory, place, replace=replace))
except storage.RemoteError as error:
    print("lost:", error)
"""


def race(place: str, directories: list[Path], replace: str = "new") -> list[str]:
    """Each writer's last line; all have their data there before any publishes."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, place, str(directory), replace],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        )
        for directory in directories
    ]
    for writer in writers:
        assert writer.stdout and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    return [writer.communicate(timeout=60)[0].strip() for writer in writers]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))


@pytest.mark.parametrize("replace", ["new", "replace"])
def test_of_writers_with_different_files_one_wins(replace: str, bucket: str, tmp_path: Path) -> None:
    if replace == "replace":
        storage.upload(write(tmp_path / "before", {"x": b"before"}), f"{bucket}/v")
    directories = [write(tmp_path / str(index), {"x": noise(100, index), "y": b"same"}) for index in range(3)]
    said = race(f"{bucket}/v", directories, replace)
    won = [index for index, line in enumerate(said) if line.startswith("gs://")]
    assert len(won) == 1
    assert all("another writer has published other files" in said[i] for i in range(3) if i not in won)
    storage.download(f"{bucket}/v", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(directories[won[0]])
    assert storage.resolve(f"{bucket}/v") == said[won[0]]


def test_writers_of_the_same_files_both_succeed(bucket: str, tmp_path: Path) -> None:
    # Two runs of one stage: their manifests differ, in times.
    directories = [publish(tmp_path / str(index), {"x": b"same"}) for index in range(2)]
    (directories[1] / "manifest.json").write_text(
        (directories[1] / "manifest.json").read_text().replace('"seconds": ', '"seconds": 1')
    )
    said = race(f"{bucket}/v", directories)
    assert said[0] == said[1] == storage.resolve(f"{bucket}/v")
    storage.download(f"{bucket}/v", tmp_path / "out")
    assert files_of(tmp_path / "out") in [files_of(directory) for directory in directories]
    storage.verify(tmp_path / "out")


def test_two_downloads_to_one_place_bring_it_once(bucket: str, tmp_path: Path) -> None:
    files = {str(index): noise(10_000, index) for index in range(20)}
    storage.upload(write(tmp_path / "in", files), f"{bucket}/v")
    code = "import pathlib, sys; from trackrec import storage; storage.download(sys.argv[1], pathlib.Path(sys.argv[2]))"
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", code, f"{bucket}/v", str(tmp_path / "out")],
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        )
        for _ in range(2)
    ]
    assert [reader.wait(timeout=60) for reader in readers] == [0, 0]
    assert files_of(tmp_path / "out") == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
