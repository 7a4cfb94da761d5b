"""A Spark server for one stage: a SparkApplication of the Kubeflow Spark Operator, made, waited for, deleted.

Its driver answers Spark Connect, so the stage's pod stays what reads inputs and publishes outputs, whatever the engine.
This module lives in the pod of a task whose service account may handle SparkApplications.
"""

import contextlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from kubernetes.client import ApiException, CoreV1Api, CustomObjectsApi
from urllib3.exceptions import HTTPError

from components.incluster import TIMEOUT, Cluster, in_cluster, line, owners, sigterm_as_exit
from trackrec.data_config import DataSettings, SparkApplication, SparkSettings
from trackrec.quantity import to_bytes

GROUP, VERSION, PLURAL = "sparkoperator.k8s.io", "v1beta2", "sparkapplications"
PORT_KEY = "spark.connect.grpc.binding.port"
_DEFAULTS = {PORT_KEY: "15002"}
# What Spark's own server class does, which spark-submit refuses to run on Kubernetes. (The Connect plug-in would listen
# before there is a session to serve.)
_SCRIPT = """\
import time

from pyspark.sql import SparkSession

context = SparkSession.builder.getOrCreate().sparkContext
service = context._jvm.org.apache.spark.sql.connect.service.SparkConnectService
service.start(context._jsc.sc())
seen, since = "", time.monotonic()
while time.monotonic() - since < {idle}:
    time.sleep(min({idle}, 60))
    found = service.listActiveExecutions()  # those that run, else when the last one ran
    if found.isRight() or found.toString() != seen:
        seen, since = found.toString(), time.monotonic()
context._jvm.System.exit(0)  # Spark's own hooks end the executors; the server's threads would go on
"""
# A stage that was killed outright cannot delete its application: without a query for so long, in seconds, the driver
# ends by itself, and its executors with it. A stage is idle there while it reads a result.
_IDLE_SECONDS = 7200
# What the Pod Security Standard "restricted" asks for; Spark's images name their user themselves.
_RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_POLL_SECONDS = 2.0
_LAST_LINES = 30
_WHAT = "`data.spark.application` (elsewhere name a server as `data.spark.remote`)"


class SparkJobError(RuntimeError):
    """The SparkApplication could not be made, or did not start; the message says what to mend."""


def manifest(name: str, script: str, application: SparkApplication) -> dict[str, Any]:
    """The SparkApplication that runs `script` (a URI that its driver can read) as a Spark Connect server.

    It belongs to the task's pod, so it goes when the run is deleted.
    """
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "SparkApplication",
        "metadata": {"name": name, "ownerReferences": owners()},
        "spec": {
            "type": "Python",
            "mode": "cluster",
            "pythonVersion": "3",
            "image": application.image,
            "sparkVersion": application.version,
            "mainApplicationFile": script,
            "sparkConf": _DEFAULTS | application.conf,
            # A driver that died has lost its tables; Kubeflow tries the stage again.
            "restartPolicy": {"type": "Never"},
            "driver": {
                "cores": application.driver_cores,
                "memory": _java(application.driver_memory),
                "serviceAccount": application.service_account,
                "securityContext": _RESTRICTED,
            },
            "executor": {
                "instances": application.executors,
                "cores": application.executor_cores,
                "memory": _java(application.executor_memory),
                # It reads and writes the same bucket.
                "serviceAccount": application.service_account,
                "securityContext": _RESTRICTED,
            },
        },
    }


@contextlib.contextmanager
def served(data: DataSettings, cluster: Cluster | None = None) -> Iterator[DataSettings]:
    """`data` with a running server for its `spark.application`, which is deleted in the end, also on SIGTERM.

    Settings without one are given back as they are.

    Raises:
        SparkJobError, OutsideError: as one line, what to mend.
    """
    application, scratch = data.spark.application, data.spark.scratch
    if application is None or scratch is None:
        yield data
        return
    job = _Job(cluster or in_cluster(_WHAT), application, scratch.rstrip("/"))
    with sigterm_as_exit():
        try:
            url = job.start()
            spark = SparkSettings(remote=url, scratch=scratch)
            yield data.model_copy(update={"spark": spark})
        finally:
            job.delete()


class _Job:
    def __init__(self, cluster: Cluster, application: SparkApplication, scratch: str) -> None:
        self.application = application
        self.is_refused = False
        self.name = f"trackrec-{uuid.uuid4().hex[:12]}"
        self.namespace = cluster.namespace
        self.at = {"group": GROUP, "version": VERSION, "namespace": cluster.namespace, "plural": PLURAL}
        self.custom = CustomObjectsApi(cluster.api)
        self.core = CoreV1Api(cluster.api)
        uri = scratch if "://" in scratch else Path(scratch).resolve().as_uri()
        self.files, self.folder = pafs.FileSystem.from_uri(f"{uri}/{self.name}")
        # On a volume the driver has the script at the same path.
        self.script = f"{uri}/{self.name}/connect.py" if "://" in scratch else f"local://{self.folder}/connect.py"

    def start(self) -> str:
        """Makes the application; returns the address of its server once that answers."""
        self.files.create_dir(self.folder)
        with self.files.open_output_stream(f"{self.folder}/connect.py") as file:
            file.write(_SCRIPT.format(idle=_IDLE_SECONDS).encode())
        body = manifest(self.name, self.script, self.application)
        try:
            self.custom.create_namespaced_custom_object(**self.at, body=body, _request_timeout=TIMEOUT)
        except (ApiException, HTTPError) as error:
            self.is_refused = isinstance(error, ApiException)
            raise self._explained(error) from None
        print(f"SparkApplication {self.name}: made", flush=True)
        deadline = time.monotonic() + self.application.start_timeout_s
        state, pod = "", ""
        while time.monotonic() < deadline:
            status = self._status()
            now = status.get("applicationState", {})
            if now.get("state", "") != state:
                state = now.get("state", "")
                print(f"SparkApplication {self.name}: {state}", flush=True)
            pod = status.get("driverInfo", {}).get("podName", "")
            if state in ("FAILED", "SUBMISSION_FAILED", "COMPLETED", "FAILING", "SUCCEEDING"):
                self._print_last_lines(pod)
                why = now.get("errorMessage") or "its driver's last lines stand above"
                raise SparkJobError(f"SparkApplication {self.name} is {state} and serves nothing: {why}")
            if state == "RUNNING" and pod and (url := self._answering(pod)):
                threading.Thread(target=self._follow, args=(pod,), daemon=True).start()
                return url
            time.sleep(_POLL_SECONDS)
        self._print_last_lines(pod)
        raise SparkJobError(
            f"SparkApplication {self.name} is {state or 'not looked at by the operator'} and does not answer after "
            f"{self.application.start_timeout_s} s; is the Spark Operator installed for namespace {self.namespace}, "
            "and is there room for the driver? (`data.spark.application.start_timeout_s`)"
        )

    def delete(self) -> None:
        """Deletes the application, its pods and its folder; what is there no more is no fault."""
        try:
            if not self.is_refused:
                self.custom.delete_namespaced_custom_object(**self.at, name=self.name, _request_timeout=TIMEOUT)
        except (ApiException, HTTPError) as error:
            if not (isinstance(error, ApiException) and error.status == 404):
                print(f"SparkApplication {self.name} is not deleted: {line(error)}; `kubectl delete` it", flush=True)
        with contextlib.suppress(OSError):
            self.files.delete_dir(self.folder)

    def _status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self.custom.get_namespaced_custom_object(
                **self.at, name=self.name, _request_timeout=TIMEOUT
            )
        except (ApiException, HTTPError) as error:
            if isinstance(error, ApiException) and error.status in (401, 403, 404):
                raise self._explained(error) from None
            return {}  # the control plane is away for a moment
        status: dict[str, Any] = found.get("status") or {}
        return status

    def _answering(self, pod: str) -> str | None:
        """The server's address if something listens there."""
        try:
            ip = self.core.read_namespaced_pod(pod, self.namespace, _request_timeout=TIMEOUT).status.pod_ip
        except (ApiException, HTTPError) as error:
            if isinstance(error, ApiException) and error.status in (401, 403):
                raise self._explained(error) from None
            return None
        port = (_DEFAULTS | self.application.conf)[PORT_KEY]
        if not ip:
            return None
        with contextlib.suppress(OSError), socket.create_connection((ip, int(port)), timeout=_POLL_SECONDS):
            return f"sc://{f'[{ip}]' if ':' in ip else ip}:{port}"
        return None

    def _follow(self, pod: str) -> None:
        """Prints the driver's log as it is written."""
        with contextlib.suppress(ApiException, HTTPError, OSError):
            log = self.core.read_namespaced_pod_log(pod, self.namespace, follow=True, _preload_content=False)
            for text in log:
                print(f"[spark] {text.decode(errors='replace').rstrip()}", flush=True)

    def _print_last_lines(self, pod: str) -> None:
        if not pod:
            return
        with contextlib.suppress(ApiException, HTTPError):
            log = self.core.read_namespaced_pod_log(
                pod, self.namespace, tail_lines=_LAST_LINES, _request_timeout=TIMEOUT
            )
            for text in log.splitlines():
                print(f"[spark] {text}", flush=True)

    def _explained(self, error: ApiException | HTTPError) -> SparkJobError:
        status = error.status if isinstance(error, ApiException) else None
        if status == 404:
            return SparkJobError(
                f"namespace {self.namespace}: no SparkApplication {self.name}, or the cluster knows no {PLURAL}.{GROUP}"
                "; install the Kubeflow Spark Operator"
            )
        if status in (401, 403):
            return SparkJobError(
                f"the stage may not handle SparkApplications or their pods in namespace {self.namespace}: "
                f"{line(error)}; bind its service account to the Role `trackrec-spark`"
            )
        return SparkJobError(f"SparkApplication {self.name}: {line(error)}")


def _java(memory: str) -> str:
    """A Kubernetes quantity as Java's: whole mebibytes."""
    return f"{to_bytes(memory) >> 20}m"
