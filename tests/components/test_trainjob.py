"""TrainJobs against a server that speaks the Kubernetes API's paths for the calls used."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import kubernetes_validate
import pytest
import yaml
from kfp import dsl
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime
from kubernetes.client import ApiClient, Configuration

from components import incluster, nodes, trainjob
from components.images import ROOT
from tests.components.kubernetes_api import NAMESPACE, KubernetesApi
from trackrec.align.launching import launch
from trackrec.stages.node import LOST, OnNodes

NAME = "sdpo-0123456789abcdef"
ASKED = nodes.Nodes(
    count=2, image="registry/train:sdpo-1", scratch="200Gi", shm="64Gi", labels={"trackrec/stage": "sdpo"}
)
# As Kubeflow's driver writes it (its Go structs as JSON).
HANDED = dsl.TaskConfig(
    affinity=None,
    tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists"}],
    node_selector={"cloud.google.com/gke-accelerator": "nvidia-a100-80gb"},
    env=[
        {"name": nodes.ENV, "value": ASKED.model_dump_json()},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "secret", "key": "key"}}},
    ],
    volumes=[{"name": "trackrec-work", "persistentVolumeClaim": {"claimName": "trackrec-work"}}],
    volume_mounts=[{"name": "trackrec-work", "mountPath": "/tmp/trackrec-work"}],
    resources={
        "limits": {"cpu": "32", "memory": "400Gi", "nvidia.com/gpu": "8"},
        "requests": {"cpu": "32", "memory": "400Gi"},
    },
)
COMMAND = ["python3", "-m", "trackrec.stages.node", "/tmp/trackrec-work/sdpo-0/nodes/call.json"]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    monkeypatch.setattr(trainjob, "_WATCH_SECONDS", 1)
    monkeypatch.setattr(incluster, "PAUSE_SECONDS", 0.05)
    served = KubernetesApi()
    yield served
    served.server.shutdown()
    served.server.server_close()


def run(api: KubernetesApi) -> None:
    client = ApiClient(Configuration(host=api.url))
    trainjob.run(incluster.Cluster(client, NAMESPACE), trainjob.manifest(NAME, COMMAND, ASKED, HANDED))


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def started(api: KubernetesApi) -> None:
    for index in (0, 1):
        api.put_pod(f"pod-{index}", NAME, index, "Running")
        api.log(f"pod-{index}", f"step 1 on {index}")


def test_the_job_asks_for_all_that_the_tasks_pod_was_to_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "run-x-1")
    monkeypatch.setenv("KFP_POD_UID", "7")
    job = trainjob.manifest(NAME, COMMAND, ASKED, HANDED)
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "run-x-1", "uid": "7"}
    assert job["metadata"] == {"name": NAME, "ownerReferences": [owner]}
    assert job["spec"]["runtimeRef"]["kind"] == "TrainingRuntime"
    assert job["spec"]["trainer"] == {
        "image": "registry/train:sdpo-1",
        "command": COMMAND,
        "numNodes": 2,
        "env": HANDED.env,
        "resourcesPerNode": HANDED.resources,
    }
    [patch] = job["spec"]["runtimePatches"]
    [replicated] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    template = replicated["template"]["spec"]["template"]
    assert template["metadata"]["labels"] == {"trackrec/stage": "sdpo"}
    pod = template["spec"]
    assert pod["nodeSelector"] == HANDED.node_selector
    assert pod["tolerations"] == HANDED.tolerations
    assert {volume["name"]: volume for volume in pod["volumes"]} == {
        "trackrec-work": HANDED.volumes[0],  # type: ignore[index]
        "scratch": {"name": "scratch", "emptyDir": {"sizeLimit": "200Gi"}},
        "shm": {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}},
    }
    [container] = pod["containers"]
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == {
        "trackrec-work": "/tmp/trackrec-work",
        "scratch": "/tmp",
        "shm": "/dev/shm",
    }


def test_a_job_is_made_watched_to_its_end_and_deleted(api: KubernetesApi, capfd: pytest.CaptureFixture[str]) -> None:
    def play() -> None:
        api.put_pod(
            "pod-0",
            NAME,
            0,
            "Pending",
            conditions=[{"type": "PodScheduled", "status": "False", "message": "0/5 nodes have a free GPU"}],
        )
        until(lambda: api.watches > 1)
        started(api)
        until(lambda: api.watches > 3)
        api.log("pod-0", "step 2 on 0")
        api.end_job(NAME, "Complete")

    api.plays.append(play)
    run(api)
    [made] = api.made
    assert made == trainjob.manifest(NAME, COMMAND, ASKED, HANDED)
    assert api.deleted == [NAME] and not api.jobs
    lines = capfd.readouterr().out.splitlines()
    # The first node's lines once each, however often its log was read; none of the other's.
    assert [line for line in lines if line.startswith("step")] == ["step 1 on 0", "step 2 on 0"]
    assert "node 0 waits: 0/5 nodes have a free GPU" in lines


def test_a_failure_shows_the_last_lines_of_all_nodes(api: KubernetesApi, capfd: pytest.CaptureFixture[str]) -> None:
    def play() -> None:
        started(api)
        api.log("pod-1", "OutOfMemoryError: CUDA")
        ended = {"name": "node", "ready": False, "restartCount": 0, "image": "i", "imageID": "i"}
        ended["state"] = {"terminated": {"exitCode": 1}}
        api.put_pod("pod-1", NAME, 1, "Failed", containerStatuses=[ended])
        api.end_job(NAME, "Failed", "jobset failed due to one or more job failures")

    api.plays.append(play)
    with pytest.raises(trainjob.TrainJobError, match=f"TrainJob {NAME} failed: jobset failed due to") as caught:
        run(api)
    assert "\n" not in str(caught.value)
    printed = capfd.readouterr().out
    assert "node 1 (pod-1) failed with status 1\n[node 1] step 1 on 1\n[node 1] OutOfMemoryError: CUDA" in printed
    assert "step 1 on 0" in printed
    assert api.deleted == [NAME]


def test_a_lost_nodes_successor_is_followed(api: KubernetesApi, capfd: pytest.CaptureFixture[str]) -> None:
    def play() -> None:
        started(api)
        until(lambda: api.watches > 1)
        api.put_pod("pod-0", NAME, 0, "Failed", reason="NodeLost")
        until(lambda: api.watches > 3)
        del api.pods["pod-0"]
        api.put_pod("pod-0b", NAME, 0, "Running")
        api.log("pod-0b", "resumes from step 1")
        until(lambda: api.watches > 5)
        api.end_job(NAME, "Complete")

    api.plays.append(play)
    run(api)
    lines = [line for line in capfd.readouterr().out.splitlines() if "TrainJob" not in line]
    assert lines == ["step 1 on 0", "node 0 (pod-0) failed: NodeLost", "resumes from step 1"]
    assert len(api.made) == 1


def test_cancelling_the_task_deletes_the_job(api: KubernetesApi) -> None:
    def play() -> None:
        started(api)
        until(lambda: api.watches > 0)
        os.kill(os.getpid(), signal.SIGTERM)

    api.plays.append(play)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run(api)
    assert caught.value.code == 128 + signal.SIGTERM
    assert api.deleted == [NAME] and not api.jobs
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            (403, "trainjobs is forbidden"),
            f"may not make TrainJob {NAME} in namespace ns: trainjobs is forbidden; run as",
        ),
        ((404, "the server could not find"), "the cluster knows no trainjobs.trainer.kubeflow.org; install Kubeflow"),
        (
            (422, "runtime trackrec not found"),
            f"cannot make TrainJob {NAME} in namespace ns: runtime trackrec not",
        ),
    ],
)
def test_what_the_cluster_refuses_is_one_line(api: KubernetesApi, fault: tuple[int, str], message: str) -> None:
    api.faults["POST job"].append(fault)
    with pytest.raises(trainjob.TrainJobError, match=message) as caught:
        run(api)
    assert "\n" not in str(caught.value)
    assert not api.made


def test_a_job_left_by_a_killed_try_is_taken_up(api: KubernetesApi, capfd: pytest.CaptureFixture[str]) -> None:
    api.put_job(trainjob.manifest(NAME, COMMAND, ASKED, HANDED))
    started(api)
    timer = threading.Timer(0.5, api.end_job, (NAME, "Complete"))
    timer.start()
    run(api)
    assert not api.made and api.deleted == [NAME]
    assert "taken up from an earlier try\nstep 1 on 0" in capfd.readouterr().out


def test_a_failed_job_left_by_a_killed_try_is_made_anew(api: KubernetesApi) -> None:
    api.put_job(trainjob.manifest(NAME, COMMAND, ASKED, HANDED))
    api.end_job(NAME, "Failed", "long ago")
    api.plays.append(lambda: api.end_job(NAME, "Complete"))
    run(api)
    assert len(api.made) == 1 and api.deleted == [NAME, NAME]


def test_an_expired_watch_and_an_api_that_is_away_for_a_while_cost_nothing(api: KubernetesApi) -> None:
    api.faults["WATCH job"] += [(410, "too old resource version"), (500, "etcd")]
    api.faults["POST job"].append((503, "being upgraded"))
    api.faults["GET job"].append((429, "too many requests"))

    def play() -> None:
        until(lambda: api.watches > 3)
        api.faults["GET job"] += [(503, "being upgraded")] * 3
        api.end_job(NAME, "Complete")

    api.plays.append(play)
    run(api)
    assert len(api.made) == 1 and api.deleted == [NAME]
    assert not any(api.faults.values())


def test_an_api_that_stays_away_leaves_the_job_to_the_next_try(
    api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incluster, "PATIENCE_SECONDS", 1.5)

    def play() -> None:
        until(lambda: api.watches > 0)
        api.faults["GET job"] += [(503, "gone for good")] * 1000

    api.plays.append(play)
    with pytest.raises(incluster.UnreachableError, match="has not answered for long: gone for good"):
        run(api)
    assert NAME in api.jobs and not api.deleted


def test_a_job_that_someone_else_deletes_ends_the_stage(api: KubernetesApi) -> None:
    def play() -> None:
        until(lambda: api.watches > 0)
        with api.changed:
            del api.jobs[NAME]
            api.changed.notify_all()

    api.plays.append(play)
    with pytest.raises(trainjob.TrainJobError, match="was deleted by someone else"):
        run(api)


def test_logs_that_may_not_be_read_are_said_once_and_do_not_end_the_training(
    api: KubernetesApi, capfd: pytest.CaptureFixture[str]
) -> None:
    api.faults["GET pods"] += [(403, "pods is forbidden")] * 2

    def play() -> None:
        until(lambda: api.watches > 2)
        api.end_job(NAME, "Complete")

    api.plays.append(play)
    run(api)
    assert capfd.readouterr().out.count("the nodes' pods cannot be listed: pods is forbidden\n") == 1


def test_outside_of_a_cluster_several_nodes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(incluster.OutsideError, match="several nodes needs a pod with a service account's token"):
        incluster.in_cluster("a training on several nodes")


def test_a_task_trains_on_nodes_only_if_kubeflow_handed_it_some() -> None:
    """On one machine the environment has the variable, but nobody fills in the `dsl.TaskConfig`."""
    assert nodes.launcher("sdpo", dsl.TaskConfig()) is launch
    assert isinstance(nodes.launcher("sdpo", HANDED), OnNodes)


def test_the_runtime_in_the_manifests_is_the_one_that_jobs_name() -> None:
    text = (ROOT / "manifests/components/trainjob/training-runtime.yaml").read_text(encoding="utf-8")
    given = yaml.safe_load(text)
    # Their models keep nothing they do not know.
    assert TrainerV1alpha1TrainingRuntime.from_dict(given).to_dict() == given
    job = trainjob.manifest(NAME, COMMAND, ASKED, HANDED)
    assert job["spec"]["runtimeRef"]["name"] == given["metadata"]["name"]
    [replicated] = given["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == trainjob.NODE
    spec = replicated["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    assert container["name"] == trainjob.NODE
    # An error of the training (Python's own status) ends the job, a lost node's status does not.
    fail, ignore = spec["podFailurePolicy"]["rules"]
    assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailJob", [1])
    assert LOST not in fail["onExitCodes"]["values"] and ignore["action"] == "Ignore"
    # As a plain Job it is what Kubernetes takes.
    job_of_it = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, "spec": spec}
    kubernetes_validate.validate(job_of_it, "1.37", strict=True)
