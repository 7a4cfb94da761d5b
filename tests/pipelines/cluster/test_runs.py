"""What can be read of a run on a cluster, and done with it; against a server in memory."""

import re
import threading
import time

import kfp_server_api as api
import pytest
import yaml
from werkzeug import Request, Response

from pipelines import ir, pods
from pipelines.client import Cluster
from tests.pipelines.cluster.conftest import BUCKET, Run, run_in
from tests.pipelines.cluster.server import KfpServer


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
    assert "ingest at work ✔" in everything and "sample 1 at work ✔" in everything
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


def test_kubernetes_that_gives_no_answer_is_given_up(
    server: KfpServer, trackrec: Run, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = run_in(trackrec("submit", "--config", config))
    server.work(run_id)
    monkeypatch.setattr(pods, "_TIMEOUT", tuple(seconds / 30 for seconds in pods._TIMEOUT))
    listed = server._list_pods

    def slow(request: Request, namespace: str) -> Response:
        time.sleep(server.hang)
        return listed(request, namespace)

    server._list_pods = slow  # type: ignore[method-assign]
    told = trackrec("logs", run_id, fails=True)
    assert "Kubernetes cannot be reached" in told and told.count("\n") == 1


def test_a_cancelled_run_is_terminated(server: KfpServer, trackrec: Run, config: str) -> None:
    run_id = run_in(trackrec("submit", "--config", config))
    assert f"cancelled {run_id}" in trackrec("cancel", run_id)
    assert server.runs[run_id].state == "CANCELED"
    # Again, as after an answer that was lost.
    assert f"cancelled {run_id}" in trackrec("cancel", run_id)
    ended = run_in(trackrec("submit", "--config", config))
    server.work(ended)
    assert f"cannot cancel the run {ended}: it is SUCCEEDED already" in trackrec("cancel", ended, fails=True)


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
        executor = spec["components"][task["componentRef"]["name"]].get("executorLabel")
        if importer := spec["deploymentSpec"]["executors"].get(executor, {}).get("importer"):
            title = task["taskInfo"]["name"].removeprefix("input ")
            importers[title] = importer["artifactUri"]["constant"]
            assert importer["metadata"] == {"version": "7"}
    return importers


def test_one_stage_of_a_clusters_run_again_on_its_artifacts(server: KfpServer, trackrec: Run, config: str) -> None:
    whole = run_in(trackrec("submit", "--config", config, "--set", "sample.max_tokens=11", "--experiment", "nightly"))
    server.work(whole, until="sdpo 1", cached=("contexts",))
    run = server.runs[run_in(trackrec("stage", "sample 1", "--run-id", whole, "--set", "sample.n=3"))]
    assert inputs_of(run) == {
        "base_model": "gs://bucket/smollm2",
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


def test_the_preflight_again_has_the_secrets_and_takes_any_setting(
    server: KfpServer, trackrec: Run, config: str
) -> None:
    """A run that ended there is looked at again without a run, once what was wrong is mended."""
    secret = "resources.encode.secrets=[{secret: store, key: token, env: STORE_TOKEN}]"
    whole = run_in(trackrec("submit", "--config", config, "--set", secret))
    server.work(whole, until="preflight")
    run = server.runs[run_in(trackrec("stage", "preflight", "--run-id", whole, "--set", "train_ctr.vector_width=384"))]
    [task] = run.pipeline_spec["pipeline_spec"]["root"]["dag"]["tasks"].values()
    given = {name: value["runtimeValue"]["constant"] for name, value in task["inputs"]["parameters"].items()}
    assert given["config"]["train_ctr"]["vector_width"] == 384
    assert {name: given[name] for name in BUCKET} == BUCKET
    [pod] = run.pipeline_spec["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    [secret_as_env] = pod["secretAsEnv"]
    assert (secret_as_env["secretName"], secret_as_env["optional"]) == ("store", True)
    told = trackrec("stage", "preflight", "--run-id", whole, "--set", "base_model=gs://b/other", fails=True)
    assert "base_model: not a setting of preflight" in told


def test_a_stage_of_several_shards_again(server: KfpServer, trackrec: Run, config: str) -> None:
    whole = run_in(trackrec("submit", "--config", config, "--set", "resources.sample.shards=2"))
    server.work(whole)
    assert re.search(rf"sample 1 +recots +gs://bucket/v2/{whole}/gather\S*/joined", trackrec("artifacts", whole))
    run = server.runs[run_in(trackrec("stage", "sample 1", "--run-id", whole, "--set", "sample.n=3"))]
    assert inputs_of(run)["contexts"] == f"gs://bucket/v2/{whole}/contexts/contexts"
    tasks = run.pipeline_spec["pipeline_spec"]["root"]["dag"]["tasks"]
    assert {name.rstrip("-0123456789") for name in tasks} == {"importer", "for-loop", "gather"}
    following = server.runs[run_in(trackrec("stage", "score 1", "--run-id", whole))]
    assert inputs_of(following)["recots"].endswith("/joined")


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


def test_a_host_without_the_metadata_store_is_named(server: KfpServer, trackrec: Run, config: str) -> None:
    run_id = run_in(trackrec("submit", "--config", config))
    server.work(run_id)
    page = Response("<html></html>", content_type="text/html")
    server._metadata = lambda request, method: page  # type: ignore[method-assign]
    told = trackrec("artifacts", run_id, fails=True)
    assert "give the address of Kubeflow's pages (the service ml-pipeline-ui) as --host" in told
