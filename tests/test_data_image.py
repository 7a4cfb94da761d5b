"""The data image, built by images/test.sh: the library and a compiled component run in it, without root or network."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from components import images
from trackrec.data import schema
from trackrec.fetch import fetch

IMAGE = os.environ.get("TRACKREC_DATA_IMAGE", "")
pytestmark = pytest.mark.skipif(not IMAGE, reason="runs from `make test-images`")


def run(folder: Path, *command: str, entrypoint: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the image as a pod would: read-only but for /tmp and the mounted `folder`."""
    options = ["--rm", "--pull=never", "--network=none", "--read-only", "--tmpfs=/tmp", f"--volume={folder}:/run-root"]
    if entrypoint is not None:
        options.append(f"--entrypoint={json.dumps(entrypoint)}")
    return subprocess.run(["podman", "run", *options, IMAGE, *command], capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder the image's user may write to, as a volume with its group would be."""
    tmp_path.chmod(0o777)
    return tmp_path


def artifact(name: str, uri: str) -> dict[str, Any]:
    return {"artifacts": [{"name": name, "type": {"schemaTitle": "system.Dataset"}, "uri": uri}]}


def ingest(folder: Path, raw: str) -> subprocess.CompletedProcess[str]:
    """The compiled ingest component's own command, with what a KFP launcher puts in its place."""
    spec = yaml.safe_load((images.ROOT / "components/ingest/component.yaml").read_text(encoding="utf-8"))
    container = spec["deploymentSpec"]["executors"]["exec-ingest"]["container"]
    executor_input = {
        "inputs": {
            "parameterValues": {"settings": {"dataset": "ml-100k"}},
            "artifacts": {"raw": artifact("raw", raw)},
        },
        "outputs": {
            "artifacts": {name: artifact(name, f"/run-root/out/{name}") for name in ("interactions", "items")},
            "outputFile": "/run-root/out/executor_output.json",
        },
    }
    arguments = [json.dumps(executor_input) if text == "{{$}}" else text for text in container["args"]]
    return run(folder, *container["command"][1:], *arguments, entrypoint=container["command"][:1])


def test_the_library_answers_as_an_unprivileged_user(folder: Path) -> None:
    done = run(folder, "--help")
    assert done.returncode == 0, done.stderr
    assert "ingest" in done.stdout
    assert run(folder, "-u", entrypoint=["id"]).stdout.strip() == "1000"


def test_a_component_runs_and_its_tables_can_be_read(folder: Path) -> None:
    raw = folder / "raw"
    raw.mkdir()
    for file in fetch("ml-100k").iterdir():
        (raw / file.name).write_bytes(file.read_bytes())
    done = ingest(folder, "/run-root/raw")
    assert done.returncode == 0, done.stderr
    assert schema.read(folder / "out/interactions", "interactions").num_rows == 100_000
    assert schema.read(folder / "out/items", "items").num_rows == 1_682
    outputs = json.loads((folder / "out/executor_output.json").read_text(encoding="utf-8"))["artifacts"]
    assert outputs["interactions"]["artifacts"][0]["metadata"]


def test_a_component_that_fails_fails_its_container_and_leaves_no_output(folder: Path) -> None:
    done = ingest(folder, "/run-root/absent")
    assert done.returncode != 0
    assert "/run-root/absent" in done.stderr
    assert not (folder / "out/interactions").exists()


def test_the_image_holds_no_torch(folder: Path) -> None:
    done = run(folder, "-c", "import torch", entrypoint=["python3"])
    assert done.returncode != 0
    assert "No module named 'torch'" in done.stderr
