"""Directories to a bucket and back."""

import threading
from pathlib import Path
from urllib.parse import unquote

import pytest
from google.cloud.storage import Client
from werkzeug import Request

from tests.storage.directories import files_of, generations, noise, publish, write
from tests.storage.proxy import between
from trackrec import storage
from trackrec.storage import gcs, publication

FILES = {"a.txt": b"hello", "deep/er/ü b.bin": noise(3000), "empty": b""}


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))


def test_a_published_directory_goes_to_a_bucket_and_comes_back(bucket: str, tmp_path: Path) -> None:
    out = publish(tmp_path / "out", FILES)
    assert not storage.published(f"{bucket}/runs/1")
    uri = storage.upload(out, f"{bucket}/runs/1")
    assert uri.startswith(f"{bucket}/runs/1/sha256-") and storage.resolve(f"{bucket}/runs/1/") == uri
    assert storage.published(f"{bucket}/runs/1") and not storage.published(f"{bucket}/runs")
    storage.download(f"{bucket}/runs/1", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(out)
    storage.verify(tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out", "work"]


def test_a_directory_without_a_manifest_does_too(bucket: str, tmp_path: Path) -> None:
    storage.upload(write(tmp_path / "model", FILES), f"{bucket}/model")
    storage.download(f"{bucket}/model", tmp_path / "back")
    assert files_of(tmp_path / "back") == FILES


# 71 parts of a size that divides nothing: composed in two rounds, of 32, 32 and 7, then of 3.
def test_large_files_go_in_parts(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "PART", 1009)
    files = {"large.bin": noise(70 * 1009 + 17), "two.bin": noise(2018, 1), "one.bin": noise(1009, 2)}
    uri = storage.upload(write(tmp_path / "model", files), f"{bucket}/model")
    storage.download(f"{bucket}/model", tmp_path / "back")
    assert files_of(tmp_path / "back") == files
    folder = uri.removeprefix(f"{bucket}/")
    assert generations(bucket).keys() == {"model/published.json"} | {f"{folder}/{name}" for name in files}


def test_requests_overlap(bucket: str, gcs_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(gcs.THREADS, timeout=10)
    files = {str(index): noise(10, index) for index in range(gcs.THREADS)}
    waiting = {"POST": 0, "GET": 0}

    def meet(request: Request) -> None:
        """Holds a file's request until all the files' are here."""
        path = unquote(request.full_path)
        if ("alt=media" in path and "/sha256-" in path) or b"/sha256-" in request.get_data():
            waiting[request.method] += 1
            together.wait()

    with between(gcs_server, monkeypatch) as proxy:
        proxy.answer = meet
        storage.upload(write(tmp_path / "in", files), f"{bucket}/in")
        storage.download(f"{bucket}/in", tmp_path / "out")
    assert waiting == {"POST": gcs.THREADS, "GET": gcs.THREADS} and files_of(tmp_path / "out") == files


def test_what_is_there_is_not_sent_again(
    bucket: str, gcs_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = publish(tmp_path / "out", FILES)
    uri = storage.upload(out, f"{bucket}/runs/1")
    before = generations(bucket)
    with between(gcs_server, monkeypatch) as proxy:
        assert storage.upload(out, f"{bucket}/runs/1") == uri
        # Another run's manifest tells another time; what it wrote is the same.
        assert storage.upload(publish(tmp_path / "again", FILES), f"{bucket}/runs/1") == uri
        assert proxy.seen and not proxy.sent
    assert generations(bucket) == before


def test_replacing_must_be_asked_for_and_leaves_readers_what_they_read(bucket: str, tmp_path: Path) -> None:
    first = storage.upload(publish(tmp_path / "a", {"x": b"first"}), f"{bucket}/v")
    other = publish(tmp_path / "b", {"x": b"second"})
    with pytest.raises(storage.OccupiedError, match=f"{bucket}/v holds another publication"):
        storage.upload(other, f"{bucket}/v")
    assert storage.resolve(f"{bucket}/v") == first
    second = storage.upload(other, f"{bucket}/v", replace=True)
    assert storage.resolve(f"{bucket}/v") == second != first
    storage.download(f"{bucket}/v", tmp_path / "new")
    assert (tmp_path / "new" / "x").read_bytes() == b"second"
    assert (storage.localize(first, tmp_path / "cache") / "x").read_bytes() == b"first"


def test_readers_refuse_what_has_no_marker(bucket: str, tmp_path: Path) -> None:
    storage.upload(publish(tmp_path / "out", FILES), f"{bucket}/v")
    Client().bucket(bucket.removeprefix("gs://")).blob("v/published.json").delete()
    for read in (
        lambda: storage.download(f"{bucket}/v", tmp_path / "back"),
        lambda: storage.resolve(f"{bucket}/v"),
        lambda: storage.dataset(f"{bucket}/v", "a.txt"),
    ):
        with pytest.raises(storage.NotPublishedError, match=r"v has no published\.json: its upload has not finished"):
            read()
    assert not (tmp_path / "back").exists() and not storage.published(f"{bucket}/v")


def test_a_download_leaves_what_another_wrote(bucket: str, tmp_path: Path) -> None:
    storage.upload(write(tmp_path / "in", FILES), f"{bucket}/v")
    write(tmp_path / "mine", {"thesis.txt": b"mine"})
    with pytest.raises(storage.OccupiedError, match="mine holds something else"):
        storage.download(f"{bucket}/v", tmp_path / "mine")
    assert files_of(tmp_path / "mine") == {"thesis.txt": b"mine"}
    (tmp_path / "back").mkdir()
    storage.download(f"{bucket}/v", tmp_path / "back")
    before = (tmp_path / "back" / "a.txt").stat().st_mtime_ns
    storage.download(f"{bucket}/v", tmp_path / "back")
    assert files_of(tmp_path / "back") == FILES and (tmp_path / "back" / "a.txt").stat().st_mtime_ns == before


def test_a_stages_output_that_has_changed_is_not_uploaded(bucket: str, tmp_path: Path) -> None:
    out = publish(tmp_path / "out", FILES)
    (out / "a.txt").write_text("hullo")
    with pytest.raises(storage.CorruptError, match=r"a\.txt is missing or differs from its checksum"):
        storage.upload(out, f"{bucket}/v")
    (out / "a.txt").unlink()
    with pytest.raises(storage.CorruptError, match=r"a\.txt is missing"):
        storage.upload(out, f"{bucket}/v")
    assert generations(bucket) == {}


def test_nothing_is_no_directory(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no file to upload"):
        storage.upload(tmp_path, f"{bucket}/v")
    (tmp_path / "ml-1m.zip").write_bytes(b"raw")
    for name in ("ml-1m.zip", "nowhere"):
        with pytest.raises(FileNotFoundError, match=rf"{name} is no folder; name the one that holds"):
            storage.upload(tmp_path / name, f"{bucket}/v")


def test_a_folder_here_is_published_alike(tmp_path: Path) -> None:
    out = publish(tmp_path / "out", FILES)
    there = tmp_path / "there" / "v"
    assert storage.upload(out, str(there)) == storage.resolve(str(there)) == str(there)
    assert files_of(there) == files_of(out)
    storage.download(str(there), tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(out)
    other = publish(tmp_path / "other", {"x": b"1"})
    with pytest.raises(storage.OccupiedError, match="holds something else"):
        storage.upload(other, str(there))
    storage.upload(other, str(there), replace=True)
    assert files_of(there) == files_of(other) and list(there.parent.iterdir()) == [there]
    with pytest.raises(storage.NotPublishedError):
        storage.upload(write(tmp_path / "raw", FILES), str(tmp_path / "elsewhere"))
    assert not storage.published(str(tmp_path / "raw"))
    (out / "a.txt").write_text("hullo")
    with pytest.raises(storage.CorruptError, match=r"a\.txt differs from its checksum"):
        storage.upload(out, str(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()


def test_of_two_writers_to_a_folder_here_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes when the first has copied all and has only to put it in place."""
    one, two = (publish(tmp_path / name, {"x": name.encode()}) for name in ("one", "two"))
    there, swap, lost = tmp_path / "there", publication.swap, []

    def upload_two() -> None:
        with pytest.raises(storage.OccupiedError, match="holds something else"):
            storage.upload(two, str(there))
        lost.append(two)

    second = threading.Thread(target=upload_two)

    def last(*given: Path) -> None:
        if not second.ident:
            second.start()
            second.join(0.5)
        swap(*given)

    monkeypatch.setattr(publication, "swap", last)
    storage.upload(one, str(there))
    second.join(10)
    assert lost == [two] and (there / "x").read_bytes() == b"one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "there", "two", "work"]
