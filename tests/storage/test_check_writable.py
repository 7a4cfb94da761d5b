"""The look whether a place can be written, before a run spends anything."""

from pathlib import Path

import pytest
from google.cloud.storage import Client

from trackrec import storage


def test_a_bucket_is_written_and_left_as_it_was(bucket: str) -> None:
    storage.check_writable(f"{bucket}/runs")
    storage.check_writable(bucket)
    assert list(Client().list_blobs(bucket.removeprefix("gs://"))) == []


def test_a_missing_bucket_is_named(gcs_server: str) -> None:
    with pytest.raises(storage.RemoteError, match=r"gs://nowhere/runs: no such bucket"):
        storage.check_writable("gs://nowhere/runs")
    with pytest.raises(storage.RemoteError, match=r"give gs://BUCKET/PATH"):
        storage.check_writable("gs:///runs")


def test_a_folder_is_written_and_left_as_it_was(tmp_path: Path) -> None:
    storage.check_writable(str(tmp_path / "not" / "yet"))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("/proc/trackrec", str(tmp_path / "file" / "below")):
        with pytest.raises(storage.RemoteError, match=f"{place}: cannot write in"):
            storage.check_writable(place)
