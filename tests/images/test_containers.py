"""The quick start in its real images: built by images/test.sh, run from the compiled pipelines' IR."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kfp import compiler

from components.images import IMAGE_OF, LOCKS_OF, tagged
from pipelines import backbones, trackrec
from pipelines.cli import local_inputs
from tests.images.pods import Pods
from trackrec import config_file, storage
from trackrec.data import schema
from trackrec.run_config import TRAINED, RunConfig

REGISTRY = "localhost/trackrec"
BUILT = os.environ.get("TRACKREC_IMAGES", "").split()
pytestmark = pytest.mark.skipif(not BUILT, reason="runs from `make test-images`")

# Every part of the quick start, as little as can be of each.
SMALL: dict[str, Any] = {
    "registry": REGISTRY,
    "loop.iterations": 1,
    "loop.controls": False,
    "ranking.backbones": ["din"],
    "ranking.controls_of": [],
    "ranking.by_iteration_of": [],
    "contexts.max_train_contexts": 4,
    "contexts.max_test_contexts": 2,
    "contexts.max_examples_per_context": 2,
    "distill_data.teacher.min_matches": 4,
    "sample.n": 2,
    "sample.max_tokens": 24,
    "generate.max_tokens": 24,
    "sdpo.holdout": 0,
    "train_ctr.max_train_rows": 1000,
    "train_ctr.epochs": 1,
    "train_ctr.min_steps": 10,
    "train_ctr.seeds": 2,
    "train_ctr.grid.learning_rate": [1.0e-3],
    # A profile's mounts.
    **{f"resources.{stage}.work_claim": "trackrec-work" for stage in ("distill_data", *TRAINED, "sample", "encode")},
    "resources.encode.shm": "1Gi",
    "resources.encode.model_cache_claim": "trackrec-model-cache",
}


# The stages of several shards, and of production's pipelines.
ELSEWHERE = {"gather", "export", "deploy", "active_users", "features", "commit_features"}
# The tasks before any model is taken.
PREPARATION = ("preflight", "importer", "importer-2", "ingest", "contexts", "distill-data")


def config(**more: Any) -> RunConfig:
    return config_file.load(Path("pipelines/configs/quickstart.yaml"), SMALL | more)


def inputs(*keys: str) -> dict[str, Any]:
    return local_inputs(config(), keys)[0]


def paths(arguments: dict[str, Any]) -> list[Path]:
    return [Path(value) for value in arguments.values()]


def compiled(module: Any, loaded: RunConfig, folder: Path) -> Path:
    ir = folder / "ir.yaml"
    compiler.Compiler().compile(module.build(loaded), str(ir))
    return ir


def built(*images: str) -> pytest.MarkDecorator:
    missing = sorted(set(images) - set(BUILT))
    return pytest.mark.skipif(bool(missing), reason=f"not built: {', '.join(missing)}")


def any_tag(image: str) -> str:
    return next(tagged(stage, REGISTRY) for stage, own in IMAGE_OF.items() if own == image)


def inside(image: str, script: str) -> subprocess.CompletedProcess[str]:
    command = ["podman", "run", "--rm", "--pull=never", "--network=none", "--entrypoint=sh", any_tag(image)]
    return subprocess.run([*command, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("image", sorted(set(IMAGE_OF.values())))
def test_an_image_runs_as_nobody_in_particular_and_holds_no_installer(image: str) -> None:
    if image not in BUILT:
        pytest.skip("not built")
    found = inside(image, "id -u; id -g; pwd; python3 -m pip 2>&1; command -v g++ || echo none")
    uid, gid, folder, pip, compiler_ = found.stdout.splitlines()
    assert (uid, gid, folder) == ("1000", "1000", "/tmp")
    assert "No module named pip" in pip
    # Training and vLLM compile kernels at run time.
    assert (compiler_ == "none") == (image in ("data", "rank", "triton"))
    assert inside(image, "python3 -m trackrec --help").returncode == 0
    labels = subprocess.run(
        ["podman", "inspect", "--format", "{{json .Labels}}", any_tag(image)],
        capture_output=True,
        text=True,
        check=True,
    )
    for label in ("title", "version", "revision", "source", "licenses"):
        assert f'"org.opencontainers.image.{label}":' in labels.stdout


@built("data")
def test_the_data_image_holds_no_torch() -> None:
    assert "No module named 'torch'" in inside("data", "python3 -c 'import torch'").stderr


@built("data")
def test_an_sbom_lists_what_the_lock_pins(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "images/make.py", "sbom", "data", f"--out={tmp_path}"], check=True)
    found = json.loads((tmp_path / "data.cdx.json").read_text(encoding="utf-8"))
    assert (found["bomFormat"], found["metadata"]["component"]["name"]) == ("CycloneDX", "trackrec/data")
    locks = "".join(Path(f"requirements/{lock}.txt").read_text(encoding="utf-8") for lock in LOCKS_OF["data"])
    pinned = set(re.findall(r"^([a-z0-9._-]+)==([^ ;]+)", locks, re.MULTILINE))
    assert {(one["name"], one["version"]) for one in found["components"]} == pinned
    assert all(one["purl"].startswith("pkg:pypi/") for one in found["components"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Pods:
    """The quick start up to the teacher's RecCoTs, which is the data image's part that needs nothing of the others."""
    arguments = inputs("raw_data", "base_model", "encoder")
    folder = tmp_path_factory.mktemp("prepared")
    pods = Pods(compiled(trackrec, config(), folder), folder / "root", paths(arguments))
    pods.run(arguments, only=PREPARATION)
    return pods


@built("data")
def test_raw_data_become_recots_in_the_data_image(prepared: Pods) -> None:
    assert prepared.ran == [tagged(stage, REGISTRY) for stage in ("preflight", "ingest", "contexts", "distill_data")]
    assert schema.read(prepared.output("ingest", "interactions"), "interactions").num_rows == 100_000
    recots = prepared.output("distill-data", "recots")
    contexts = schema.rows(prepared.output("contexts", "contexts"), "contexts", ["split"])
    assert schema.read(recots, "recots").num_rows == sum(row["split"] == "train" for row in contexts) == 4
    # The image's user wrote it, nobody else.
    assert (recots / storage.MANIFEST).stat().st_uid == 1000


@built("data", "rank")
def test_recots_become_vectors_rankers_and_a_report_in_the_rank_image(prepared: Pods, tmp_path: Path) -> None:
    tables = {
        "interactions": prepared.output("ingest", "interactions"),
        "items": prepared.output("ingest", "items"),
        "contexts": prepared.output("contexts", "contexts"),
        "examples": prepared.output("contexts", "examples"),
        "recots": prepared.output("distill-data", "recots"),
    }
    arguments = inputs("encoder") | {name: str(path) for name, path in tables.items()}
    pods = Pods(compiled(backbones, config(), tmp_path), tmp_path / "root", paths(arguments))
    pods.run(arguments)
    stages = ("preflight", "encode", "train_ctr", "train_ctr", "tabulate_ctr", "compare")
    assert sorted(pods.ran) == sorted(tagged(stage, REGISTRY) for stage in stages)
    assert schema.read(pods.output("encode", "vectors"), "vectors").num_rows == 4
    assert storage.read_manifest(pods.output("encode", "vectors")).facts["width"] == 384
    assert "DIN" in (pods.output("compare", "results") / "report.html").read_text(encoding="utf-8")


@built("data", "train")
def test_a_generator_is_trained_in_the_train_image(tmp_path: Path) -> None:
    arguments = inputs("raw_data", "base_model", "encoder")
    pods = Pods(compiled(trackrec, config(), tmp_path), tmp_path / "root", paths(arguments))
    pods.run(arguments, only=[*PREPARATION, "sft-generator"])
    assert pods.ran[-1] == tagged("sft_generator", REGISTRY)
    manifest = storage.read_manifest(pods.output("sft-generator", "generator"))
    assert "adapter_model.safetensors" in manifest.files


@built("data")
def test_a_container_that_fails_fails_the_run_and_nothing_follows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = inputs("base_model", "encoder") | {"raw_data": "/absent"}
    pods = Pods(compiled(trackrec, config(), tmp_path), tmp_path / "root", paths(inputs("base_model")))
    with pytest.raises(RuntimeError, match="FAILURE"):
        pods.run(arguments, only=["preflight", "importer", "importer-2", "ingest"])
    assert pods.ran == [tagged("preflight", REGISTRY)]
    assert "/absent" in capsys.readouterr().out
    assert not list(pods.root.glob("artifacts/*/ingest/interactions"))


@built(*set(IMAGE_OF.values()) - {"triton"})
def test_the_whole_quick_start_runs_in_its_images(tmp_path: Path) -> None:
    served = {f"{stage}.engine": {"kind": "vllm", "max_model_len": 1024} for stage in ("sample", "score", "generate")}
    loaded = config(**served, **{"evaluate.engine": served["sample.engine"]})
    arguments = inputs("raw_data", "base_model", "encoder")
    pods = Pods(compiled(trackrec, loaded, tmp_path), tmp_path / "root", paths(arguments))
    pods.run(arguments)
    assert set(pods.ran) == {tagged(stage, REGISTRY) for stage in IMAGE_OF if stage not in ELSEWHERE}
    report = (pods.output("compare", "results") / "report.html").read_text(encoding="utf-8")
    assert "iteration 1" in report and "DIN" in report
