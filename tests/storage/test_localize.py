"""What a config names by gs://, as files of this machine."""

from pathlib import Path

import pytest
from google.cloud.storage import Client

from tests.storage.directories import files_of, noise, write
from tests.storage.proxy import between
from trackrec import storage

FILES = {"config.json": b"{}", "sub/weights": noise(5000)}


def put(uri: str, data: bytes) -> None:
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    Client().bucket(bucket).blob(name).upload_from_string(data)


def test_an_object_is_fetched_once_for_each_content(
    bucket: str, gcs_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(f"{bucket}/raw/ml-1m.zip", b"first")
    path = storage.localize(f"{bucket}/raw/ml-1m.zip", tmp_path)
    assert path.name == "ml-1m.zip" and path.read_bytes() == b"first"
    with between(gcs_server, monkeypatch) as proxy:
        assert storage.localize(f"{bucket}/raw/ml-1m.zip", tmp_path) == path
        assert not [request for request in proxy.seen if "alt=media" in request and "published.json" not in request]
    put(f"{bucket}/raw/ml-1m.zip", b"second")
    assert storage.localize(f"{bucket}/raw/ml-1m.zip", tmp_path).read_bytes() == b"second"
    assert path.read_bytes() == b"first"


def test_a_folder_without_a_marker_is_taken_as_it_is(bucket: str, tmp_path: Path) -> None:
    for name, data in FILES.items():
        put(f"{bucket}/models/tiny/{name}", data)
    put(f"{bucket}/models/tiny/", b"")  # what the console makes for a folder
    put(f"{bucket}/models/tiny-2/other", b"")
    assert files_of(storage.localize(f"{bucket}/models/tiny/", tmp_path)) == FILES
    assert files_of(storage.localize(f"{bucket}/models", tmp_path)).keys() == {
        "tiny/config.json",
        "tiny/sub/weights",
        "tiny-2/other",
    }


def test_a_published_place_gives_its_files(bucket: str, tmp_path: Path) -> None:
    uri = storage.upload(write(tmp_path / "in", FILES), f"{bucket}/models/tiny")
    for named in (uri, f"{bucket}/models/tiny"):
        assert files_of(storage.localize(named, tmp_path / "cache")) == FILES


def test_a_folder_that_lacks_what_its_name_says_is_refused(bucket: str, tmp_path: Path) -> None:
    uri = storage.upload(write(tmp_path / "in", FILES), f"{bucket}/models/tiny")
    Client().bucket(bucket.removeprefix("gs://")).blob(f"{uri.removeprefix(f'{bucket}/')}/sub/weights").delete()
    with pytest.raises(storage.NotPublishedError, match="lacks files that its name stands for"):
        storage.localize(uri, tmp_path / "cache")
    assert files_of(tmp_path / "cache") == {}


def test_an_unfinished_upload_is_refused(bucket: str, tmp_path: Path) -> None:
    storage.upload(write(tmp_path / "in", FILES), f"{bucket}/models/tiny")
    Client().bucket(bucket.removeprefix("gs://")).blob("models/tiny/published.json").delete()
    with pytest.raises(storage.NotPublishedError, match=r"tiny has no published\.json: its upload has not finished"):
        storage.localize(f"{bucket}/models/tiny", tmp_path / "cache")


def test_what_was_damaged_here_is_fetched_anew(bucket: str, tmp_path: Path) -> None:
    put(f"{bucket}/raw.zip", b"right")
    path = storage.localize(f"{bucket}/raw.zip", tmp_path)
    path.write_bytes(b"wrong")
    assert storage.localize(f"{bucket}/raw.zip", tmp_path) == path and path.read_bytes() == b"right"


def test_nothing_is_named(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(storage.RemoteError, match="nothing/here: nothing lies there; check the name"):
        storage.localize(f"{bucket}/nothing/here", tmp_path)
    with pytest.raises(storage.RemoteError, match="give gs://BUCKET/PATH"):
        storage.localize("gs://", tmp_path)
