"""The commands that talk to Kubeflow Pipelines, against a server in memory; see `kfp_server`."""

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kfp_server_api as api
import pytest
import yaml
from kfp.client import Client
from pytest_httpserver import HTTPServer
from werkzeug import Response

from pipelines import cli, client, cluster_cli, ir
from pipelines.client import Cluster
from pipelines.options import Pipeline, built
from tests.pipelines.kfp_server import HANG, PAGE, KfpServer
from trackrec.run_config import RunConfig

BUCKET = {"raw_data": "gs://bucket/ml-100k.zip", "base_model": "gs://bucket/smollm2", "encoder": "gs://bucket/minilm"}
Run = Callable[..., str]


_built: dict[str, Any] = {}


def built_once(pipeline: Pipeline, config: RunConfig) -> Any:
    """kfp walks the whole stack at every setting of a task, which takes seconds under pytest."""
    key = f"{pipeline} {ir.config_text(config)}"
    if key not in _built:
        _built[key] = built(pipeline, config)
    return _built[key]


@pytest.fixture
def server(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KfpServer]:
    """A server that the environment points to, as it would to a real one."""
    server = KfpServer()
    httpserver.expect_request(re.compile(".*")).respond_with_handler(server)
    for name in ("KF_PIPELINES_SA_TOKEN_PATH", "KF_PIPELINES_DEFAULT_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", httpserver.url_for(""))
    monkeypatch.setattr(Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    monkeypatch.setattr(client, "TIMEOUT", 0.5)
    monkeypatch.setattr(cluster_cli, "WATCH", 0.05)
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": httpserver.url_for("")}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "me"}}],
        "current-context": "test",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(kubeconfig))
    monkeypatch.setattr("kubernetes.config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(cluster_cli, "built", built_once)
    yield server
    httpserver.check_assertions()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The quick start in a bucket, cut down to what compiles quickly."""
    raw = yaml.safe_load(Path("pipelines/configs/quickstart.yaml").read_text()) | BUCKET
    raw["loop"] = {"iterations": 1, "controls": False}
    raw["ranking"] = {"backbones": ["dcn"], "controls_of": [], "by_iteration_of": []}
    path = tmp_path_factory.mktemp("config") / "cluster.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


@pytest.fixture
def trackrec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; its output, or with `fails` its message."""

    def run(*arguments: str, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["trackrec", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        assert ended.value.code == (1 if fails else 0), told.out + told.err
        assert "Traceback" not in told.err
        return told.err if fails else told.out

    return run


def run_in(output: str) -> str:
    found = re.search(r"run ([0-9a-f-]{36}) ", output)
    assert found, output
    return found[1]


def test_a_second_upload_of_the_same_pipeline_is_unchanged(server: KfpServer, trackrec: Run, config: str) -> None:
    assert "uploaded" in trackrec("upload", "--config", config)
    assert "unchanged" in trackrec("upload", "--config", config)
    assert len(server.versions) == 1
    assert "uploaded" in trackrec("upload", "--config", config, "--set", "sample.n=3")
    [first, second] = server.versions.values()
    assert first.pipeline_id == second.pipeline_id
    assert first.display_name != second.display_name


def test_a_versions_name_is_a_hash_of_both_documents(tmp_path: Path) -> None:
    names = set()
    for number, documents in enumerate(([{"a": 1}, {"b": 1}], [{"a": 1}, {"b": 2}], [{"a": 2}, {"b": 1}])):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump_all(documents))
        names.add(ir.version(path))
    assert len(names) == 3


def test_a_version_uploaded_at_the_same_moment_by_another_counts_as_ours(server: KfpServer, tmp_path: Path) -> None:
    package = tmp_path / "pipeline.yaml"
    package.write_text(yaml.safe_dump_all([{"schemaVersion": "2.1.0"}, {"platforms": {}}]))
    cluster = Cluster(None, None)
    seen = cluster._version
    looks: list[str] = []

    def blind_once(pipeline: str, version: str) -> Any:
        looks.append(version)
        return None if len(looks) == 1 else seen(pipeline, version)

    assert cluster.upload("p", "v", str(package))[1]
    cluster._version = blind_once  # type: ignore[method-assign]
    version, is_new = cluster.upload("p", "v", str(package))
    assert not is_new and version.display_name == "v"


def test_a_run_is_of_the_uploaded_version_with_its_parameters(server: KfpServer, trackrec: Run, config: str) -> None:
    run = server.runs[
        run_in(trackrec("submit", "--config", config, "--param", "raw_data_version=7", "--experiment", "nightly"))
    ]
    assert run.pipeline_version_reference.pipeline_version_id in server.versions
    assert run.runtime_config.parameters == {"raw_data_version": "7"}
    assert run.service_account == "trackrec"
    assert server.experiments[run.experiment_id].display_name == "nightly"
    run_in(trackrec("submit", "--config", config, "--experiment", "nightly"))
    assert len(server.versions) == len(server.experiments) == 1


def test_overrides_reach_the_run(server: KfpServer, trackrec: Run, config: str) -> None:
    run = server.runs[run_in(trackrec("submit", "--config", config, "--set", "sample.n=5"))]
    tasks = server.spec(run)["root"]["dag"]["tasks"]
    assert tasks["sample"]["inputs"]["parameters"]["settings"]["runtimeValue"]["constant"]["n"] == 5
    assert server.experiments[run.experiment_id].display_name == "quickstart"


def test_without_cache_no_task_of_the_run_may_use_it(server: KfpServer, trackrec: Run, config: str) -> None:
    trackrec("submit", "--config", config)
    run = server.runs[run_in(trackrec("submit", "--config", config, "--no-cache"))]
    [cached] = [server.spec(one) for one in server.runs.values() if one is not run]
    assert all(task["cachingOptions"] == {} for task in server.spec(run)["root"]["dag"]["tasks"].values())
    assert all(task["cachingOptions"]["enableCache"] for task in cached["root"]["dag"]["tasks"].values())
    assert run.pipeline_spec["platform_spec"]["platforms"]["kubernetes"]
    # A copy without cache is no version that the next person starts by chance.
    assert len(server.versions) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--param", "raw=gs://x"), "write NAME=VALUE; the pipeline has: base_model, "),
        (("--param", "raw_data"), "write NAME=VALUE; the pipeline has: base_model, "),
        (("--param", "raw_data=package:ml-100k"), "raw_data: package:ml-100k is for one machine"),
        (("--pipeline", "backbones"), "the pipeline needs --param contexts="),
        (("--set", "sample.m=1"), "sample.m: unknown key"),
    ],
)
def test_what_cannot_run_is_refused_before_the_server_is_asked(
    server: KfpServer, trackrec: Run, config: str, arguments: tuple[str, ...], message: str
) -> None:
    assert message in trackrec("submit", "--config", config, *arguments, fails=True)
    assert server.calls == []


def test_a_schedule_is_made_once_and_replaced_when_it_changes(server: KfpServer, trackrec: Run, config: str) -> None:
    nightly = ("schedule", "nightly", "--config", config, "--cron")
    assert "nightly: new" in trackrec(*nightly, "0 0 3 * * *")
    assert "nightly: unchanged" in trackrec(*nightly, "0 0 3 * * *")
    [first] = server.schedules.values()
    assert (first.no_catchup, first.max_concurrency, first.status) == (True, "1", "ENABLED")
    assert first.trigger.cron_schedule.cron == "0 0 3 * * *"
    assert "nightly: replaced" in trackrec(*nightly, "0 0 4 * * *")
    [second] = server.schedules.values()
    assert second.recurring_run_id != first.recurring_run_id
    assert "nightly: replaced" in trackrec(*nightly, "0 0 4 * * *", "--set", "sample.n=3")
    assert len(server.schedules) == 1
    # Another's name stays as it is.
    trackrec("schedule", "weekly", "--config", config, "--cron", "0 0 3 * * 1")
    assert "nightly: paused" in trackrec("schedule", "nightly", "--pause")
    assert {one.display_name: one.status for one in server.schedules.values()} == {
        "nightly": "DISABLED",
        "weekly": "ENABLED",
    }
    assert "nightly: resumed" in trackrec(*nightly, "0 0 4 * * *", "--set", "sample.n=3")
    assert "nightly: deleted" in trackrec("schedule", "nightly", "--delete")
    assert [one.display_name for one in server.schedules.values()] == ["weekly"]
    assert "no schedule 'nightly'" in trackrec("schedule", "nightly", "--delete", fails=True)


def test_a_schedule_that_cannot_be_replaced_stays(server: KfpServer, trackrec: Run, config: str) -> None:
    nightly = ("schedule", "nightly", "--config", config, "--cron")
    trackrec(*nightly, "0 0 3 * * *")
    server.calls.clear()
    trackrec(*nightly, "0 0 4 * * *")
    made = server.calls.index("POST /apis/v2beta1/recurringruns")
    [deleted] = [number for number, call in enumerate(server.calls) if call.startswith("DELETE")]
    assert made < deleted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cron", "0 3 * * *"), "six fields, seconds first"),
        ((), "give one of --cron (with --config), --pause and --delete"),
        (("--pause", "--delete"), "give one of"),
    ],
)
def test_a_schedule_needs_one_thing_to_do(
    server: KfpServer, trackrec: Run, config: str, arguments: tuple[str, ...], message: str
) -> None:
    assert message in trackrec("schedule", "nightly", "--config", config, *arguments, fails=True)
    assert "--cron needs --config" in trackrec("schedule", "nightly", "--cron", "0 0 3 * * *", fails=True)
    assert server.calls == []


def test_status_lists_the_tasks_and_what_came_from_the_cache(server: KfpServer, trackrec: Run, config: str) -> None:
    run_id = run_in(trackrec("submit", "--config", config))
    assert re.search(r"sample 1 +–", trackrec("status", run_id))
    server.work(run_id, cached=("ingest",))
    told = trackrec("status", run_id)
    assert re.search(r"quickstart-[\d-]+: SUCCEEDED", told)
    assert re.search(r"ingest +cached +0:01:30", told) and re.search(r"sample 1 +succeeded +0:01:30", told)
    assert "driver" not in told and "executor" not in told
    assert run_id in trackrec("status")
    server.no_metadata = True
    told = trackrec("status", run_id)
    assert re.search(r"ingest +succeeded", told) and "what came from the cache is not marked" in told


def test_watching_ends_with_the_run_and_as_it_ends(server: KfpServer, trackrec: Run, config: str) -> None:
    good, bad = (run_in(trackrec("submit", "--config", config)) for _ in range(2))
    timer = threading.Timer(0.5, server.work, [good])
    timer.start()
    server.calls.clear()
    told = trackrec("status", good, "--watch")
    timer.join()
    assert "SUCCEEDED" in told and server.calls.count(f"GET /apis/v2beta1/runs/{good}") > 1
    server.work(bad, until="sample 1")
    told = trackrec("status", bad, "--watch", fails=True)
    assert f"the run {bad} ended FAILED: task sample 1 failed" in told


def test_logs_are_those_of_the_tasks_own_pods(server: KfpServer, trackrec: Run, config: str) -> None:
    run_id = run_in(trackrec("submit", "--config", config))
    server.work(run_id, until="sample 1", cached=("contexts",))
    everything = trackrec("logs", run_id)
    assert "ingest at work" in everything and "sample 1 at work" in everything
    # A task of the cache never had a pod but its driver's.
    assert everything.count("driver at work") == 1
    one = trackrec("logs", run_id, "sample 1", "--tail", "1")
    assert "Traceback" in one and "at work" not in one
    assert "no task 'sampel'; it has:" in " ".join(trackrec("logs", run_id, "sampel", fails=True).split())
    told = trackrec("logs", run_id, "generate 1", fails=True)
    assert "has no pod: it has not begun, or it came from the cache" in told
    assert "--follow needs a task" in trackrec("logs", run_id, "--follow", fails=True)
    assert "Traceback" in trackrec("logs", run_id, "sample 1", "--follow")
    server.pods.clear()
    assert f"no pod of the run {run_id} in the namespace kubeflow" in trackrec("logs", run_id, fails=True)


def test_a_cancelled_run_is_terminated(server: KfpServer, trackrec: Run, config: str) -> None:
    run_id = run_in(trackrec("submit", "--config", config))
    assert f"cancelled {run_id}" in trackrec("cancel", run_id)
    assert server.runs[run_id].state == "CANCELED"


def test_artifacts_are_listed_with_their_uris(server: KfpServer, trackrec: Run, config: str) -> None:
    run_id = run_in(trackrec("submit", "--config", config))
    assert trackrec("artifacts", run_id) == ""
    server.work(run_id, until="sample 1")
    told = trackrec("artifacts", run_id)
    assert re.search(rf"contexts +examples +gs://bucket/v2/{run_id}/contexts/examples", told)
    assert "sample" not in told
    server.no_metadata = True
    assert "HTTP 404" in trackrec("artifacts", run_id, fails=True)


def inputs_of(run: api.V2beta1Run) -> dict[str, str]:
    """The URIs that a one-stage run imports, by the inputs' names."""
    spec = run.pipeline_spec["pipeline_spec"]
    importers = {}
    for task in spec["root"]["dag"]["tasks"].values():
        executor = spec["components"][task["componentRef"]["name"]]["executorLabel"]
        if importer := spec["deploymentSpec"]["executors"][executor].get("importer"):
            title = task["taskInfo"]["name"].removeprefix("input ")
            importers[title] = importer["artifactUri"]["constant"]
            assert importer["metadata"] == {"version": "7"}
    return importers


def test_one_stage_of_a_clusters_run_again_on_its_artifacts(server: KfpServer, trackrec: Run, config: str) -> None:
    whole = run_in(trackrec("submit", "--config", config, "--set", "sample.max_tokens=11", "--experiment", "nightly"))
    server.work(whole, until="sdpo 1", cached=("contexts",))
    run = server.runs[run_in(trackrec("stage", "sample 1", "--run-id", whole, "--set", "sample.n=3"))]
    assert inputs_of(run) == {
        "contexts": f"gs://bucket/v2/{whole}/contexts/contexts",
        "generator": f"gs://bucket/v2/{whole}/sft-generator/generator",
    }
    spec = run.pipeline_spec["pipeline_spec"]
    parameters = spec["root"]["dag"]["tasks"]["sample"]["inputs"]["parameters"]
    settings = parameters["settings"]["runtimeValue"]["constant"]
    # The override, and what the run itself had been submitted with.
    assert (settings["n"], settings["max_tokens"]) == (3, 11)
    assert run.experiment_id == server.runs[whole].experiment_id
    assert spec["root"]["dag"]["tasks"]["sample"]["cachingOptions"] == {"enableCache": True}

    # Again from what has come of it: the config travels on.
    server.work(run.run_id)
    again = server.runs[run_in(trackrec("stage", "sample", "--run-id", run.run_id, "--no-cache"))]
    assert inputs_of(again) == inputs_of(run)
    task = again.pipeline_spec["pipeline_spec"]["root"]["dag"]["tasks"]["sample"]
    assert task["inputs"]["parameters"]["settings"]["runtimeValue"]["constant"]["n"] == 3
    assert task["cachingOptions"] == {}

    told = trackrec("stage", "sample 1", "--run-id", whole, "--set", "sdpo.beta=9", fails=True)
    assert "sdpo.beta: not a setting of sample 1; allowed here: sample, seed, resources.sample" in told
    told = trackrec("stage", "rec_tune 1", "--run-id", whole, fails=True)
    assert "has no stage or task 'rec_tune 1'" in told


def test_a_run_started_from_kubeflows_pages_can_be_continued(server: KfpServer, trackrec: Run, config: str) -> None:
    trackrec("upload", "--config", config)
    [version] = server.versions.values()
    experiment = Cluster(None, None).experiment("Default")
    reference = api.V2beta1PipelineVersionReference(
        pipeline_id=version.pipeline_id, pipeline_version_id=version.pipeline_version_id
    )
    clicked = server.start(api.V2beta1Run(experiment_id=experiment, pipeline_version_reference=reference))
    server.work(clicked.run_id)
    run = server.runs[run_in(trackrec("stage", "ingest", "--run-id", clicked.run_id))]
    assert len(inputs_of(run)) == 1


def test_a_pipeline_of_another_program_is_named_as_such(server: KfpServer, trackrec: Run, config: str) -> None:
    run_id = run_in(trackrec("submit", "--config", config, "--no-cache"))
    server.work(run_id)
    del server.spec(server.runs[run_id])["pipelineInfo"]["description"]
    told = trackrec("stage", "ingest", "--run-id", run_id, fails=True)
    assert "the pipeline quickstart holds no config of TrackRec's" in told


def test_the_config_travels_without_a_secret(server: KfpServer, trackrec: Run, config: str) -> None:
    trackrec("upload", "--config", config, "--set", "sample.n=3")
    [version] = server.versions.values()
    travelled = yaml.safe_load(ir.config_in(version.pipeline_spec["pipeline_spec"]))
    assert travelled["sample"]["n"] == 3 and travelled["raw_data"] == BUCKET["raw_data"]
    assert set(travelled["resources"]["distill_data"].get("secrets", [])) == set()


def test_a_namespace_is_used_where_there_are_several_users(server: KfpServer, trackrec: Run, config: str) -> None:
    server.multi_user = True
    run = server.runs[run_in(trackrec("submit", "--config", config, "--namespace", "mine"))]
    assert server.experiments[run.experiment_id].namespace == "mine"
    [pipeline] = server.pipelines.values()
    assert pipeline.namespace == "mine"
    told = trackrec("upload", "--config", config, "--namespace", "theirs", fails=True)
    assert "you are signed in, but may not do this" in told and "HTTP 403: User 'me' is not authorized" in told


def test_a_token_is_read_from_the_file_that_the_sdk_knows(
    server: KfpServer, trackrec: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = "s3cret"
    told = trackrec("status", fails=True)
    assert "you are not signed in: give a token file by KF_PIPELINES_SA_TOKEN_PATH" in told and "HTTP 401" in told
    (tmp_path / "token").write_text("s3cret")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    assert "state" in trackrec("status")


def test_what_passes_is_asked_again(server: KfpServer, trackrec: Run) -> None:
    server.faults = [503, HANG, PAGE]
    assert "state" in trackrec("status")
    assert server.faults == []


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([], "cannot read the run 7: it does not exist there; mind --host and --namespace (HTTP 404: ResourceNotFound"),
        ([400], "cannot read the run 7: it was refused (HTTP 400: not today)"),
        ([500], "cannot read the run 7: the server failed (HTTP 500: not today)"),
        ([503] * 4, "cannot read the run 7: the server is not ready; try again later (HTTP 503: not today)"),
        ([PAGE] * 4, "the server is not ready; try again later (HTTP 503: SERVICE UNAVAILABLE)"),
        ([HANG] * 4, "cannot read the run 7: no answer within 0.5 s"),
    ],
)
def test_each_error_is_one_line(
    server: KfpServer, trackrec: Run, tmp_path: Path, faults: list[int | str], message: str
) -> None:
    # Not for the first call, which asks whether there are several users.
    (tmp_path / "context.json").write_text('{"namespace": "mine"}')
    server.faults = faults
    told = trackrec("status", "7", fails=True)
    assert message in told and told.count("\n") == 1


def test_a_conflict_is_named(server: KfpServer, trackrec: Run, config: str) -> None:
    trackrec("upload", "--config", config)
    cluster = Cluster(None, None)
    run = api.V2beta1Run(display_name="mine", experiment_id=cluster.experiment("e"))
    server.faults = [409]
    with pytest.raises(client.ClusterError, match=r"start the run mine: it exists already \(HTTP 409: not today"):
        cluster.submit(run)


def test_a_run_is_never_started_twice(server: KfpServer) -> None:
    cluster = Cluster(None, None)
    run = api.V2beta1Run(display_name="mine", experiment_id=cluster.experiment("e"))
    for fault, message in ((503, "HTTP 503"), (HANG, "it may have been done all the same: look before")):
        server.calls.clear()
        server.faults = [fault]
        with pytest.raises(client.ClusterError, match=message):
            cluster.submit(run)
        assert server.calls == ["POST /apis/v2beta1/runs"]


def test_a_server_that_is_not_there_is_one_line(trackrec: Run, server: KfpServer) -> None:
    told = trackrec("status", "--host", "http://localhost:1", fails=True)
    assert "cannot be reached; give --host or set KF_PIPELINES_ENDPOINT" in told and told.count("\n") == 1
    assert "Connection refused" in told


def test_a_host_without_the_metadata_store_is_named(server: KfpServer, trackrec: Run, config: str) -> None:
    run_id = run_in(trackrec("submit", "--config", config))
    server.work(run_id)
    page = Response("<html></html>", content_type="text/html")
    server._metadata = lambda request, method: page  # type: ignore[method-assign]
    told = trackrec("artifacts", run_id, fails=True)
    assert "give the address of Kubeflow's pages (the service ml-pipeline-ui) as --host" in told
