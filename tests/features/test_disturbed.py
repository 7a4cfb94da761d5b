"""kill -9 of the server, of its model's process and of the job, in the middle: the rows are those of a quiet run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.features import made
from tests.features.conftest import WIDTH, Fake, rows, run
from tests.features.proxy import proxy
from tests.serving import fakes
from trackrec.config import DecodingSettings
from trackrec.features import job, recovery, table
from trackrec.features.commit import commit
from trackrec.features.recovery import OtherModelsError, ServerLostError
from trackrec.serving import repository, server
from trackrec.serving_config import ExportSettings
from trackrec.shards import Shard

DT = "2026-11-28"
USERS = 200
# Requests under way at once.
CONCURRENCY = 16
# Of what had been answered before a kill, that may not have been on the disk yet.
UNWRITTEN = 32
ABORT_SECONDS = 3


@pytest.fixture
def slow(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A server of this test's own that takes 50 ms for a RecCoT, and the parameter, if any, to load (ms)."""
    folder = tmp_path / "slow"
    folder.mkdir()
    models = fakes.repository(
        folder / "repository", width=WIDTH, log=folder / "asked", delay_ms=50, load_ms=getattr(request, "param", 0)
    )
    # Found out sooner than by default, for the test's sake.
    monkeypatch.setattr(recovery, "_SILENCE_SECONDS", 1.0)
    found = Fake(server.start(models, folder / "log"), models, folder / "asked")
    try:
        found.server.wait_ready(60)
        yield found
    finally:
        found.server.kill()


@pytest.fixture
def users(tmp_path: Path) -> Path:
    return made.write(tmp_path / "users.parquet", [made.user(number) for number in range(USERS)])


def when_asked(fake: Fake, prompts: int, do: Callable[[], None]) -> Future[None]:
    """Does something once so many prompts have come to the generator."""
    return when(lambda: fake.log.exists() and len(fake.log.read_bytes()) >= 65 * prompts, do)


def when(so: Callable[[], bool], do: Callable[[], None]) -> Future[None]:
    """Its result says whether it has come about."""
    until = time.monotonic() + 60

    def wait() -> None:
        while not so():
            assert time.monotonic() < until, "it was not disturbed: the job had ended before"
            time.sleep(0.01)
        do()

    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(wait)
    finally:
        pool.shutdown(wait=False)


def restart(fake: Fake) -> None:
    ports = [int(address.rpartition(":")[2]) for address in (fake.server.grpc, fake.server.http, fake.server.metrics)]
    fake.server = server.start(fake.repository, fake.server.log, ports=(ports[0], ports[1], ports[2]))


def kill_model(fake: Fake, model: str) -> None:
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes()
        except OSError:  # it has ended
            continue
        marks = (b"triton_python_backend_stub", fake.server.shm_prefix.encode(), f"/{model}/".encode())
        if all(mark in command for mark in marks):
            os.kill(int(process.parent.name), signal.SIGKILL)
            start_again_if_aborted(fake)
            return
    raise AssertionError(f"no process of the model {model}")


def start_again_if_aborted(fake: Fake) -> None:
    """As Kubernetes would: Triton itself aborts where the process died holding a lock of their shared memory."""
    try:
        fake.server.process.wait(ABORT_SECONDS)
    except subprocess.TimeoutExpired:
        return
    fake.server.kill()
    restart(fake)


def expected(fake: Fake, users: Path, tmp_path: Path) -> object:
    run(fake.settings(), users, tmp_path / "quiet", DT)
    return rows(tmp_path / "quiet", DT)


def test_the_server_is_killed_and_comes_back(fake: Fake, slow: Fake, users: Path, tmp_path: Path) -> None:
    def kill() -> None:
        slow.server.kill()
        restart(slow)

    killer = when_asked(slow, 90, kill)
    run(slow.settings(), users, tmp_path / "out", DT)
    killer.result()
    assert rows(tmp_path / "out", DT).equals(expected(fake, users, tmp_path))
    assert USERS < len(slow.asked()) <= USERS + CONCURRENCY + 10  # and small requests that look whether it is well


@pytest.mark.parametrize("model", ["generator", "encoder"])
def test_a_models_process_is_killed(
    model: str, fake: Fake, slow: Fake, users: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killer = when_asked(slow, 90, lambda: kill_model(slow, model))
    run(slow.settings(), users, tmp_path / "out", DT)
    killer.result()
    assert f"is lost ({model}: " in caplog.text
    assert rows(tmp_path / "out", DT).equals(expected(fake, users, tmp_path))
    assert len(slow.asked()) <= USERS + CONCURRENCY + 10


@pytest.mark.parametrize("slow", [1500], indirect=True)
def test_pods_do_not_unload_what_another_has_loaded(fake: Fake, slow: Fake, users: Path, tmp_path: Path) -> None:
    settings, out = slow.settings(), str(tmp_path / "out")
    killer = when_asked(slow, 60, lambda: kill_model(slow, "generator"))
    with ThreadPoolExecutor(4) as pool:
        pods = [pool.submit(job.run_shards, settings, users, out, DT, Shard(number, 4)) for number in range(4)]
        assert sum(pod.result().rows for pod in pods) == USERS
    killer.result()
    commit(settings, out, DT)
    assert rows(tmp_path / "out", DT).equals(expected(fake, users, tmp_path))
    # At the start, and by each pod once at most: they are not at it against one another.
    assert slow.server.log.read_text(errors="replace").count("successfully loaded 'generator'") <= 1 + 4


def test_the_process_of_the_backend_vllm_is_killed(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A real model, in our own backend; its texts do not depend on what is generated beside them."""
    users = made.write(tmp_path / "users.parquet", [made.user(number) for number in range(60)])
    models = fakes.repository(tmp_path / "repository", width=WIDTH)
    shutil.rmtree(models / "generator")
    decoding = DecodingSettings(max_tokens=8)
    repository.write_generator(
        models / "generator",
        ExportSettings(dtype="float32"),
        decoding,
        domain="movies",
        history_length=100,
        base_model=tiny_model,
        generator=tiny_model,
    )
    first = tmp_path / "out" / f"dt={DT}" / table.shard_path(0)
    environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    with server.running(models, tmp_path / "log", environment=environment) as triton:
        fake = Fake(triton, models, tmp_path / "asked")
        settings = fake.settings(shard_users=20, deadline_s=60)
        run(settings, users, tmp_path / "quiet", DT)
        killer = when(first.exists, lambda: kill_model(fake, "generator"))
        try:
            done = run(settings, users, tmp_path / "out", DT)
            killer.result()
        finally:
            fake.server.kill()
    assert "is lost (generator: " in caplog.text
    assert done.status == {"ok": 60}
    assert rows(tmp_path / "out", DT).equals(rows(tmp_path / "quiet", DT))


def test_a_server_that_stays_away_ends_the_job_and_nothing_is_lost(
    fake: Fake, slow: Fake, users: Path, tmp_path: Path
) -> None:
    killer = when_asked(slow, 90, slow.server.kill)
    settings = slow.settings(deadline_s=2)
    with pytest.raises(ServerLostError, match="run the same command again"):
        job.run_shards(settings, users, str(tmp_path / "out"), DT)
    killer.result()
    restart(slow)
    slow.server.wait_ready(60)
    done = job.run_shards(settings, users, str(tmp_path / "out"), DT)
    commit(settings, str(tmp_path / "out"), DT)
    assert done.skipped >= 1
    assert rows(tmp_path / "out", DT).equals(expected(fake, users, tmp_path))
    assert len(slow.asked()) <= USERS + CONCURRENCY + 10


def test_the_job_is_killed_and_run_again(fake: Fake, slow: Fake, users: Path, tmp_path: Path) -> None:
    settings = slow.settings()
    given = [f"--set={name}={getattr(settings, name)}" for name in ("shard_users", "concurrency", "encoder_batch")]
    command = [sys.executable, "-m", "trackrec", "features", f"--users={users}", f"--triton={settings.triton}"]
    command += [f"--out={tmp_path / 'out'}", f"--dt={DT}", *given]
    for prompts in (40, 130):
        process = subprocess.Popen(command)
        when_asked(slow, prompts, process.kill).result()
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / f"dt={DT}/_SUCCESS").exists()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"{USERS} users ({USERS} ok); {USERS} RecCoTs generated, 0 copied" in output
    assert rows(tmp_path / "out", DT).equals(expected(fake, users, tmp_path))
    assert len(slow.asked()) <= USERS + 2 * (CONCURRENCY + UNWRITTEN)


def test_a_prompt_that_kills_the_model_fails_alone(slow: Fake, tmp_path: Path) -> None:
    users = [made.user(number) for number in range(40)]
    users[7] = made.user(7, "(kills)")
    path = made.write(tmp_path / "users.parquet", users)
    done = run(slow.settings(retries=2), path, tmp_path / "out", DT)
    assert done.status == {"ok": 39, "failed": 1}
    assert rows(tmp_path / "out", DT)["status"].to_pylist()[7] == "failed"


def test_another_model_after_a_restart_ends_the_job(slow: Fake, users: Path, tmp_path: Path) -> None:
    def change() -> None:
        slow.server.kill()
        fakes.repository(slow.repository, width=WIDTH, log=slow.log, generator={"model_version": "g2"})
        restart(slow)

    killer = when_asked(slow, 90, change)
    with pytest.raises(OtherModelsError, match="now serves other models"):
        job.run_shards(slow.settings(), users, str(tmp_path / "out"), DT)
    killer.result()


def test_the_connection_moves_to_another_server_of_the_same_models(
    fake: Fake, slow: Fake, users: Path, tmp_path: Path
) -> None:
    quiet = expected(fake, users, tmp_path)
    with proxy(slow.server.grpc) as service:
        mover = when_asked(slow, 90, lambda: service.lead(fake.server.grpc))
        done = run(slow.settings(triton=service.address, retries=1), users, tmp_path / "out", DT)
    mover.result()
    assert done.status == {"ok": USERS}
    assert rows(tmp_path / "out", DT).equals(quiet)
    assert len(slow.asked()) < USERS


@pytest.mark.parametrize(
    "other",
    [{"generator": {"model_version": "2"}}, {"encoder": {"model_version": "2"}}, {"width": 2 * WIDTH}],
    ids=["generator", "encoder", "width"],
)
def test_the_connection_moves_to_a_server_of_another_version(
    other: dict[str, Any], slow: Fake, users: Path, tmp_path: Path, work: Path
) -> None:
    """It answers at once, and has answered more than the first: nothing fails."""
    folder = tmp_path / "other"
    folder.mkdir()
    with server.running(fakes.repository(folder / "repository", **{"width": WIDTH, **other}), folder / "log") as second:
        run(slow.settings(triton=second.grpc), users, folder / "out", DT)
        with proxy(slow.server.grpc) as service:
            mover = when_asked(slow, 90, lambda: service.lead(second.grpc))
            with pytest.raises(OtherModelsError, match="now serves other models"):
                job.run_shards(slow.settings(triton=service.address), users, str(tmp_path / "out"), DT)
        mover.result()
    assert len(list((tmp_path / "out").rglob("part.parquet"))) <= 1
    assert not list((work / "features").iterdir())
