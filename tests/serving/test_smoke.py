"""The inference that a version must pass, against a real server."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as triton

from tests.serving import versions
from trackrec.features.client import Triton
from trackrec.preflight import serving as preflight
from trackrec.serving import server, smoke


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, server.Server]]:
    folder = tmp_path_factory.mktemp("smoke")
    repository = versions.write(folder / "repository", "g-1")
    with server.running(repository, folder / "log") as running:
        yield repository, running


def probe(running: server.Server, repository: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What a pod's probes call."""
    command = [sys.executable, "-m", "trackrec.serving.smoke", running.grpc, f"--repository={repository}", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_version_is_asked_for_one_answer_of_every_model(served: tuple[Path, server.Server]) -> None:
    repository, running = served
    expected = smoke.expected(repository)
    assert expected.versions == {"generator": "g-1", "encoder": "1", "ranker_base": "1", "ranker_trackrec": "1"}
    assert expected.items == versions.ITEMS
    found = smoke.check(running.grpc, expected)
    assert found.keys() == expected.versions.keys()
    generated = found["generator"]
    assert (generated["text"], generated["finish_reason"], generated["output_tokens"]) == ("quiet films", "length", 8)
    assert generated["prompt_tokens"] > 20 and generated["model_version"] == "g-1"
    assert (found["encoder"]["width"], found["encoder"]["num_tokens"]) == (versions.WIDTH, 5)
    assert found["ranker_base"]["scores"] == found["ranker_trackrec"]["scores"] == [0.25] * 3


def test_the_environments_proxy_is_not_asked(
    served: tuple[Path, server.Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is for the way out; a pod's address is none of its business. Nor is it the preflight's and the batch job's."""
    repository, running = served
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("grpc_proxy", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert smoke.check(running.grpc, smoke.expected(repository), seconds=20)
    assert probe(running, repository, "--alive").returncode == 0
    assert "✔" in str(next(preflight.triton(running.grpc, "movies", 10)))

    async def contracts() -> str:
        async with Triton(running.grpc) as job:
            return (await job.contracts())[0].model_version

    assert asyncio.run(contracts()) == "g-1"


def test_a_server_of_another_version_does_not_pass(served: tuple[Path, server.Server], tmp_path: Path) -> None:
    other = smoke.expected(versions.write(tmp_path, "g-2"))
    with pytest.raises(smoke.SmokeError, match=r"generator at .* is of version g-1, not g-2"):
        smoke.check(served[1].grpc, other)


@pytest.mark.parametrize(
    ("model", "broken", "message"),
    [
        ("generator", "error", "generator at .* out of memory"),
        ("generator", "empty", r"the generator wrote '' \(8 of at most 8 tokens"),
        ("generator", "long", r"9 of at most 8 tokens"),
        ("generator", "silent", "the generator did not answer within 2 s|Deadline Exceeded"),
        ("encoder", "nan", "vector is zero or not finite"),
        ("ranker_trackrec", "scores", r"ranker_trackrec's scores are no probabilities: \[2.0, 2.0, 2.0\]"),
    ],
)
def test_what_cannot_be_right_does_not_pass(
    served: tuple[Path, server.Server], model: str, broken: str, message: str
) -> None:
    repository, running = served
    expected = smoke.expected(repository)
    asked = smoke.Expected({model: expected.versions[model]}, expected.items)
    with triton.InferenceServerClient(running.grpc) as client:
        versions.write(repository, "g-1", broken)
        try:
            client.load_model(model)
            with pytest.raises(smoke.SmokeError, match=message) as caught:
                smoke.check(running.grpc, asked, seconds=2 if broken == "silent" else 20)
            # What only takes long is no reason to kill a server; what fails is.
            assert isinstance(caught.value, smoke.SlowError) == (broken == "silent")
            alive = probe(running, repository, "--alive", "--seconds=2")
            assert (alive.returncode == 0) == (broken == "silent"), alive.stderr
            if broken == "silent":
                said = json.loads(alive.stdout)
                assert said.keys() == expected.versions.keys() and said["generator"].keys() == {"slow"}
        finally:
            versions.write(repository, "g-1")
            client.load_model(model)
    assert smoke.check(running.grpc, asked).keys() == {model}


def test_answers_that_together_take_too_long_are_slow(
    served: tuple[Path, server.Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though each of them comes in time."""
    repository, running = served
    infer = triton.InferenceServerClient.infer

    def under_load(*args: Any, **given: Any) -> triton.InferResult:
        answer = infer(*args, **given)
        time.sleep(1.2)
        return answer

    monkeypatch.setattr(triton.InferenceServerClient, "infer", under_load)
    expected = smoke.expected(repository)
    asked = smoke.Expected({name: expected.versions[name] for name in ("encoder", *smoke.RANKERS)}, expected.items)
    with pytest.raises(smoke.SlowError, match=r"did not all answer within 2 s|Deadline Exceeded"):
        smoke.check(running.grpc, asked, seconds=20, within=2)


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(smoke.SmokeError, match=r"generator at 127.0.0.1:9: .*(?i:unavailable)") as caught:
        smoke.check("127.0.0.1:9", smoke.Expected({"generator": "g"}), seconds=5)
    assert "\n" not in str(caught.value)


def test_what_is_no_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        smoke.expected(tmp_path)


def test_a_pods_probe_is_the_same_as_a_command(served: tuple[Path, server.Server], tmp_path: Path) -> None:
    repository, running = served
    passed = probe(running, repository)
    assert passed.returncode == 0 and '"quiet films"' in passed.stdout, passed.stderr
    assert probe(running, repository, "--alive").returncode == 0
    refused = probe(running, versions.write(tmp_path, "g-2"))
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: generator at ") and len(refused.stderr.splitlines()) == 1


def test_a_models_process_that_died_is_found(tmp_path: Path) -> None:
    """Triton starts it never again and stays ready: the manifests' liveness probe."""
    repository = versions.write(tmp_path / "repository", "g-1")
    with server.running(repository, tmp_path / "log", models=["generator", "encoder"]) as running:
        expected = smoke.Expected({"generator": "g-1", "encoder": "1"})
        assert smoke.check(running.grpc, expected).keys() == {"generator", "encoder"}
        stubs = subprocess.run(
            ["pgrep", "--parent", str(running.process.pid), "--full", "encoder"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for pid in map(int, stubs):
            os.kill(pid, signal.SIGKILL)
        assert running.ready()
        for model in ("ranker_base", "ranker_trackrec"):
            shutil.rmtree(repository / model)
        dead = probe(running, repository, "--alive", "--seconds=20")
        assert dead.returncode == 1 and dead.stderr.startswith("error: encoder at "), dead
