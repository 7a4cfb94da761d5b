"""The manifests: valid for Kubernetes, with no more rights than stated, and named as the configs name them."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from components.images import ROOT

MANIFESTS = ROOT / "manifests"
# The oldest and the newest release that the validator's schemas and the supported clusters share.
RELEASES = ("1.30", "1.37")


def objects(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def base() -> list[dict[str, Any]]:
    listed = yaml.safe_load((MANIFESTS / "base/kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    return [item for name in listed for item in objects((MANIFESTS / "base" / name).read_text(encoding="utf-8"))]


def of_kind(kind: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [item for item in items if item["kind"] == kind]
    return found


def validate(items: list[dict[str, Any]]) -> None:
    for release in RELEASES:
        for item in items:
            kubernetes_validate.validate(item, release, strict=True)


def test_the_base_lists_every_file_and_each_object_is_valid() -> None:
    listed = yaml.safe_load((MANIFESTS / "base/kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    assert sorted(listed) == sorted(
        path.name for path in (MANIFESTS / "base").iterdir() if path.name != "kustomization.yaml"
    )
    validate(base())


def test_the_validator_refuses_a_misspelt_field() -> None:
    claim = of_kind("PersistentVolumeClaim", base())
    claim["spec"]["accessMode"] = claim["spec"].pop("accessModes")
    with pytest.raises(kubernetes_validate.ValidationError, match="accessMode"):
        validate([claim])


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("folder", ["base", "overlays/local"])
def test_what_kustomize_makes_is_valid_and_lies_in_one_namespace(folder: str) -> None:
    done = subprocess.run(["kubectl", "kustomize", str(MANIFESTS / folder)], capture_output=True, text=True, check=True)
    items = objects(done.stdout)
    validate(items)
    namespace = yaml.safe_load((MANIFESTS / folder / "kustomization.yaml").read_text(encoding="utf-8"))["namespace"]
    assert {item["metadata"]["namespace"] for item in items if item["kind"] != "Namespace"} == {namespace}
    assert len(items) == len(base()) - (folder != "base")


def test_the_service_account_has_no_right_to_secrets_or_to_everything() -> None:
    items = base()
    for rule in of_kind("Role", items)["rules"]:
        assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"]
        assert "secrets" not in rule["resources"]
        # Writes: Argo's report on a step, nothing else.
        if not set(rule["verbs"]) <= {"get", "list", "watch"}:
            assert rule["resources"] == ["workflowtaskresults"]
    binding = of_kind("RoleBinding", items)
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": of_kind("ServiceAccount", items)["metadata"]["name"]}
    ]
    assert binding["roleRef"]["name"] == of_kind("Role", items)["metadata"]["name"]


def test_the_claim_belongs_to_the_images_user() -> None:
    job = of_kind("Job", base())["spec"]["template"]["spec"]
    user = job["containers"][0]["command"][1].split(":")[0]
    assert job["volumes"][0]["persistentVolumeClaim"]["claimName"] == "trackrec-work"
    for dockerfile in (ROOT / "images").glob("*/Dockerfile"):
        assert f"USER {user}" in dockerfile.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines/configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_a_config_names_is_in_the_manifests_or_explained(path: Path) -> None:
    stages = (yaml.safe_load(path.read_text(encoding="utf-8")).get("resources") or {}).values()
    claims = {stage["work_claim"] for stage in stages if stage.get("work_claim")}
    assert claims <= {of_kind("PersistentVolumeClaim", base())["metadata"]["name"]}
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    for secret in (secret for stage in stages for secret in stage.get("secrets", [])):
        assert f"kubectl -n trackrec create secret generic {secret['secret']} --from-literal={secret['key']}=" in page
