"""The manifests: valid for Kubernetes, safe, with no more rights than stated, and of what the profiles name."""

import base64
import copy
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from components import sparkjob
from components.images import ROOT
from trackrec import config_file, profile
from trackrec.data_config import SparkApplication
from trackrec.run_config import Resources, StageResources

from .pod_security import violations

MANIFESTS = ROOT / "manifests"
CONFIGS = ROOT / "pipelines/configs"
# The last three that the validator has schemas of.
RELEASES = ("1.35", "1.36", "1.37")
OF_THE_CLUSTER = {"Namespace", "StorageClass"}
# By folder of what is applied.
NAMESPACES = {
    "base": "trackrec",
    "overlays/gke": "trackrec",
    "overlays/on-prem": "trackrec",
    "overlays/local": "kubeflow",
}
# With every component.
WITH_ALL = ("overlays/gke", "overlays/on-prem")

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl: make validate-manifests")
folders = pytest.mark.parametrize("folder", NAMESPACES)


def objects(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


@functools.cache
def _made(folder: str) -> str:
    command = ["kubectl", "kustomize", str(MANIFESTS / folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def made(folder: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would apply."""
    return objects(_made(folder))


def of(folder: str) -> list[dict[str, Any]]:
    """The objects of a folder's files as they are written."""
    files = sorted((MANIFESTS / folder).glob("*.yaml"))
    return [item for file in files if file.name != "kustomization.yaml" for item in objects(file.read_text())]


def named(items: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [item for item in items if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    return found


def names(items: list[dict[str, Any]], kind: str) -> set[str]:
    return {item["metadata"]["name"] for item in items if item["kind"] == kind}


def test_these_are_the_last_three_releases() -> None:
    schemas = (Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema").glob("*-local-strict")
    known = {tuple(int(part) for part in folder.name[1:].split(".")[:2]) for folder in schemas}
    assert [f"{major}.{minor}" for major, minor in sorted(known)[-3:]] == list(RELEASES)


@pytest.mark.parametrize("file", sorted(MANIFESTS.rglob("kustomization.yaml")), ids=lambda path: path.parent.name)
def test_every_file_is_listed(file: Path) -> None:
    listed = {name for name in yaml.safe_load(file.read_text())["resources"] if not name.startswith("..")}
    assert listed == {path.name for path in file.parent.iterdir()} - {"kustomization.yaml"}


@needs_kubectl
@folders
@pytest.mark.parametrize("release", RELEASES)
def test_what_kustomize_makes_is_valid(folder: str, release: str) -> None:
    unknown = set()
    for item in made(folder):
        try:
            kubernetes_validate.validate(item, release, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            unknown.add(item["kind"])
    # Custom resources have no schema in Kubernetes.
    assert unknown == ({"PodMonitor", "TrainingRuntime"} if folder in WITH_ALL else set())


@needs_kubectl
@pytest.mark.parametrize("release", RELEASES[1:])
def test_the_priorities_are_valid_from_1_36_on(release: str) -> None:
    items = made("priority")
    for item in items:
        kubernetes_validate.validate(item, release, strict=True)
    # Kustomize gives what it does not know a namespace, which Kubernetes refuses for what is of the whole cluster.
    assert {item["kind"] for item in items} == {
        "PriorityClass",
        "MutatingAdmissionPolicy",
        "MutatingAdmissionPolicyBinding",
    }
    assert not any("namespace" in item["metadata"] for item in items)


def test_the_validator_refuses_a_misspelt_field() -> None:
    claim = named(of("base"), "PersistentVolumeClaim", "trackrec-work")
    kubernetes_validate.validate(claim, RELEASES[-1], strict=True)
    claim["spec"]["accessMode"] = claim["spec"].pop("accessModes")
    with pytest.raises(kubernetes_validate.ValidationError, match="accessMode"):
        kubernetes_validate.validate(claim, RELEASES[-1], strict=True)


@needs_kubectl
@folders
def test_all_lies_in_one_namespace(folder: str) -> None:
    spaces = {i["metadata"].get("namespace") for i in made(folder) if i["kind"] not in OF_THE_CLUSTER}
    assert spaces == {NAMESPACES[folder]}
    assert not any("namespace" in i["metadata"] for i in made(folder) if i["kind"] in OF_THE_CLUSTER)
    # A binding that names another namespace's account gives nothing.
    for binding in (item for item in made(folder) if item["kind"] == "RoleBinding"):
        assert {subject.get("namespace") for subject in binding["subjects"]} <= {NAMESPACES[folder], None}


def pods_of(item: dict[str, Any]) -> list[dict[str, Any]]:
    """What a Job's or a Deployment's pods are, or those of a training's nodes."""
    template = item.get("spec", {}).get("template")
    if item["kind"] == "TrainingRuntime":
        return [job["template"]["spec"]["template"]["spec"] for job in template["spec"]["replicatedJobs"]]
    return [template["spec"]] if template else []


@needs_kubectl
@folders
def test_every_pod_is_restricted(folder: str) -> None:
    pods = [pod for item in made(folder) for pod in pods_of(item)]
    assert len(pods) == len(re.findall(r"^ +containers:$", _made(folder), re.M))
    for pod in pods:
        assert violations(pod) == []
        assert all(c["securityContext"]["readOnlyRootFilesystem"] for c in pod["containers"])


def test_the_namespace_enforces_it() -> None:
    labels = named(of("base"), "Namespace", "trackrec")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


# What Kubeflow 2.17 gives a container and its pod (argocompiler/security_context.go of its backend); who runs it is in
# the IR (tests/pipelines/test_profiles.py).
KUBEFLOWS = {
    "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [
        {
            "name": "main",
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
    ],
}
IDENTITY = {"runAsUser": 1000, "runAsGroup": 1000, "runAsNonRoot": True}


def test_a_stages_pod_is_restricted_by_what_its_ir_adds() -> None:
    pod = copy.deepcopy(KUBEFLOWS)
    assert violations(pod) == ["main: runAsNonRoot"]
    pod["containers"][0]["securityContext"] |= IDENTITY
    assert violations(pod) == []


def test_sparks_pods_are_restricted() -> None:
    spec = sparkjob.manifest("s", "local:///s.py", SparkApplication())["spec"]
    for part in ("driver", "executor"):
        assert violations({"containers": [{"name": part, "securityContext": spec[part]["securityContext"]}]}) == []


@pytest.mark.parametrize(
    ("of_pod", "of_container", "found"),
    [
        ({"hostNetwork": True}, {}, ["hostNetwork"]),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, {}, ["volume v: hostPath"]),
        ({"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}}, {}, ["sysctl kernel.msgmax"]),
        ({"securityContext": {"runAsUser": 0}}, {}, ["pod: runAsUser"]),
        ({}, {"privileged": True}, ["main: privileged"]),
        ({}, {"allowPrivilegeEscalation": True}, ["main: allowPrivilegeEscalation"]),
        ({}, {"capabilities": {"drop": ["ALL"], "add": ["CHOWN"]}}, ["main: capabilities"]),
        ({}, {"capabilities": {}}, ["main: capabilities"]),
        ({}, {"runAsUser": 0}, ["main: runAsUser"]),
        ({}, {"runAsNonRoot": False}, ["main: runAsNonRoot"]),
        ({}, {"seccompProfile": {"type": "Unconfined"}}, ["main: seccompProfile"]),
        ({}, {"appArmorProfile": {"type": "Unconfined"}}, ["main: appArmorProfile"]),
        ({}, {"seLinuxOptions": {"type": "spc_t"}}, ["main: seLinuxOptions"]),
        ({}, {"procMount": "Unmasked"}, ["main: procMount"]),
    ],
)
def test_what_restricted_forbids_is_found(
    of_pod: dict[str, Any], of_container: dict[str, Any], found: list[str]
) -> None:
    pod = copy.deepcopy(KUBEFLOWS)
    pod["containers"][0]["securityContext"] |= {"seccompProfile": {"type": "RuntimeDefault"}} | IDENTITY
    assert violations(pod) == []
    pod["containers"][0]["securityContext"] |= of_container
    assert violations(pod | of_pod) == found


# By role: what may be changed, and what may be read. Nothing else is in it.
RIGHTS = {
    "trackrec": ({"workflowtaskresults"}, {"configmaps", "pods"}),
    "trackrec-trainjob": ({"trainjobs"}, {"pods", "pods/log"}),
    "trackrec-spark": ({"sparkapplications"}, {"pods", "pods/log"}),
    "trackrec-deploy": ({"deployments"}, {"pods", "events", "pods/log"}),
    "spark": ({"pods", "services", "configmaps", "persistentvolumeclaims"}, set()),
}
# By folder: the one secret that Kubeflow's launcher reads itself there.
READ_SECRETS = {"overlays/on-prem": ["trackrec-object-store"], "overlays/local": ["mlpipeline-minio-artifact"]}


@needs_kubectl
@folders
def test_no_more_rights_than_stated(folder: str) -> None:
    items = made(folder)
    assert not {"ClusterRole", "ClusterRoleBinding", "Secret"} & {item["kind"] for item in items}
    assert names(items, "Role") == (set(RIGHTS) if folder in WITH_ALL else {"trackrec"})
    for name in names(items, "Role"):
        changed, read, secrets = set(), set(), []
        for rule in named(items, "Role", name)["rules"]:
            assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"]
            if rule["resources"] == ["secrets"]:
                assert rule["verbs"] == ["get"]
                secrets += rule["resourceNames"]
                continue
            reads = set(rule["verbs"]) <= {"get", "list", "watch"}
            # What every run's pods may do is looked up by name.
            assert name != "trackrec" or not reads or rule["verbs"] == ["get"]
            (read if reads else changed).update(rule["resources"])
        assert (changed, read) == RIGHTS[name]
        assert secrets == (READ_SECRETS.get(folder, []) if name == "trackrec" else [])
        binding = named(items, "RoleBinding", name)
        assert binding["roleRef"]["name"] == name
        account = SparkApplication().service_account if name == "spark" else "trackrec"
        assert [(s["kind"], s["name"]) for s in binding["subjects"]] == [("ServiceAccount", account)]
        assert account in names(items, "ServiceAccount")


@needs_kubectl
@pytest.mark.parametrize("folder", [name for name, space in NAMESPACES.items() if space == "trackrec"])
def test_nothing_passes_but_what_is_named(folder: str) -> None:
    policies = {i["metadata"]["name"]: i["spec"] for i in made(folder) if i["kind"] == "NetworkPolicy"}
    assert policies.pop("default-deny") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, spec in policies.items():
        for rule in [*spec.get("egress", []), *spec.get("ingress", [])]:
            peers = rule.get("to") or rule.get("from")
            assert peers and {} not in peers, f"{name} lets all through"
            # Among a training's or Spark's own pods ports are chosen at run time; everywhere else they are named.
            assert rule.get("ports") or peers == [{"podSelector": spec["podSelector"]}], name
        if "ingress" in spec:
            assert spec["podSelector"], f"{name} opens every pod"
    open_to = {name for name, spec in policies.items() if "ingress" in spec}
    assert open_to == ({"trainjob", "spark", "metrics", "triton"} if folder in WITH_ALL else set())


@needs_kubectl
def test_kubeflows_own_pods_are_left_alone_where_they_share_the_namespace() -> None:
    kinds = {item["kind"] for item in made("overlays/local")}
    assert not kinds & {"Namespace", "NetworkPolicy", "ResourceQuota", "LimitRange"}


@needs_kubectl
@pytest.mark.parametrize("folder", WITH_ALL)
def test_the_claims_have_the_clusters_storage_class(folder: str) -> None:
    items = made(folder)
    (storage,) = names(items, "StorageClass")
    for claim in (item for item in items if item["kind"] == "PersistentVolumeClaim"):
        assert claim["spec"]["storageClassName"] == storage
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_claims_belong_to_the_images_user() -> None:
    pod = named(of("base"), "Job", "trackrec-claims")["spec"]["template"]["spec"]
    context = pod["securityContext"]
    assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 1000
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
    assert claims == names(of("base"), "PersistentVolumeClaim")
    for dockerfile in (ROOT / "images").glob("*/Dockerfile"):
        assert re.search(r"^USER 1000(:1000)?$", dockerfile.read_text(encoding="utf-8"), re.M), dockerfile


@pytest.mark.parametrize(
    ("group", "mode", "opened"), [(1000, 0o2775, True), (0, 0o777, True), (0, 0o755, False), (1000, 0o2755, False)]
)
def test_the_claims_job_fails_where_a_later_pod_could_not_write(
    tmp_path: Path, group: int, mode: int, opened: bool
) -> None:
    (container,) = named(of("base"), "Job", "trackrec-claims")["spec"]["template"]["spec"]["containers"]
    shell, flag, script = container["command"]
    for folder in ("work", "model-cache"):
        (tmp_path / folder).mkdir()
    shutil.chown(tmp_path / "work", group=group)
    (tmp_path / "work").chmod(mode)
    (tmp_path / "model-cache").chmod(0o777)
    script = script.replace("/work /model-cache", f"{tmp_path}/work {tmp_path}/model-cache")
    done = subprocess.run([shell, flag, script], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is opened, done.stderr
    assert opened or "group 1000 cannot write" in done.stderr


def pods(name: str) -> dict[str, Resources]:
    config = CONFIGS / ("quickstart.yaml" if name == "cpu" else "ml-1m-qwen2.5-7b.yaml")
    resources = config_file.load(config, profile=name).resources
    return {stage: getattr(resources, stage) for stage in StageResources.model_fields}


def gib(quantity: str) -> float:
    units = {"Mi": 2**-10, "Gi": 1, "Ti": 2**10}
    return float(quantity[:-2]) * units[quantity[-2:]]


@pytest.mark.parametrize("name", profile.names())
def test_the_claims_and_priorities_of_a_profile_are_in_the_manifests(name: str) -> None:
    items = of("base")
    for pod in pods(name).values():
        claims = {claim for claim in (pod.work_claim, pod.model_cache_claim) if claim}
        assert claims <= names(items, "PersistentVolumeClaim")
        assert {pod.priority_class} - {None} <= names(of("priority"), "PriorityClass")


@pytest.mark.parametrize("name", profile.names())
def test_the_quota_and_the_limits_let_every_stages_pod_run(name: str) -> None:
    items = of("base")
    quota = named(items, "ResourceQuota", "trackrec")["spec"]["hard"]
    (limits,) = named(items, "LimitRange", "trackrec")["spec"]["limits"]
    for stage, pod in pods(name).items():
        assert float(pod.cpu) <= float(limits["max"]["cpu"]) <= float(quota["requests.cpu"]), stage
        assert gib(pod.memory) <= gib(limits["max"]["memory"]) <= gib(quota["requests.memory"]), stage
        # A second training, or other stages, beside it.
        assert 2 * (pod.accelerator.count if pod.accelerator else 0) <= int(quota["requests.nvidia.com/gpu"]), stage
    claims = [i["spec"]["resources"]["requests"]["storage"] for i in items if i["kind"] == "PersistentVolumeClaim"]
    assert sum(map(gib, claims)) <= gib(quota["requests.storage"])


def test_the_policy_makes_priorities_of_the_label_that_the_ir_gives() -> None:
    policy = named(of("priority"), "MutatingAdmissionPolicy", "trackrec-priority-class")["spec"]
    binding = named(of("priority"), "MutatingAdmissionPolicyBinding", "trackrec-priority-class")["spec"]
    assert binding["policyName"] == "trackrec-priority-class"
    label = "object.metadata.labels['trackrec/priority-class']"
    expression = policy["mutations"][0]["jsonPatch"]["expression"]
    assert label in expression and "/spec/priorityClassName" in expression
    assert "'trackrec/priority-class' in object.metadata.labels" in policy["matchConditions"][0]["expression"]


@pytest.fixture
def created(tmp_path: Path) -> dict[str, set[str]]:
    """The secrets that the docs' commands create, by name, with their keys: run, but sent to no cluster."""
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker/config.json").write_text('{"auths": {}}')
    values = dict.fromkeys(["TEACHER_API_KEY", "ACCESS_KEY", "SECRET_KEY"], "a+b/c=")
    environment = {**os.environ, **values, "HOME": str(tmp_path)}
    found = {}
    for command in re.findall(r"^.*kubectl .*create secret .*$", page, re.M):
        dry = ["bash", "-o", "pipefail", "-c", f"{command} --dry-run=client --output=yaml"]
        done = subprocess.run(dry, env=environment, capture_output=True, text=True, check=True)
        secret = yaml.safe_load(done.stdout)
        assert secret["metadata"]["namespace"] == "trackrec"
        values_made = {base64.b64decode(value).decode() for value in secret["data"].values()}
        assert values_made <= {"a+b/c=", '{"auths": {}}'}
        found[secret["metadata"]["name"]] = set(secret["data"])
    return found


@needs_kubectl
def test_the_docs_create_every_secret_that_is_named(created: dict[str, set[str]]) -> None:
    wanted: dict[str, set[str]] = {}
    for name in profile.names():
        for secret in (secret for pod in pods(name).values() for secret in pod.secrets):
            wanted.setdefault(secret.secret, set()).add(secret.key)
    own = made("overlays/on-prem")
    store = yaml.safe_load(named(own, "ConfigMap", "kfp-launcher")["data"]["providers"])["s3"]["default"]
    reference = store["credentials"]["secretRef"]
    wanted[reference["secretName"]] = {reference["accessKeyKey"], reference["secretKeyKey"]}
    (pull,) = named(own, "ServiceAccount", "trackrec")["imagePullSecrets"]
    wanted[pull["name"]] = {".dockerconfigjson"}
    assert created == wanted
    rules = named(own, "Role", "trackrec")["rules"]
    assert [r["resourceNames"] for r in rules if r["resources"] == ["secrets"]] == [[reference["secretName"]]]


@needs_kubectl
def test_workload_identity_is_that_of_every_account_that_reads_the_bucket() -> None:
    page = "".join((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("cluster", "deploy"))
    accounts = [item for item in made("overlays/gke") if item["kind"] == "ServiceAccount"]
    readers = {"trackrec", "trackrec-triton", SparkApplication().service_account}
    assert {account["metadata"]["name"] for account in accounts} == readers
    for account in accounts:
        assert account["metadata"]["annotations"] == {
            "iam.gke.io/gcp-service-account": "trackrec@YOUR-PROJECT.iam.gserviceaccount.com"
        }
        assert f"[trackrec/{account['metadata']['name']}]" in page


@needs_kubectl
def test_whatever_pulls_an_image_from_a_private_registry_has_its_login() -> None:
    items = made("overlays/on-prem")
    accounts = [item for item in items if item["kind"] == "ServiceAccount"]
    [nodes] = pods_of(named(items, "TrainingRuntime", "trackrec"))
    assert len(accounts) == 3 and "serviceAccountName" not in nodes
    for one in (*accounts, nodes):
        assert one["imagePullSecrets"] == [{"name": "trackrec-registry"}]


@needs_kubectl
def test_what_the_docs_apply_is_there() -> None:
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    applied = re.findall(r"^kubectl apply -k manifests/(\S+)", page, re.M)
    assert set(applied) == {"overlays/gke", "overlays/on-prem", "overlays/local", "priority"}
    assert all(made(folder) for folder in applied)
