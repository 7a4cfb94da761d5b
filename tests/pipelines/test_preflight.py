"""The first task of every pipeline: everything waits for it, it gets every secret, and it looks anew each time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Compiled, compiled

PIPELINES = ("trackrec", "ablations", "backbones", "batch_features")
READS = {"backbones": {"encoder"}, "batch_features": {"raw_data", "triton", "out"}}
WITHOUT_TEACHER = READS.keys()


@pytest.fixture(scope="module", params=PIPELINES)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Compiled]:
    # A profile's settings for all stages must not make it wait or answer from the cache.
    asked = "resources.preflight={cpu: '1', retries: 4, cache: true, work_claim: trackrec-work}"
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, compiled("ml-1m-qwen2.5-7b", folder, asked, pipeline=request.param)


def test_every_task_waits_for_it(pipeline: tuple[str, Compiled]) -> None:
    tasks = pipeline[1].pipeline["root"]["dag"]["tasks"]
    waiting: set[str] = {"preflight"}
    assert "dependentTasks" not in tasks["preflight"]
    while more := {
        name for name, task in tasks.items() if name not in waiting and waiting & set(task.get("dependentTasks", []))
    }:
        waiting |= more
    assert waiting == set(tasks) and len(tasks) > (5 if pipeline[0] == "batch_features" else 30)


def test_it_is_neither_cached_nor_retried(pipeline: tuple[str, Compiled]) -> None:
    task = pipeline[1].tasks["preflight"]
    assert not task["cachingOptions"].get("enableCache", False)
    assert "retryPolicy" not in task


def test_it_takes_no_gpu_and_sees_the_checkpoints_claim(pipeline: tuple[str, Compiled]) -> None:
    _, ir = pipeline
    assert "accelerator" not in ir.executor("preflight")["container"]["resources"]
    [claim] = ir.platform("preflight")["pvcMount"]
    assert (claim["constant"], claim["mountPath"]) == ("trackrec-work", "/tmp/trackrec-work")


def test_a_missing_secret_lets_its_pod_start(pipeline: tuple[str, Compiled]) -> None:
    name, ir = pipeline
    secrets = ir.platform("preflight").get("secretAsEnv", [])
    found = [(s["secretName"], s["keyToEnv"], s["optional"]) for s in secrets]
    teacher = ("trackrec-teacher", [{"secretKey": "api-key", "envVar": "TEACHER_API_KEY"}], True)
    assert found == ([] if name in WITHOUT_TEACHER else [teacher])


def test_it_is_given_the_runs_own_addresses(pipeline: tuple[str, Compiled]) -> None:
    name, ir = pipeline
    given = ir.tasks["preflight"]["inputs"]["parameters"]
    from_run = {key for key, value in given.items() if "componentInputParameter" in value}
    assert from_run == READS.get(name, {"encoder", "base_model", "raw_data"})


def test_on_this_machine_it_stops_a_run_at_once_and_says_all_that_is_wrong(tmp_path: Path) -> None:
    model, root = tmp_path / "model", tmp_path / "runs"
    model.mkdir()
    (model / "config.json").write_text("{}")
    teacher = "{kind: openai, model: m, max_cost_usd: 1.0, prompt_usd_per_million: 0, completion_usd_per_million: 0}"
    command = [Path(sys.executable).with_name("trackrec"), "run", "-c", "pipelines/configs/quickstart.yaml"]
    command += ["--root", root, "--set", f"base_model={model}", "--set", f"distill_data.teacher={teacher}"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "TEACHER_API_KEY"},
    )
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    for expected in (
        "preflight failed",
        "things to mend before this run can go through",
        "config.json lacks hidden_size",
        "has no tokenizer.json",
        "has no chat template",
        "has neither model.safetensors nor",
        "the environment variable TEACHER_API_KEY is not set or empty",
    ):
        assert expected in said, done.stderr
    assert not list(root.glob("artifacts/*/ingest"))
