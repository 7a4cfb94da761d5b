"""The commands that talk to Kubeflow Pipelines, against a server in memory; see `kfp_server`."""

import datetime
from pathlib import Path
from typing import Any

import kfp_server_api as api
import pytest
import yaml
from werkzeug import Request

from pipelines import client, ir
from pipelines.client import Cluster
from tests.pipelines.cluster.conftest import Run, run_in
from tests.pipelines.cluster.models import Refused
from tests.pipelines.cluster.server import HANG, PAGE, SIGN_IN, KfpServer


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


def test_an_experiment_made_at_the_same_moment_by_another_counts_as_ours(server: KfpServer) -> None:
    cluster = Cluster(None, None)
    listed = server._list_experiments
    theirs = cluster.experiment("nightly")

    def none_yet(request: Request) -> Any:
        server._list_experiments = listed  # type: ignore[method-assign]
        return api.V2beta1ListExperimentsResponse()

    server._list_experiments = none_yet  # type: ignore[method-assign]
    assert cluster.experiment("nightly") == theirs
    assert "POST /apis/v2beta1/experiments" in server.calls[-2:]


def test_a_run_is_of_the_uploaded_version_with_its_parameters(server: KfpServer, trackrec: Run, config: str) -> None:
    run = server.runs[
        run_in(
            trackrec("submit", "--config", config, "--param", "raw_data=gs://bucket/new.zip", "--experiment", "nightly")
        )
    ]
    assert run.pipeline_version_reference.pipeline_version_id in server.versions
    assert run.runtime_config.parameters == {"raw_data": "gs://bucket/new.zip"}
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
    assert cached["root"]["dag"]["tasks"]["sample"]["cachingOptions"]["enableCache"]
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
        (("--set", "registry=YOUR-REGISTRY/trackrec"), "registry: YOUR-REGISTRY/trackrec is to be filled in"),
        (("--set", "encoder=gs://YOUR-BUCKET/bert"), "encoder: gs://YOUR-BUCKET/bert is to be filled in"),
        (("--param", "raw_data=gs://YOUR-BUCKET/raw"), "raw_data: gs://YOUR-BUCKET/raw is to be filled in"),
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

    def refused(request: Request) -> Any:
        raise Refused(503, "not today")

    server._create_schedule = refused  # type: ignore[method-assign]
    assert "cannot make the schedule 'nightly'" in trackrec(*nightly, "0 0 5 * * *", fails=True)
    [kept] = server.schedules.values()
    assert (kept.trigger.cron_schedule.cron, kept.status) == ("0 0 4 * * *", "ENABLED")


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


def test_what_passes_is_asked_again(server: KfpServer, impatient: None, trackrec: Run) -> None:
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
        ([HANG] * 4, "cannot read the run 7: no answer within 1 s"),
        ([302], "cannot read the run 7: you are not signed in: give a token file by KF_PIPELINES_SA_TOKEN_PATH"),
        ([SIGN_IN], "cannot read the run 7: a web page came in place of an answer; mend --host, or you are not signed"),
    ],
)
def test_each_error_is_one_line(
    server: KfpServer, impatient: None, trackrec: Run, tmp_path: Path, faults: list[int | str], message: str
) -> None:
    # Not for the first call, which asks whether there are several users.
    (tmp_path / "context.json").write_text('{"namespace": "mine"}')
    server.faults = faults
    told = trackrec("status", "7", fails=True)
    assert message in told and told.count("\n") == 1


def test_a_page_is_no_answer(server: KfpServer, trackrec: Run, tmp_path: Path) -> None:
    """Where nothing is read of the answer, too; and at the first call, which asks for the server's health."""
    server.faults = [SIGN_IN]
    assert "cannot connect to http" in (told := trackrec("cancel", "7", fails=True)) and "a web page came" in told
    (tmp_path / "context.json").write_text('{"namespace": "mine"}')
    server.faults = [SIGN_IN]
    assert "cannot cancel the run 7: a web page came" in trackrec("cancel", "7", fails=True)


def test_a_conflict_is_named(server: KfpServer, trackrec: Run, config: str) -> None:
    trackrec("upload", "--config", config)
    cluster = Cluster(None, None)
    run = api.V2beta1Run(display_name="mine", experiment_id=cluster.experiment("e"))
    server.faults = [409]
    with pytest.raises(client.ClusterError, match=r"start the run mine: it exists already \(HTTP 409: not today"):
        cluster.submit(run)


def test_a_run_is_never_started_twice(server: KfpServer, impatient: None) -> None:
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


def test_each_run_of_a_schedule_works_for_its_own_day(server: KfpServer, trackrec: Run, config: str) -> None:
    job = ("schedule", "features", "--config", config, "--cron", "0 0 3 * * *", "--pipeline", "batch_features")
    place = ("--param", "out=gs://bucket/features", "--param", "triton=trackrec-triton:8001")
    assert "features: new" in trackrec(*job, *place)
    [made] = server.schedules.values()
    # Kubeflow fills it in when it starts a run; one that still runs keeps the next one from starting.
    assert made.runtime_config.parameters == {
        "out": "gs://bucket/features",
        "triton": "trackrec-triton:8001",
        "dt": "[[ScheduledTime.2006-01-02]]",
    }
    assert made.max_concurrency == "1"
    assert "features: unchanged" in trackrec(*job, *place)
    assert "features: replaced" in trackrec(*job, *place, "--param", "dt=2026-11-28")
    [fixed] = server.schedules.values()
    assert fixed.runtime_config.parameters["dt"] == "2026-11-28"
    # A run that is started by hand works for the day on which it is, or for the one that is named.
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    trackrec("submit", *job[2:4], "--pipeline", "batch_features", *place)
    trackrec("submit", *job[2:4], "--pipeline", "batch_features", *place, "--param", "dt=2026-11-28")
    trackrec("submit", *job[2:4], "--pipeline", "batch_features", "--set", "active_users.as_of=2026-11-27")
    days = [run.runtime_config.parameters.get("dt") for run in server.runs.values()]
    assert days == [today, "2026-11-28", None]
