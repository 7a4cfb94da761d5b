"""Directories that appear whole or not at all."""

import json
from pathlib import Path

import pytest

from trackrec import storage
from trackrec.config import PreferencesSettings, ScoreSettings
from trackrec.data import schema
from trackrec.storage import publication


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))
    return tmp_path / "work"


def publish(out: Path, text: str, **inputs: Path) -> None:
    with storage.publish("score", ScoreSettings(), inputs=inputs, outputs={"out": out}) as job:
        (job.outputs["out"] / "data.txt").write_text(text)
        job.facts["rows"] = 3


def test_a_published_directory_carries_its_manifest(tmp_path: Path) -> None:
    raw = tmp_path / "raw.txt"
    raw.write_text("raw")
    publish(tmp_path / "out", "hello", raw=raw)
    manifest = storage.read_manifest(tmp_path / "out")
    # sha256 of "hello" and of "raw", as sha256sum prints them
    assert manifest.files == {"data.txt": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"}
    assert manifest.inputs == {"raw": storage.file_hash(raw)}
    assert manifest.stage == "score" and manifest.facts == {"rows": 3} and manifest.peak_memory_bytes > 1e6
    assert storage.numbers(tmp_path / "out") == {"rows": 3}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_failure_leaves_no_output_and_the_old_one_alone(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    with (
        pytest.raises(RuntimeError, match="half way"),
        storage.publish(
            "score", ScoreSettings(), inputs={}, outputs={"out": tmp_path / "out", "b": tmp_path / "b"}
        ) as job,
    ):
        (job.outputs["out"] / "data.txt").write_text("new")
        raise RuntimeError("half way")
    assert (tmp_path / "out" / "data.txt").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "work"]


def test_the_work_directory_survives_a_failure_and_only_that(tmp_path: Path) -> None:
    def attempt(fail: bool, tolerance: float = 0.1) -> list[str]:
        settings = PreferencesSettings(tolerance=tolerance)
        with storage.publish("preferences", settings, inputs={}, outputs={"o": tmp_path / "o"}, seed="1") as job:
            found = sorted(p.name for p in job.work.iterdir())
            (job.work / "shard-0").write_text("done")
            if fail:
                raise KeyboardInterrupt
        return found

    with pytest.raises(KeyboardInterrupt):
        attempt(fail=True)
    assert attempt(fail=False, tolerance=0.5) == []
    assert attempt(fail=False) == ["shard-0"]
    assert attempt(fail=False) == []


def test_readers_refuse_a_directory_without_a_manifest(tmp_path: Path) -> None:
    schema.write(tmp_path, "predictions", [{"row_id": 1, "score": 0.5}])
    with pytest.raises(storage.NotPublishedError, match="has not finished"):
        schema.read(tmp_path, "predictions")


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    publish(tmp_path / "out", "hello")
    storage.verify(tmp_path / "out")
    (tmp_path / "out" / "data.txt").write_text("hullo")
    with pytest.raises(storage.CorruptError, match=r"data\.txt is missing or differs"):
        storage.verify(tmp_path / "out")


def test_a_table_that_was_changed_is_refused(tmp_path: Path) -> None:
    with storage.publish("score", ScoreSettings(), inputs={}, outputs={"o": tmp_path / "o"}) as job:
        schema.write(job.outputs["o"], "predictions", [{"row_id": 1, "score": 0.5}])
    schema.write(tmp_path / "o", "predictions", [{"row_id": 1, "score": 0.75}])
    with pytest.raises(storage.CorruptError, match=r"predictions\.parquet is missing or differs"):
        schema.read(tmp_path / "o", "predictions")


def test_what_another_wrote_is_never_replaced(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("mine")
    with pytest.raises(storage.OccupiedError, match=r"thesis\.txt is no output of stage 'score'; give a new folder"):
        publish(own, "hello")
    with pytest.raises(storage.OccupiedError, match=r"own holds the input raw"):
        publish(own, "hello", raw=own / "thesis.txt")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(storage.OccupiedError):
        publish(tmp_path / "file", "hello")
    assert (own / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "own"]


def test_a_note_in_an_earlier_output_is_kept(tmp_path: Path) -> None:
    publish(tmp_path / "out", "hello")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(storage.OccupiedError, match=r"notes\.txt is no output"):
        publish(tmp_path / "out", "hello again")
    assert (tmp_path / "out" / "data.txt").read_text() == "hello"


def test_what_comes_while_a_stage_runs_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(storage.OccupiedError, match="late"),
        storage.publish("score", ScoreSettings(), inputs={}, outputs={"o": tmp_path / "o"}),
    ):
        (tmp_path / "o").mkdir()
        (tmp_path / "o" / "late").write_text("mine")
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["late"]


def test_no_output_is_replaced_where_one_cannot_be(tmp_path: Path) -> None:
    publish(tmp_path / "a", "old")
    outputs = {name: tmp_path / name for name in ("a", "b")}
    with (
        pytest.raises(storage.OccupiedError),
        storage.publish("score", ScoreSettings(), inputs={}, outputs=outputs) as job,
    ):
        (job.outputs["a"] / "data.txt").write_text("new")
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "link").symlink_to(tmp_path)
    assert (tmp_path / "a" / "data.txt").read_text() == "old"


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    publish(tmp_path / "link", "hello")
    publish(tmp_path / "link", "hello again")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "data.txt").read_text() == "hello again"


def test_other_code_does_not_go_on_with_unfinished_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, folders in (("1", 1), ("1", 1), ("2", 2)):
        monkeypatch.setattr(publication, "code_version", lambda version=version: version)
        with (
            pytest.raises(KeyboardInterrupt),
            storage.publish("score", ScoreSettings(), inputs={}, outputs={"o": tmp_path / "o"}) as job,
        ):
            (job.work / "shard-0").write_text("done")
            raise KeyboardInterrupt
        assert len(list((tmp_path / "work").iterdir())) == folders


def test_content_hash_is_of_the_content_alone(tmp_path: Path) -> None:
    publish(tmp_path / "a", "same")
    publish(tmp_path / "b", "same")
    publish(tmp_path / "c", "other")
    assert storage.content_hash(tmp_path / "a") == storage.content_hash(tmp_path / "b")
    assert storage.content_hash(tmp_path / "a") != storage.content_hash(tmp_path / "c")
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "x").write_text("1")
    before = storage.content_hash(raw)
    (raw / "x").write_text("2")
    assert storage.content_hash(raw) != before
    with pytest.raises(FileNotFoundError, match="does not exist"):
        storage.content_hash(tmp_path / "nothing")


def test_a_table_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with storage.publish("score", ScoreSettings(), inputs={}, outputs={"o": tmp_path / "o"}) as job:
        pq.write_table(pa.table({"row_id": [1], "score": ["high"]}), schema.path_of(job.outputs["o"], "predictions"))
    with pytest.raises(schema.SchemaError, match=r"'score' of table 'predictions' is string, expected double"):
        schema.read(tmp_path / "o", "predictions")
    with pytest.raises(schema.SchemaError, match=r"'context_id' of table 'recots' is missing"):
        schema.check(pa.schema([("sample", pa.int32())]), "recots", "here")


def test_write_atomic_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "record.json"
    storage.write_atomic(path, json.dumps({"a": 1}).encode())
    storage.write_atomic(path, b"{}")
    assert path.read_bytes() == b"{}" and list(path.parent.iterdir()) == [path]


def test_a_link_is_moved_and_nothing_else_is_replaced_by_one(tmp_path: Path) -> None:
    newest = tmp_path / "newest"
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        storage.link(newest, tmp_path / name)
        assert newest.resolve() == tmp_path / name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "newest", "second"]
    with pytest.raises(storage.OccupiedError, match="first is no link"):
        storage.link(tmp_path / "first", tmp_path / "second")
