import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.features import made
from tests.features.conftest import Fake
from trackrec import storage
from trackrec.data import schema
from trackrec.features import job
from trackrec.features.users import UsersError, day, open_users
from trackrec.serving_config import ActiveUsersSettings
from trackrec.shards import WHOLE, Shard


def ids(
    path: Path, work: Path, block_rows: int, shard: Shard = WHOLE, skip: tuple[int, ...] = ()
) -> dict[int, list[str]]:
    blocks = open_users(path, work).blocks(block_rows, shard, skip)
    return {number: rows["user_id"].to_pylist() for number, rows in blocks}


def names(numbers: range) -> list[str]:
    return [f"u{number:07}" for number in numbers]


@pytest.mark.parametrize("row_group", [7, 30, 1000])
def test_blocks_do_not_depend_on_row_groups(row_group: int, tmp_path: Path) -> None:
    path = made.write(tmp_path / "users.parquet", [made.user(number) for number in range(100)], row_group)
    whole = ids(path, tmp_path, 30)
    assert whole == {block: names(range(block * 30, min(100, block * 30 + 30))) for block in range(4)}
    assert ids(path, tmp_path, 30, Shard(1, 3)) == {1: whole[1]}
    assert ids(path, tmp_path, 30, Shard(0, 3)) == {0: whole[0], 3: whole[3]}
    assert ids(path, tmp_path, 30, skip=(0, 2)) == {1: whole[1], 3: whole[3]}


def test_a_published_table_and_a_folder_of_files_are_read(tmp_path: Path) -> None:
    rows = [made.user(number) for number in range(20)]
    with storage.publish(
        "active_users", ActiveUsersSettings(), inputs={}, outputs={"users": tmp_path / "published"}
    ) as work:
        schema.write(work.outputs["users"], "users", rows)
    (tmp_path / "folder").mkdir()
    for part, half in enumerate((rows[:9], rows[9:])):
        made.write(tmp_path / f"folder/part-{part}.parquet", half)
    assert ids(tmp_path / "published", tmp_path, 15) == ids(tmp_path / "folder", tmp_path, 15)


def test_a_table_out_of_order_is_sorted(tmp_path: Path) -> None:
    rows = [made.user((number * 37) % 100) for number in range(100)]
    path = made.write(tmp_path / "users.parquet", rows, 11)
    users = open_users(path, tmp_path / "work")
    got = pa.concat_tables(rows for _, rows in users.blocks(30))
    assert got.to_pylist() == [made.user(number) for number in range(100)]
    assert users.content_hash == storage.content_hash(path)


def test_several_processes_sort_a_table_once(tmp_path: Path) -> None:
    path = made.write(tmp_path / "users.parquet", [made.user((number * 37) % 1000) for number in range(1000)])
    together = threading.Barrier(4)

    def opened(_: int) -> list[str]:
        together.wait()
        return ids(path, tmp_path / "work", 1000)[0]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(opened, range(4))) == [names(range(1000))] * 4


def test_sorted_copies_do_not_pile_up(tmp_path: Path) -> None:
    work = tmp_path / "work"
    for name, count in (("old", 3), ("recent", 4), ("new", 5)):
        path = made.write(tmp_path / f"{name}.parquet", [made.user(number) for number in reversed(range(count))])
        (copy,) = open_users(path, work).files
        if name == "old":
            for file in work.iterdir():
                os.utime(file, (0, 0))
    assert copy.exists()
    assert len([file for file in work.iterdir() if file.suffix == ".parquet"]) == 2


def test_the_day_is_the_users_own(tmp_path: Path) -> None:
    rows = [made.user(0), made.user(1) | {"as_of": made.AS_OF + 86_400}]
    assert day(made.write(tmp_path / "users.parquet", rows[:1])) == "1970-01-12"
    assert day(made.write(tmp_path / "users.parquet", rows)) == "1970-01-13"
    with pytest.raises(UsersError, match="--dt"):
        day(made.write(tmp_path / "none.parquet", [made.user(0) | {"as_of": None}]))


@pytest.mark.parametrize("numbers", [[1, 2, 2, 3], [3, 2, 1, 2]])
def test_a_user_twice_is_named(numbers: list[int], tmp_path: Path) -> None:
    path = made.write(tmp_path / "users.parquet", [made.user(number) for number in numbers])
    with pytest.raises(UsersError, match="user 'u0000002' is there twice"):
        open_users(path, tmp_path / "work")


def test_what_is_no_users_table_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsersError, match="no Parquet file is there"):
        open_users(tmp_path, tmp_path / "work")
    empty = made.write(tmp_path / "empty.parquet", [])
    with pytest.raises(UsersError, match="holds no users"):
        open_users(empty, tmp_path / "work")
    pq.write_table(pa.table({"user_id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(schema.SchemaError, match="'as_of' of table 'users' is missing"):
        open_users(tmp_path / "other.parquet", tmp_path / "work")
    pq.write_table(
        pq.read_table(made.write(tmp_path / "x.parquet", [made.user(1) | {"user_id": None}])), tmp_path / "null.parquet"
    )
    with pytest.raises(UsersError, match="a row has no user_id"):
        open_users(tmp_path / "null.parquet", tmp_path / "work")


def test_users_of_another_domain_than_the_generators_are_refused(fake: Fake, tmp_path: Path) -> None:
    path = made.write(tmp_path / "users.parquet", [made.user(1, domain="books")])
    with pytest.raises(UsersError, match="no user is of the domain 'movies'"):
        job.run_shards(fake.settings(), path, str(tmp_path / "out"), "2026-11-28")
