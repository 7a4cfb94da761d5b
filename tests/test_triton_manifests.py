"""The served models' manifests: how pods change, who reaches them, and that the Deployment's own commands serve."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as triton
import yaml
from tritonclient.utils import InferenceServerException

from components import rollout
from components.images import ROOT
from pipelines.placement import WORK_PATH
from tests.pod_security import violations
from tests.serving import versions
from tests.test_manifests import WITH_ALL, gib, made, named, needs_kubectl, of, pods_of
from trackrec import config_file
from trackrec.serving import server, smoke
from trackrec.serving_config import DeploySettings, FeaturesSettings
from trackrec.stages import deploy

NAME = "trackrec-triton"
LABELS = {"app.kubernetes.io/name": NAME}
Served = tuple[Path, dict[str, int], subprocess.Popen[bytes]]


def deployment() -> dict[str, Any]:
    return named(of("components/triton"), "Deployment", NAME)


def template() -> dict[str, Any]:
    spec: dict[str, Any] = deployment()["spec"]["template"]
    return spec


def container() -> dict[str, Any]:
    (found,) = template()["spec"]["containers"]
    return found


def autoscaler() -> dict[str, Any]:
    spec: dict[str, Any] = named(of("components/triton-autoscaling"), "HorizontalPodAutoscaler", NAME)["spec"]
    return spec


def test_the_stage_rolls_out_what_the_manifests_name() -> None:
    assert DeploySettings().deployment == NAME
    spec = deployment()["spec"]
    # Applied again, it takes back neither the autoscaler's replicas nor the version that was rolled out.
    assert "replicas" not in spec
    assert not template()["metadata"].get("annotations")
    (fetch,) = template()["spec"]["initContainers"]
    (variable,) = fetch["env"]
    assert variable["valueFrom"]["fieldRef"]["fieldPath"] == f"metadata.annotations['{rollout.URI}']"
    assert f'"${variable["name"]}"' in fetch["command"][-1]
    assert [port["containerPort"] for port in container()["ports"] if port["name"] == "grpc"] == [8001]
    (role,) = [item for item in of("components/triton") if item["kind"] == "Role"]
    assert role["rules"][0]["resourceNames"] == [NAME] and role["rules"][0]["verbs"] == ["get", "patch"]


def test_old_pods_serve_until_new_ones_have_proved_good() -> None:
    spec = deployment()["spec"]
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    # Time for the stage to find a new pod and to ask it, tries and all, before an old one goes.
    tries = rollout._SMOKE_TRIES * (deploy.SMOKE_SECONDS + rollout._POLL_SECONDS)
    assert spec["minReadySeconds"] > tries + 2 * rollout._POLL_SECONDS
    startup = container()["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] <= DeploySettings().timeout_s
    # A version may be put back: its ReplicaSet is kept.
    assert spec["revisionHistoryLimit"] >= 1


def test_requests_under_way_are_answered_before_a_pod_ends() -> None:
    (drain,) = [int(arg.partition("=")[2]) for arg in container()["args"] if arg.startswith("--exit-timeout-secs=")]
    assert drain >= FeaturesSettings().deadline_s
    leaving = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert template()["spec"]["terminationGracePeriodSeconds"] > drain + leaving


def test_a_server_whose_model_died_is_back_before_the_batch_job_gives_it_up() -> None:
    liveness, startup, readiness = (container()[f"{kind}Probe"] for kind in ("liveness", "startup", "readiness"))
    found = liveness["periodSeconds"] * liveness["failureThreshold"]
    # A request that waits for the dead model keeps Triton from ending by itself.
    ended = liveness["terminationGracePeriodSeconds"]
    assert ended > container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    # docs/deploy.md says so; what is left is for the probes themselves.
    loaded = 150
    seen = startup["periodSeconds"] + readiness["periodSeconds"]
    assert found + ended + loaded + seen <= FeaturesSettings().deadline_s - 30


def test_every_container_is_restricted_and_writes_only_where_it_is_given() -> None:
    pod = template()["spec"]
    assert violations(pod) == []
    assert pod["automountServiceAccountToken"] is False and pod["securityContext"]["fsGroup"] == 1000
    for each in (*pod["containers"], *pod["initContainers"]):
        assert each["securityContext"]["readOnlyRootFilesystem"] is True
        assert "limits" in each["resources"]
        # No registry's host: an overlay names it.
        assert each["image"] == "trackrec/triton"
    mounts = {mount["mountPath"]: mount for mount in container()["volumeMounts"]}
    assert mounts.keys() == {"/models", "/tmp", "/dev/shm"} and mounts["/models"]["readOnly"] is True
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    assert volumes["shm"]["medium"] == "Memory" and all("sizeLimit" in volume for volume in volumes.values())


def test_whoever_selects_the_servers_pods_finds_them() -> None:
    items = [*of("components/triton"), *of("components/triton-autoscaling"), *of("components/monitoring")]
    labels = template()["metadata"]["labels"]
    assert deployment()["spec"]["selector"]["matchLabels"] == LABELS
    ports = {port["name"] for port in container()["ports"]}
    for item in items:
        if item["kind"] == "Service":
            assert item["spec"]["selector"].items() <= labels.items()
            assert {port["targetPort"] for port in item["spec"]["ports"]} <= ports
        if item["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            assert item["spec"]["selector"]["matchLabels"].items() <= labels.items()
        if item["kind"] == "PodMonitor":
            assert {endpoint["port"] for endpoint in item["spec"]["podMetricsEndpoints"]} <= ports
    metrics = named(of("components/monitoring"), "NetworkPolicy", "metrics")["spec"]
    assert metrics["podSelector"]["matchLabels"].items() <= labels.items()
    host, _, port = FeaturesSettings().triton.partition(":")
    (service,) = [item for item in items if (item["kind"], item["metadata"]["name"]) == ("Service", host)]
    assert int(port) in [each["port"] for each in service["spec"]["ports"]]
    assert named(items, "Service", f"{NAME}-pods")["spec"]["clusterIP"] == "None"


def test_only_the_stages_that_ask_models_and_labelled_callers_reach_them() -> None:
    policies = of("components/triton")
    inward = named(policies, "NetworkPolicy", "triton")["spec"]
    outward = named(policies, "NetworkPolicy", "triton-clients")["spec"]
    assert inward["podSelector"]["matchLabels"] == LABELS
    (rule,) = inward["ingress"]
    stages, here, elsewhere = rule["from"]
    (expression,) = stages["podSelector"]["matchExpressions"]
    assert (expression["key"], set(expression["values"])) == ("trackrec/stage", {"preflight", "features", "deploy"})
    assert outward["podSelector"]["matchExpressions"] == [expression]
    client = {"matchLabels": {"trackrec/triton-client": "true"}}
    assert here == {"podSelector": client} and elsewhere == {"podSelector": client, "namespaceSelector": client}
    assert [port["port"] for port in rule["ports"]] == ["grpc"]
    assert outward["egress"] == [
        {"to": [{"podSelector": {"matchLabels": LABELS}}], "ports": [{"protocol": "TCP", "port": 8001}]}
    ]


@needs_kubectl
@pytest.mark.parametrize("folder", WITH_ALL)
def test_an_overlay_gives_every_server_a_gpu_of_the_profiles_kind(folder: str) -> None:
    items = made(folder)
    (pod,) = pods_of(named(items, "Deployment", NAME))
    (served,) = pod["containers"]
    gpus = int(served["resources"]["limits"]["nvidia.com/gpu"])
    profile = {"overlays/gke": "gke-a100", "overlays/on-prem": "on-prem"}[folder]
    stage = config_file.load(ROOT / "pipelines/configs/ml-1m-qwen2.5-7b.yaml", profile=profile).resources.generate
    assert pod["nodeSelector"] == stage.node_selector
    assert [each["key"] for each in pod["tolerations"]] == [each.key for each in stage.tolerations]
    assert {each["image"] for each in (*pod["containers"], *pod["initContainers"])} == {"YOUR-REGISTRY/triton:YOUR-TAG"}
    # All servers and the one more of a rollout, beside what the base's quota is for: two trainings on eight GPUs.
    quota = named(items, "ResourceQuota", "trackrec")["spec"]["hard"]
    base = named(of("base"), "ResourceQuota", "trackrec")["spec"]["hard"]
    pods = autoscaler()["maxReplicas"] + deployment()["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
    added = {key: float(quota[key]) - float(base[key]) for key in ("requests.nvidia.com/gpu", "requests.cpu")}
    assert added["requests.nvidia.com/gpu"] == pods * gpus
    assert added["requests.cpu"] >= pods * float(served["resources"]["requests"]["cpu"])
    for key in ("requests.memory", "limits.memory"):
        held = served["resources"][key.partition(".")[0]]["memory"]
        assert gib(quota[key]) - gib(base[key]) >= pods * gib(held)
    (limits,) = named(of("base"), "LimitRange", "trackrec")["spec"]["limits"]
    assert gib(served["resources"]["limits"]["memory"]) <= gib(limits["max"]["memory"])


@needs_kubectl
def test_on_a_cluster_without_a_bucket_versions_lie_on_the_stages_claim() -> None:
    (pod,) = pods_of(named(made("overlays/on-prem"), "Deployment", NAME))
    (volume,) = [each for each in pod["volumes"] if each["name"] == "work"]
    assert volume["persistentVolumeClaim"]["claimName"] == "trackrec-work"
    for each in (*pod["initContainers"], *pod["containers"]):
        (mount,) = [one for one in each["volumeMounts"] if one["name"] == "work"]
        # The same path as in the stage's pod, so that one URI names a version in both.
        assert (mount["mountPath"], mount["readOnly"]) == (WORK_PATH, True)


def test_the_autoscaler_asks_for_what_the_adapters_rules_make() -> None:
    spec = autoscaler()
    assert (spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"]) == ("Deployment", NAME)
    asked = [metric["pods"]["metric"]["name"] for metric in spec["metrics"]]
    (held,) = [item for item in of("components/triton-autoscaling") if item["kind"] == "ConfigMap"]
    rules = yaml.safe_load(held["data"]["rules.yaml"])["rules"]
    assert [rule["name"]["as"] for rule in rules] == asked
    for rule in rules:
        series = rule["seriesQuery"].partition("{")[0]
        assert series in rule["metricsQuery"] and "clamp_min(" in rule["metricsQuery"]
        assert rule["metricsQuery"].count("<<.LabelMatchers>>") == rule["metricsQuery"].count("<<.GroupBy>>") == 2


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The Deployment's own command on a small version, with other paths and ports: folder, ports by name, process."""
    folder = tmp_path_factory.mktemp("pod")
    repository = versions.write(folder / "models/repository", "g-1")
    free = dict(zip(("grpc", "http", "metrics"), server._free_ports("127.0.0.1"), strict=True))
    own = {port["name"]: port["containerPort"] for port in container()["ports"]}
    (binary, *options), variables = server._installation(folder)
    shell, flag, script, name = container()["command"]
    prefix = f"trackrec-manifest-{os.getpid()}-"
    for inside, outside in (
        ("/opt/tritonserver/bin/tritonserver", binary),
        ("/dev/shm/trackrec-", f"/dev/shm/{prefix}"),
    ):
        assert inside in script
        script = script.replace(inside, outside)
    args = []
    for arg in container()["args"]:
        for inside, outside in (
            ("/models/repository", str(repository)),
            ("prefix-name=trackrec-", f"prefix-name={prefix}"),
        ):
            arg = arg.replace(inside, outside)
        for kind, port in own.items():
            arg = arg.replace(f"--{kind}-port={port}", f"--{kind}-port={free[kind]}")
        args.append(arg)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [shell, flag, script, name, *args, *options, "--allow-gpu-metrics=false"],
            cwd=repository,
            env={**os.environ, **variables},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + 120
            while not is_up(free["http"], "/v2/health/ready"):
                assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.2)
            yield folder, free, process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for left in Path("/dev/shm").glob(f"{prefix}*"):
                left.unlink()


def probe(kind: str, folder: Path, port: int) -> subprocess.CompletedProcess[str]:
    command = container()[kind]["exec"]["command"]
    command = [part.replace("127.0.0.1:8001", f"127.0.0.1:{port}") for part in command]
    command = [part.replace("/models/repository", str(folder / "models/repository")) for part in command]
    assert command[0] == "python3"
    return subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, check=False)


def answers(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def is_up(port: int, path: str) -> bool:
    try:
        answers(port, path)
    except OSError:  # nobody listens, or the answer is an error
        return False
    return True


def test_the_deployments_own_command_serves_and_its_probes_pass(served: Served) -> None:
    folder, ports, _ = served
    for kind in ("startupProbe", "livenessProbe"):
        found = probe(kind, folder, ports["grpc"])
        assert found.returncode == 0, found.stderr + (folder / "log").read_text()
    path = container()["readinessProbe"]["httpGet"]["path"]
    # A server without its generator calls itself ready.
    assert "/models/generator/" in path and is_up(ports["http"], path)


def test_callers_infer_and_change_nothing(served: Served) -> None:
    folder, ports, _ = served
    address = f"127.0.0.1:{ports['grpc']}"
    with triton.InferenceServerClient(address) as client:
        for call in (
            lambda: client.load_model("encoder"),
            lambda: client.unload_model("encoder"),
            lambda: client.register_system_shared_memory("s", "/s", 8),
            lambda: client.update_log_settings({"log_verbose_level": 1}),
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                call()
    assert smoke.check(address, smoke.expected(folder / "models/repository"))


def test_the_rules_read_metrics_that_the_server_has(
    served: Served,
) -> None:
    (held,) = [item for item in of("components/triton-autoscaling") if item["kind"] == "ConfigMap"]
    text = held["data"]["rules.yaml"]
    asked = set(re.findall(r"nv_\w+", text))
    assert asked == {"nv_inference_queue_duration_us", "nv_inference_request_success"}
    lines = answers(served[1]["metrics"], "/metrics").splitlines()
    for name, model in itertools.product(asked, ("generator", "encoder", "ranker_base")):
        assert any(line.startswith(f"{name}{{") and f'model="{model}"' in line for line in lines), name
    # tests/serving asks the generator's backend for its own.
    assert set(re.findall(r"vllm:\w+", text)) == {"vllm:num_requests_waiting"}


def test_a_pod_ends_by_sigterm(served: Served) -> None:
    """The last of this server's tests: the shell has become the server, so that the kubelet's signal reaches it."""
    process = served[2]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
