"""A command on several nodes, as a TrainJob of Kubeflow Trainer 2: made, watched to its end, deleted.

The nodes' pods come from the TrainingRuntime `trackrec` (`manifests/components/trainjob`), which says what becomes of a
pod that fails or is lost. This module lives in the pod of a task whose service account may handle TrainJobs.
"""

import time
from typing import Any

from kfp import dsl
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubernetes import watch
from kubernetes.client import ApiException, CoreV1Api, CustomObjectsApi
from urllib3.exceptions import HTTPError

from components.incluster import TIMEOUT, Cluster, Patience, UnreachableError, line, owners, refusal, sigterm_as_exit
from components.nodes import Nodes
from components.podlogs import PodLogs

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
RUNTIME = "trackrec"
# The names of the runtime's job and container.
NODE = "node"

# A watch's length: between two, the nodes' logs are read.
_WATCH_SECONDS = 5
# A deleted job's pods get half a minute to stop.
_GONE_SECONDS = 120.0


class TrainJobError(RuntimeError):
    """The TrainJob could not be made, failed, or was deleted by someone else."""


def manifest(name: str, command: list[str], nodes: Nodes, task: dsl.TaskConfig) -> dict[str, Any]:
    """The TrainJob that runs `command` on `nodes.count` pods with what Kubeflow would have given the task's own.

    It belongs to the task's pod, so it goes when the run is deleted.

    Raises:
        pydantic.ValidationError: `task` does not hold what the Kubernetes API takes.
    """
    volumes = [*(task.volumes or []), {"name": "scratch", "emptyDir": {"sizeLimit": nodes.scratch}}]
    mounts = [*(task.volume_mounts or []), {"name": "scratch", "mountPath": "/tmp"}]
    if nodes.shm:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": nodes.shm}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    pod = {
        "volumes": volumes,
        "containers": [{"name": NODE, "volumeMounts": mounts}],
        "nodeSelector": task.node_selector,
        "tolerations": task.tolerations,
        "affinity": task.affinity,
    }
    template = {"metadata": {"labels": nodes.labels}, "spec": pod}
    patch = {"template": {"spec": {"template": template}}, "name": NODE}
    job = TrainerV1alpha1TrainJob.from_dict(
        {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "TrainJob",
            "metadata": {"name": name, "ownerReferences": owners()},
            "spec": {
                "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": RUNTIME},
                "trainer": {
                    "image": nodes.image,
                    "command": command,
                    "numNodes": nodes.count,
                    "env": task.env,
                    "resourcesPerNode": task.resources,
                },
                "runtimePatches": [
                    {
                        "manager": "trackrec/stage",
                        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}},
                    }
                ],
            },
        }
    )
    assert job is not None
    body: dict[str, Any] = job.to_dict()
    return body


def run(cluster: Cluster, job: dict[str, Any]) -> None:
    """Makes the TrainJob, or takes up the one that a killed try of the same stage left, and waits for its end.

    The first node's log goes to stdout as it is written, of the others what a failed pod wrote last. The job is deleted
    in the end, whatever that is, also on SIGTERM; only if the API is away is it left.

    Raises:
        TrainJobError: as one line, what to mend.
        UnreachableError: the API is away.
    """
    _Run(cluster, job).run()


class _Run:
    def __init__(self, cluster: Cluster, job: dict[str, Any]) -> None:
        self.job = job
        self.name = job["metadata"]["name"]
        self.at = {"group": GROUP, "version": VERSION, "namespace": cluster.namespace, "plural": PLURAL}
        self.custom = CustomObjectsApi(cluster.api)
        self.logs = PodLogs(CoreV1Api(cluster.api), cluster.namespace, self.name, NODE)
        self.patience = Patience()

    def run(self) -> None:
        with sigterm_as_exit():
            try:
                self._make()
                failure = self._until_end()
                self.logs.read(failed=failure is not None)
            except UnreachableError:
                raise
            except BaseException:
                self._delete()
                raise
            self._delete()
        if failure is not None:
            raise TrainJobError(f"TrainJob {self.name} failed: {failure} (its nodes' last lines stand above)")

    def _make(self) -> None:
        for _ in range(3):
            try:
                self._create()
                print(f"TrainJob {self.name}: made", flush=True)
                return
            except ApiException as error:
                if error.status != 409:
                    raise self._explained(error, "make") from None
            # A try of this stage that was killed has left one, for the name tells what is computed.
            found = self._get()
            if found is None:
                continue
            if _end(found) in (None, "") and "deletionTimestamp" not in found["metadata"]:
                print(f"TrainJob {self.name}: taken up from an earlier try", flush=True)
                return
            self._delete()
        raise TrainJobError(f"TrainJob {self.name} cannot be made: an older one of that name does not go away")

    def _create(self) -> None:
        self.patience.call(
            lambda: self.custom.create_namespaced_custom_object(**self.at, body=self.job, _request_timeout=TIMEOUT)
        )

    def _get(self) -> dict[str, Any] | None:
        """The job as it is; None where there is none."""
        try:
            found: dict[str, Any] = self.patience.call(
                lambda: self.custom.get_namespaced_custom_object(**self.at, name=self.name, _request_timeout=TIMEOUT)
            )
            return found
        except ApiException as error:
            if error.status == 404:
                return None
            raise self._explained(error, "read") from None

    def _until_end(self) -> str | None:
        """Waits; returns None where the job completed, and why it failed where it did."""
        gone = TrainJobError(f"TrainJob {self.name} was deleted by someone else; the stage's next try makes it anew")
        while True:
            found = self._get()
            if found is None:
                raise gone
            if (end := _end(found)) is not None:
                return end or None
            self.logs.read()
            try:
                for event in watch.Watch().stream(
                    self.custom.list_namespaced_custom_object,
                    **self.at,
                    field_selector=f"metadata.name={self.name}",
                    resource_version=found["metadata"]["resourceVersion"],
                    timeout_seconds=_WATCH_SECONDS,
                    _request_timeout=TIMEOUT,
                ):
                    if event["type"] == "DELETED":
                        raise gone
                    if _end(event["object"]) is not None:
                        break
            except (ApiException, HTTPError) as error:
                # 410: the watch began too far back; the next turn reads the job anew.
                if not (isinstance(error, ApiException) and error.status == 410):
                    try:
                        self.patience.bear(error)
                    except ApiException as refused:
                        raise self._explained(refused, "watch") from None

    def _delete(self) -> None:
        """Deletes the job and waits until it is gone, so that another of its name can be made."""
        try:
            self.custom.delete_namespaced_custom_object(
                **self.at, name=self.name, propagation_policy="Foreground", _request_timeout=TIMEOUT
            )
            deadline = time.monotonic() + _GONE_SECONDS
            while time.monotonic() < deadline:
                self.custom.get_namespaced_custom_object(**self.at, name=self.name, _request_timeout=TIMEOUT)
                time.sleep(1)
        except (ApiException, HTTPError) as error:
            if not (isinstance(error, ApiException) and error.status == 404):
                print(f"TrainJob {self.name} is not deleted: {line(error)}; `kubectl delete` it", flush=True)

    def _explained(self, error: ApiException, verb: str) -> TrainJobError:
        where = f"in namespace {self.at['namespace']}"
        absent = (
            f"cannot {verb} a TrainJob {where}: the cluster knows no {PLURAL}.{GROUP}; install Kubeflow Trainer 2.2 or "
            "newer"
        )
        what = f"TrainJob {self.name} {where}"
        return TrainJobError(refusal(error, verb, what, absent=absent, role="trackrec-trainjob"))


def _end(job: dict[str, Any]) -> str | None:
    """None while the job runs, "" where it completed, why it failed where it did."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["status"] == "True" and condition["type"] in ("Complete", "Failed"):
            is_failed = condition["type"] == "Failed"
            return (condition.get("message") or condition.get("reason") or "no reason given") if is_failed else ""
    return None
