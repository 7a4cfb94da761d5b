import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.features import made
from tests.features.conftest import Fake, rows, run
from trackrec import storage
from trackrec.features import job, partition, table
from trackrec.features.commit import CommitError, _union, commit
from trackrec.features.partition import Place
from trackrec.storage import CorruptError

DT = "2026-11-28"


@pytest.fixture
def written(fake: Fake, tmp_path: Path) -> Path:
    """A date of three shards, not committed."""
    path = made.write(tmp_path / "users.parquet", [made.user(number) for number in range(110)])
    job.run_shards(fake.settings(), path, str(tmp_path / "out"), DT)
    return tmp_path / "out"


def change(path: Path, rows: pa.Table) -> None:
    pq.write_table(rows.replace_schema_metadata(pq.read_schema(path).metadata), path)


def test_shards_with_missing_or_mixed_up_rows_are_refused(fake: Fake, written: Path) -> None:
    path = written / f"dt={DT}" / table.shard_path(1)
    good = pq.ParquetFile(path).read()
    for wrong, message in (
        (good.slice(1), "has 49 rows, 50 are expected"),
        (good.take([1, 0, *range(2, 50)]), "do not ascend"),
        (good.take([0, 0, *range(2, 50)]), "do not ascend"),
        (pq.ParquetFile(written / f"dt={DT}" / table.shard_path(0)).read(), "do not ascend"),
    ):
        change(path, wrong)
        with pytest.raises(CommitError, match=message):
            commit(fake.settings(), str(written), DT)
    assert not (written / f"dt={DT}/_SUCCESS").exists()
    change(path, good)
    commit(fake.settings(), str(written), DT)


def test_shards_of_two_jobs_are_not_committed_together(fake: Fake, written: Path, tmp_path: Path) -> None:
    other = made.write(tmp_path / "other.parquet", [made.user(number) for number in range(5, 115)])
    (written / f"dt={DT}" / table.shard_path(0)).unlink()
    job.run_shards(fake.settings(), other, str(tmp_path / "second"), DT)
    source = tmp_path / "second" / f"dt={DT}" / table.shard_path(0)
    source.replace(written / f"dt={DT}" / table.shard_path(0))
    with pytest.raises(CommitError, match="is of other users, models or settings"):
        commit(fake.settings(), str(written), DT)


def test_what_an_earlier_job_left_is_replaced_or_deleted(fake: Fake, written: Path, tmp_path: Path) -> None:
    fewer = made.write(tmp_path / "fewer.parquet", [made.user(number) for number in range(60)])
    run(fake.settings(), fewer, written, DT)
    manifest = partition.read_manifest(Place(str(written)), DT)
    assert [shard.rows for shard in manifest.shards] == [50, 10]
    assert sorted(Place(str(written)).files()) == [
        f"dt={DT}/{name}" for name in ("_SUCCESS", "_manifest.json", table.shard_path(0), table.shard_path(1))
    ]


def test_the_users_say_which_job_is_committed(fake: Fake, written: Path, tmp_path: Path) -> None:
    fewer = made.write(tmp_path / "fewer.parquet", [made.user(number) for number in range(60)])
    with pytest.raises(CommitError, match="holds no shard of these users"):
        commit(fake.settings(), str(written), DT, storage.content_hash(fewer))
    third = (written / f"dt={DT}" / table.shard_path(2)).read_bytes()
    done = job.run_shards(fake.settings(), fewer, str(written), DT)
    # Another's file that is newer than all of this job's.
    path = written / f"dt={DT}" / table.shard_path(2)
    path.write_bytes(third)
    facts = json.loads(pq.read_schema(path).metadata[table.FOOTER])
    footer = {table.FOOTER: json.dumps(facts | {"written": facts["written"] + 1000}).encode()}
    pq.write_table(pq.ParquetFile(path).read().replace_schema_metadata(footer), path)
    assert commit(fake.settings(), str(written), DT, done.identity.users).rows == 60
    assert not path.exists()
    with pytest.raises(CommitError, match="is committed, with other users"):
        commit(fake.settings(), str(written), DT, "another's")


def test_a_date_without_any_recot_does_not_take_the_rankers_features_away(fake: Fake, tmp_path: Path) -> None:
    users = [made.user(number, "(invalid)", f"{number}") for number in range(3)] + [made.user(3) | {"history": []}]
    path = made.write(tmp_path / "users.parquet", users)
    with pytest.raises(CommitError, match=r"no user has a RecCoT \(1 empty_history, 3 failed\)"):
        run(fake.settings(), path, tmp_path / "out", DT)
    assert partition.newest(Place(str(tmp_path / "out"))) is None


def test_a_date_on_which_too_many_failed_is_not_committed_and_they_are_asked_for_again(
    fake: Fake, tmp_path: Path
) -> None:
    users = [made.user(number, "(broken)", f"{number}") for number in range(2)]
    path = made.write(tmp_path / "users.parquet", [*users, *(made.user(number) for number in range(2, 10))])
    out, broken = tmp_path / "out", fake.log.with_name(f"{fake.log.name}.broken")
    broken.touch()
    try:
        with pytest.raises(CommitError, match=r"more users failed \(8 ok, 2 failed\) than .* allows \(0.1\)"):
            run(fake.settings(), path, out, DT)
        assert partition.newest(Place(str(out))) is None
        before = rows(out, DT)
    finally:
        broken.unlink()
    fake.asked()
    assert run(fake.settings(), path, out, DT).status == {"ok": 10}
    assert len(fake.asked()) == 2
    assert rows(out, DT).slice(2).equals(before.slice(2))
    # Committed, it is what it is.
    assert job.run_shards(fake.settings(), path, str(out), DT).skipped == 1


def test_a_share_of_users_may_fail(fake: Fake, tmp_path: Path) -> None:
    path = made.write(tmp_path / "users.parquet", [made.user(0, "(invalid)"), *(made.user(k) for k in range(1, 10))])
    assert run(fake.settings(max_failed=0.1), path, tmp_path / "out", DT).status == {"ok": 9, "failed": 1}
    assert partition.newest(Place(str(tmp_path / "out"))) == DT


def test_a_manifest_that_was_changed_is_no_committed_date(fake: Fake, written: Path) -> None:
    commit(fake.settings(), str(written), DT)
    path = written / f"dt={DT}/_manifest.json"
    path.write_text(path.read_text().replace('"copied": 0', '"copied": 1'))
    with pytest.raises(CorruptError, match="commit the date again"):
        partition.read_manifest(Place(str(written)), DT)


def test_only_dates_are_committed_and_only_committed_ones_are_newest(fake: Fake, written: Path) -> None:
    out = Place(str(written))
    assert partition.newest(out) is None
    commit(fake.settings(), str(written), DT)
    (written / "dt=2026-12-01").mkdir()
    (written / "notes").mkdir()
    assert partition.newest(out) == DT
    assert partition.newest(out, before=DT) is None
    for wrong in ("2026-13-01", "20261128", "2026-W48-6", "../x"):
        with pytest.raises(ValueError):
            job.run_shards(fake.settings(), written, str(written), wrong)


def test_the_time_of_spans_that_overlap_counts_once() -> None:
    assert _union([(0, 10), (2, 5), (8, 12), (20, 21)]) == 13
    assert _union([]) == 0
