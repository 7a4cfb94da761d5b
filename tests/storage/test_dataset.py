"""Published tables, read where they lie."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.storage.directories import write
from trackrec import storage
from trackrec.config import ScoreSettings
from trackrec.data import schema


@pytest.fixture(params=["bucket", "folder"])
def place(request: pytest.FixtureRequest, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))
    with storage.publish("score", ScoreSettings(), inputs={}, outputs={"o": tmp_path / "o"}) as job:
        out = job.outputs["o"]
        schema.write(out, "predictions", [{"row_id": row, "score": row / 4} for row in range(4)])
        (out / "shards").mkdir()
        for shard in range(3):
            pq.write_table(pa.table({"shard": [shard] * 2}), out / "shards" / f"{shard}.parquet")
    uri = f"{bucket}/o" if request.param == "bucket" else str(tmp_path / "published")
    storage.upload(tmp_path / "o", uri)
    return uri


def test_a_table_is_read_where_it_lies(place: str) -> None:
    table = storage.dataset(place, "predictions.parquet")
    found = table.to_table(columns=["row_id"], filter=pa.compute.field("score") > 0.3)
    assert found.to_pydict() == {"row_id": [2, 3]}


def test_so_is_a_folder_of_them(place: str) -> None:
    assert storage.dataset(place, "shards").to_table().column("shard").to_pylist() == [0, 0, 1, 1, 2, 2]


def test_a_table_that_is_not_there_is_named(place: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{re.escape(place)} holds no items.parquet; it holds .*predictions"):
        storage.dataset(place, "items.parquet")


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(storage.NotPublishedError):
        storage.dataset(str(write(tmp_path / "x", {"a.parquet": b""})), "a.parquet")
