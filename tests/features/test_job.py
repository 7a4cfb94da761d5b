"""The job against a real Triton server whose models cost nothing: its rows, statuses, copies and resumption."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import gcs
from tests.features import made
from tests.features.conftest import WIDTH, Fake, rows, run
from trackrec.features import command, job, partition, table
from trackrec.features.commit import CommitError, commit
from trackrec.features.partition import Place
from trackrec.features.shard import unfinished
from trackrec.features.table import STATUSES
from trackrec.prompts.render import cot_prompt
from trackrec.shards import Shard

DT = "2026-11-28"


def test_the_rows_are_what_the_models_say_of_each_user(fake: Fake, tmp_path: Path) -> None:
    users = [made.user(number) for number in range(120)]
    path = made.write(tmp_path / "users.parquet", users, row_group=70)
    fake.asked()
    done = run(fake.settings(), path, tmp_path / "out")
    assert (done.rows, done.generated, done.copied, done.status) == (120, 120, 0, {"ok": 120})
    written = rows(tmp_path / "out", DT)
    assert written.schema.equals(table.schema(WIDTH, "float16").remove(11))
    sampling = json.dumps({"max_tokens": 64, "repetition_penalty": 1.0, "temperature": 0.0})
    prompts = []
    for user, row in zip(users, written.to_pylist(), strict=True):
        prompt = f"<|user|>{cot_prompt('movies', user['history'])}<|assistant|>"
        prompts.append(hashlib.sha256(prompt.encode()).hexdigest())
        digest = hashlib.sha256(f"{prompt}\0{sampling}".encode()).hexdigest()
        assert row["prompt_hash"] == digest
        words = ["likes", *(digest[at : at + 4] for at in range(0, 4 + int(digest[0], 16) * 2, 4))]
        vector = np.frombuffer(hashlib.sha256(" ".join(words).encode()).digest(), np.uint8)[:WIDTH] / np.float32(256)
        assert row["recot"] == " ".join(words)
        assert row["embedding"] == vector.astype(np.float16).tolist()
        assert (row["user_id"], row["as_of"], row["status"]) == (user["user_id"], made.AS_OF, "ok")
        assert (row["generator_version"], row["encoder_version"], row["copied"]) == ("g1", "e1", False)
        assert (row["prompt_tokens"], row["recot_tokens"]) == (len(prompt.split()), len(words))
        assert row["finish_reason"] == "stop"
        assert row["history"] == [{k: item[k] for k in ("item_id", "rating", "label")} for item in user["history"]]
    assert sorted(fake.asked()) == sorted(prompts)


def test_a_bad_user_gets_a_status_and_the_others_their_recots(fake: Fake, tmp_path: Path) -> None:
    no_rating = made.user(6)
    no_rating["history"][0]["rating"] = None
    no_title = made.user(7)
    no_title["history"][1]["title"] = None
    users = [
        made.user(0),
        made.user(1, "(too long)"),
        made.user(2) | {"history": []},
        made.user(3) | {"history": None},
        made.user(4, "(invalid)"),
        made.user(5, "(internal)"),
        no_rating,
        no_title,
        made.user(8, domain="books"),
        made.user(9, "(hangs)"),
        made.user(10, "x" * 100_000),
        made.user(11, "<|user|> \u202e</s>"),
    ]
    path = made.write(tmp_path / "users.parquet", users)
    done = run(fake.settings(deadline_s=2, retries=2, max_failed=0.3), path, tmp_path / "out")
    written = rows(tmp_path / "out", DT).to_pylist()
    failed = ["failed", "failed", "bad_text", "bad_text", "bad_text", "failed"]
    assert [row["status"] for row in written] == [
        "ok",
        "too_long",
        "empty_history",
        "empty_history",
        *failed,
        "ok",
        "ok",
    ]
    for user, row in zip(users, written, strict=True):
        assert row["user_id"] == user["user_id"]
        assert (row["recot"] is None) == (row["embedding"] is None) == (row["status"] != "ok")
        assert len(row["history"] or []) == len(user["history"] or [])
    assert done.status == {"ok": 3, "too_long": 1, "empty_history": 2, "bad_text": 3, "failed": 3}
    assert partition.read_manifest(Place(str(tmp_path / "out")), DT).status == dict(done.status)


def test_an_empty_recot_has_a_vector_as_in_training(fake: Fake, tmp_path: Path) -> None:
    path = made.write(tmp_path / "users.parquet", [made.user(0, "(silent)"), made.user(1)])
    assert run(fake.settings(), path, tmp_path / "out").status == {"ok": 2}
    silent = rows(tmp_path / "out", DT).to_pylist()[0]
    assert silent["recot"] == "" and silent["recot_tokens"] == 0 and len(silent["embedding"]) == WIDTH


def test_a_whole_shard_of_another_domain_stops_nothing(fake: Fake, tmp_path: Path) -> None:
    users = [made.user(number, domain="movies" if number < 50 else "books") for number in range(70)]
    done = run(fake.settings(), made.write(tmp_path / "users.parquet", users), tmp_path / "out")
    assert done.status == {"ok": 50, "bad_text": 20}


def test_a_title_that_is_no_utf8_spoils_no_other_row(fake: Fake, tmp_path: Path) -> None:
    path = made.write(tmp_path / "users.parquet", [made.user(0), made.user(1, "Gr\u00fcn"), made.user(2)])
    good = pq.read_table(path)
    titles = good["history"].chunk(0).values.field("title")
    raw = pa.StringArray.from_buffers(
        len(titles),
        titles.buffers()[1],
        pa.py_buffer(titles.buffers()[2].to_pybytes().replace("\u00fc".encode(), b"\xff\xfe")),
    )
    items = good["history"].chunk(0).values
    fields = [raw if field.name == "title" else items.field(field.name) for field in items.type]
    broken = pa.ListArray.from_arrays(
        good["history"].chunk(0).offsets, pa.StructArray.from_arrays(fields, fields=list(items.type))
    )
    pq.write_table(good.set_column(3, "history", broken.cast(good.schema.field("history").type)), path)
    run(fake.settings(), path, tmp_path / "out")
    assert rows(tmp_path / "out", DT)["status"].to_pylist() == ["ok", "bad_text", "ok"]


def test_a_proxy_of_the_environments_is_not_asked(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:9")
    for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    path = made.write(tmp_path / "users.parquet", [made.user(0)])
    assert run(fake.settings(deadline_s=3), path, tmp_path / "out").status == {"ok": 1}


def test_equal_prompts_are_asked_once(fake: Fake, tmp_path: Path) -> None:
    users = [made.user(1) | {"user_id": f"u{number}"} for number in range(5)]
    fake.asked()
    done = run(fake.settings(), made.write(tmp_path / "users.parquet", users), tmp_path / "out")
    assert len(fake.asked()) == done.generated == 1
    assert len(set(rows(tmp_path / "out", DT)["recot"].to_pylist())) == 1
    assert partition.read_manifest(Place(str(tmp_path / "out")), DT).generated == 1


def test_unchanged_users_are_copied_from_the_newest_committed_date(fake: Fake, tmp_path: Path) -> None:
    settings, out = fake.settings(), tmp_path / "out"
    users = [made.user(number) for number in range(0, 240, 2)]
    run(settings, made.write(tmp_path / "first.parquet", users), out, "2026-11-26")
    # Not committed: nobody may use it.
    job.run_shards(settings, made.write(tmp_path / "none.parquet", [made.user(5)]), str(out), "2026-11-27")
    changed = [user | {"history": user["history"][1:]} if at % 3 == 0 else user for at, user in enumerate(users[10:])]
    second = sorted([*changed, *(made.user(number) for number in range(1, 60, 2))], key=lambda user: user["user_id"])
    path = made.write(tmp_path / "second.parquet", second)
    fake.asked()
    done = run(settings, path, out)
    asked = fake.asked()
    assert (done.copied, done.generated, len(asked)) == (73, 67, 67)
    fresh = tmp_path / "fresh"
    run(settings, path, fresh)
    got, plain = rows(out, DT), rows(fresh, DT)
    assert sum(got["copied"].to_pylist()) == 73
    assert got.drop_columns("copied").equals(plain.drop_columns("copied"))
    # Another type of vectors is another table.
    done = job.run_shards(fake.settings(embedding_dtype="float32"), path, str(out), "2026-11-29")
    assert done.copied == 0


def test_of_an_earlier_date_that_cannot_be_read_nothing_is_copied(fake: Fake, tmp_path: Path) -> None:
    settings, out = fake.settings(), tmp_path / "out"
    path = made.write(tmp_path / "users.parquet", [made.user(number) for number in range(60)])
    run(settings, path, out, "2026-11-26")
    (out / "dt=2026-11-26" / table.shard_path(1)).unlink()
    (out / "dt=2026-11-26" / table.shard_path(0)).write_bytes(b"not Parquet")
    assert run(settings, path, out, "2026-11-27").generated == 60
    (out / "dt=2026-11-27/_manifest.json").unlink()
    assert run(settings, path, out, "2026-11-28").generated == 60


def test_without_a_date_the_users_own_is_written_whenever_the_command_is_run(fake: Fake, tmp_path: Path) -> None:
    path = made.write(tmp_path / "users.parquet", [made.user(number) for number in range(3)])
    given = {"triton": fake.server.grpc, "out": str(tmp_path / "out")}
    assert "dt=1970-01-12: 3 users" in command.run(path, given, None)
    assert "dt=2026-11-28: 3 users" in command.run(path, given, "2026-11-28")


def test_pods_share_the_shards_and_one_commits(fake: Fake, tmp_path: Path) -> None:
    settings, out = fake.settings(), str(tmp_path / "out")
    path = made.write(tmp_path / "users.parquet", [made.user(number) for number in range(230)], row_group=40)
    counts = []
    for number in (2, 0):
        counts.append(job.run_shards(settings, path, out, DT, Shard(number, 3)).rows)
    with pytest.raises(CommitError, match=r"2 of 5 shards are missing, the first is shard=00001"):
        commit(settings, out, DT)
    counts.append(job.run_shards(settings, path, out, DT, Shard(1, 3)).rows)
    assert counts == [50, 100, 80]
    manifest = commit(settings, out, DT)
    assert commit(settings, out, DT) == manifest
    assert [shard.rows for shard in manifest.shards] == [50, 50, 50, 50, 30]
    run(settings, path, tmp_path / "whole")
    assert rows(out, DT).equals(rows(tmp_path / "whole", DT))
    # Done already: nothing is asked for.
    fake.asked()
    assert job.run_shards(settings, path, out, DT).skipped == 5
    assert not fake.asked()
    other = made.write(tmp_path / "other.parquet", [made.user(1)])
    with pytest.raises(CommitError, match="is committed, with other users"):
        job.run_shards(settings, other, out, DT)


def test_what_pods_keep_until_they_end_is_deleted_and_anothers_is_not(fake: Fake, tmp_path: Path, work: Path) -> None:
    settings, out = fake.settings(), str(tmp_path / "out")
    path = made.write(tmp_path / "users.parquet", [made.user(number) for number in range(120)])
    done = job.run_shards(settings, path, out, DT, Shard(0, 2))
    assert not list((work / "features").iterdir())
    # As a kill leaves them: of a shard whose file is there already, and of another pod's.
    kept = job.work_folder(done.identity, Place(out))
    kept.mkdir()
    left, others = (unfinished(kept, number) for number in (0, 1))
    written = tmp_path / "out" / f"dt={DT}" / table.shard_path(1)
    written.parent.mkdir()
    half = written.with_name(f".{written.name}-123")
    half.touch()
    for file in (*left, *others):
        file.touch()
    assert job.run_shards(settings, path, out, DT, Shard(0, 2)).skipped == 2
    assert sorted(kept.iterdir()) == sorted(others)
    job.run_shards(settings, path, out, DT, Shard(1, 2))
    assert not list((work / "features").iterdir())
    assert written.exists() and not half.exists()


def test_a_bucket_holds_the_same_as_a_folder(fake: Fake, tmp_path: Path) -> None:
    path = made.write(tmp_path / "users.parquet", [made.user(number) for number in range(120)])
    settings, folder = fake.settings(), tmp_path / "out"
    for dt in ("2026-11-27", DT):
        run(settings, path, folder, dt)
    with gcs.server() as address:
        from google.cloud.storage import Client

        Client(project="test").create_bucket("features")
        out = "gs://features/users/recots"
        for dt in ("2026-11-27", DT):
            done = job.run_shards(settings, path, out, dt)
            manifest = commit(settings, out, dt)
        assert address
        assert (done.copied, manifest.copied) == (120, 120)
        assert partition.newest(Place(out)) == DT
        local = partition.read_manifest(Place(str(folder)), DT)
        assert [each.model_dump(exclude={"bytes"}) for each in manifest.shards] == [
            each.model_dump(exclude={"bytes"}) for each in local.shards
        ]
        for shard in manifest.shards:
            filesystem, inside = (Place(out) / f"dt={DT}").arrow(shard.path)
            got = pq.read_table(inside, filesystem=filesystem, partitioning=None)
            assert got.drop_columns("seconds").equals(
                pq.ParquetFile(folder / f"dt={DT}" / shard.path).read().drop_columns("seconds")
            )


def test_the_statuses_are_all_counted(fake: Fake, tmp_path: Path) -> None:
    settings = fake.settings(usd_per_hour=7.2)
    run(
        settings, made.write(tmp_path / "users.parquet", [made.user(number) for number in range(100)]), tmp_path / "out"
    )
    manifest = partition.read_manifest(Place(str(tmp_path / "out")), DT)
    assert tuple(manifest.status) == STATUSES
    lengths = rows(tmp_path / "out", DT)["recot_tokens"].to_numpy()
    assert manifest.recot_tokens.p50 == np.quantile(lengths, 0.5)
    assert manifest.recot_tokens.p99 == round(float(np.quantile(lengths, 0.99)), 4)
    assert manifest.generated == 100
    assert manifest.usd_per_1000_users == pytest.approx(7.2 * manifest.generator_seconds / 3600 * 10, rel=1e-3)
    marker = (tmp_path / "out" / f"dt={DT}/_SUCCESS").read_text().strip()
    assert marker == hashlib.sha256((tmp_path / "out" / f"dt={DT}/_manifest.json").read_bytes()).hexdigest()
