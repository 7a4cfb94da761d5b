"""A stage on a SparkApplication's server, with a Kubernetes API that runs the driver here."""

import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyspark
import pytest
from kubernetes.client import ApiClient, Configuration
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from components import sparkjob
from components.incluster import Cluster, OutsideError
from components.sparkjob import SparkJobError, served
from tests.data.ingesting import run
from tests.data.raw_files import same_rows, write_ml_1m
from trackrec.data_config import DataSettings

APPLICATIONS = "/apis/sparkoperator.k8s.io/v1beta2/namespaces/team/sparkapplications"
PODS = "/api/v1/namespaces/team/pods"


class Operator:
    """The Kubernetes API's paths for one SparkApplication, and the operator behind it.

    Args:
        states: what the application is at each look; the last stays.
        drives: whether to run the driver, as the manifest says, in this machine's Spark.
    """

    def __init__(self, server: HTTPServer, folder: Path, states: list[dict[str, str]], drives: bool = False) -> None:
        self.states, self.drives, self.folder = states, drives, folder
        self.body: dict[str, Any] | None = None
        self.driver: subprocess.Popen[bytes] | None = None
        self.deleted: list[str] = []
        self.log = b"first line\nlast line\n"
        server.expect_request(APPLICATIONS, method="POST").respond_with_handler(self._create)
        one = re.compile(f"^{APPLICATIONS}/trackrec-[0-9a-f]{{12}}$")
        server.expect_request(one, method="GET").respond_with_handler(self._get)
        server.expect_request(one, method="DELETE").respond_with_handler(self._delete)
        pod = {"metadata": {"name": "the-driver"}, "status": {"podIP": "127.0.0.1"}}
        server.expect_request(f"{PODS}/the-driver", method="GET").respond_with_json(pod)
        server.expect_request(f"{PODS}/the-driver/log").respond_with_handler(lambda _: Response(self.log))
        self.cluster = Cluster(ApiClient(Configuration(host=server.url_for("").rstrip("/"))), "team")

    def _create(self, request: Request) -> Response:
        self.body = request.get_json()
        if self.drives:
            self.driver = drive(self.body["spec"], self.folder)
        return Response(json.dumps(self.body), 201, content_type="application/json")

    def _get(self, _: Request) -> Response:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        status = {"applicationState": state, "driverInfo": {"podName": "the-driver"}}
        return Response(json.dumps({**(self.body or {}), "status": status}), content_type="application/json")

    def _delete(self, request: Request) -> Response:
        self.deleted.append(request.path.rpartition("/")[2])
        if self.driver:
            os.killpg(self.driver.pid, signal.SIGKILL)
            self.driver.wait()
        return Response(json.dumps({"kind": "Status", "status": "Success"}), content_type="application/json")


def drive(spec: dict[str, Any], folder: Path) -> "subprocess.Popen[bytes]":
    """What the operator does with an application, with this machine for a cluster."""
    home = Path(pyspark.__file__).parent
    conf = spec["sparkConf"] | {"spark.driver.host": "127.0.0.1", "spark.ui.enabled": "false"}
    command = [str(home / "bin" / "spark-submit"), "--master", "local[1]", "--driver-memory", spec["driver"]["memory"]]
    command += [part for key, value in conf.items() for part in ("--conf", f"{key}={value}")]
    with (folder / "driver.log").open("wb") as log:
        script = spec["mainApplicationFile"].removeprefix("local://")
        environment = os.environ | {"SPARK_HOME": str(home)}
        return subprocess.Popen(
            [*command, script], cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def listener() -> Iterator[str]:
    """The port of a driver that answers, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparkjob, "_POLL_SECONDS", 0.1)
    monkeypatch.delenv("KFP_POD_UID", raising=False)


def settings(tmp_path: Path, port: str, **application: Any) -> DataSettings:
    given = {"conf": {sparkjob.PORT_KEY: port}, **application}
    spark = {"application": given, "scratch": str(tmp_path / "shared")}
    return DataSettings.model_validate({"engine": "spark", "spark": spark})


RUNNING = {"state": "RUNNING"}


@pytest.mark.skipif("not __import__('shutil').which('java')", reason="Spark needs Java 17 or later")
def test_a_stage_runs_on_the_application_and_leaves_nothing_of_it(tmp_path: Path, httpserver: HTTPServer) -> None:
    operator = Operator(httpserver, tmp_path, [{"state": ""}, {"state": "SUBMITTED"}, RUNNING], drives=True)
    raw = write_ml_1m(tmp_path / "raw")
    given = settings(tmp_path, free_port(), driver_memory="1Gi", start_timeout_s=400)
    with served(given, operator.cluster) as data:
        assert data.spark.application is None and data.spark.remote
        there = run(tmp_path / "there", raw, data=data)
    here = run(tmp_path / "here", raw)
    assert same_rows(here, there, "interactions") and same_rows(here, there, "items")
    assert operator.body and operator.deleted == [operator.body["metadata"]["name"]]
    assert list((tmp_path / "shared").iterdir()) == []


@pytest.mark.skipif("not __import__('shutil').which('java')", reason="Spark needs Java 17 or later")
def test_the_driver_of_a_stage_that_is_no_more_ends_by_itself(
    tmp_path: Path, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparkjob, "_IDLE_SECONDS", 2)
    operator = Operator(httpserver, tmp_path, [RUNNING], drives=True)
    with served(settings(tmp_path, free_port(), driver_memory="1Gi", start_timeout_s=400), operator.cluster):
        assert operator.driver and operator.driver.wait(120) == 0
        operator.driver = None  # there is nothing to kill


def test_the_manifest_says_what_the_settings_say(
    tmp_path: Path, httpserver: HTTPServer, listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "run-1-ingest")
    monkeypatch.setenv("KFP_POD_UID", "0-1")
    operator = Operator(httpserver, tmp_path, [RUNNING])
    more = {"image": "spark:own", "version": "4.0.1", "service_account": "driver", "executors": 3, "executor_cores": 5}
    given = settings(tmp_path, listener, **more, executor_memory="7Gi", driver_memory="3Gi", driver_cores=1)
    with served(given, operator.cluster) as data:
        assert data == DataSettings.model_validate(
            {"engine": "spark", "spark": {"remote": f"sc://127.0.0.1:{listener}", "scratch": str(tmp_path / "shared")}}
        )
        assert operator.body is not None
        script = Path(operator.body["spec"]["mainApplicationFile"].removeprefix("local://"))
        assert script.is_relative_to(tmp_path / "shared") and "SparkSession" in script.read_text()
    assert operator.body["metadata"]["ownerReferences"] == [
        {"apiVersion": "v1", "kind": "Pod", "name": "run-1-ingest", "uid": "0-1"}
    ]
    spec = operator.body["spec"]
    assert spec["driver"].pop("securityContext") == spec["executor"].pop("securityContext")
    assert spec["driver"] == {"cores": 1, "memory": "3072m", "serviceAccount": "driver"}
    assert spec["executor"] == {"instances": 3, "cores": 5, "memory": "7168m", "serviceAccount": "driver"}
    assert (spec["image"], spec["sparkVersion"], spec["mode"]) == ("spark:own", "4.0.1", "cluster")
    assert spec["sparkConf"] == {sparkjob.PORT_KEY: listener}


def test_the_drivers_log_is_the_stages(
    tmp_path: Path, httpserver: HTTPServer, listener: str, capfd: pytest.CaptureFixture[str]
) -> None:
    operator = Operator(httpserver, tmp_path, [{"state": "SUBMITTED"}, RUNNING])
    with served(settings(tmp_path, listener), operator.cluster):
        for thread in threading.enumerate():
            if thread.name.endswith("(_follow)"):
                thread.join(10)
    shown = capfd.readouterr().out
    assert "[spark] first line\n[spark] last line\n" in shown
    assert ": made\n" in shown and ": SUBMITTED\n" in shown and ": RUNNING\n" in shown


def test_an_application_that_fails_is_told_with_its_log_and_deleted(
    tmp_path: Path, httpserver: HTTPServer, capfd: pytest.CaptureFixture[str]
) -> None:
    failed = {"state": "FAILED", "errorMessage": "driver container failed"}
    operator = Operator(httpserver, tmp_path, [{"state": "SUBMITTED"}, failed])
    match = r"^SparkApplication trackrec-\w+ is FAILED and serves nothing: driver container failed$"
    with pytest.raises(SparkJobError, match=match), served(settings(tmp_path, "9"), operator.cluster):
        raise AssertionError("it served")
    assert "[spark] last line" in capfd.readouterr().out
    assert len(operator.deleted) == 1 and list((tmp_path / "shared").iterdir()) == []


def test_an_application_that_nobody_looks_at_is_given_up(tmp_path: Path, httpserver: HTTPServer) -> None:
    operator = Operator(httpserver, tmp_path, [{}])
    given = settings(tmp_path, "9", start_timeout_s=1)
    match = r"not looked at by the operator and does not answer after 1 s; is the Spark Operator installed"
    with pytest.raises(SparkJobError, match=match), served(given, operator.cluster):
        raise AssertionError("it served")
    assert len(operator.deleted) == 1


@pytest.mark.parametrize(
    ("status", "match"),
    [
        (403, r"may not handle SparkApplications .* in namespace team: 403 FORBIDDEN; bind its service account"),
        (404, r"the cluster knows no sparkapplications\.sparkoperator\.k8s\.io; install the Kubeflow Spark Operator"),
        (422, r"^SparkApplication trackrec-\w+: 422 UNPROCESSABLE ENTITY$"),
    ],
)
def test_a_refusal_is_one_clear_line(tmp_path: Path, httpserver: HTTPServer, status: int, match: str) -> None:
    httpserver.expect_request(APPLICATIONS, method="POST").respond_with_data("{}", status=status)
    cluster = Cluster(ApiClient(Configuration(host=httpserver.url_for("").rstrip("/"))), "team")
    with pytest.raises(SparkJobError, match=match), served(settings(tmp_path, "9"), cluster):
        raise AssertionError("it served")
    assert [request.method for request, _ in httpserver.log] == ["POST"]


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_stage_that_fails_or_is_cancelled_deletes_it(
    tmp_path: Path, httpserver: HTTPServer, listener: str, cancelled: bool
) -> None:
    operator = Operator(httpserver, tmp_path, [RUNNING])
    with (
        pytest.raises(SystemExit if cancelled else ZeroDivisionError),
        served(settings(tmp_path, listener), operator.cluster),
    ):
        if cancelled:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        raise ZeroDivisionError
    assert len(operator.deleted) == 1


def test_outside_a_cluster_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    match = r"`data\.spark\.application` \(elsewhere name a server as `data\.spark\.remote`\) needs a pod"
    with pytest.raises(OutsideError, match=match), served(settings(tmp_path, "9")):
        raise AssertionError("it served")


def test_settings_without_an_application_stay_as_they_are() -> None:
    given = DataSettings(engine="spark")
    with served(given) as data:
        assert data is given
