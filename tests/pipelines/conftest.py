"""A compiled pipeline as plain data: the two documents of its IR."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

# What the quick start with one backbone, dcn, runs from the first `sdpo` on.
FROM_SDPO = {
    "sdpo 1",
    "generate 1",
    "rec_tune 1",
    "evaluate (iteration 1)",
    "tabulate (iteration 1)",
    "encode 1",
    "train_ctr dcn 1",
    "tabulate_ctr (dcn 1)",
    "compare",
}


@dataclass
class Compiled:
    """Tasks by title; `executor` and `platform` are a task's parts of the first and of the second document."""

    pipeline: dict[str, Any]
    platforms: dict[str, Any]

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        return {task["taskInfo"]["name"]: task for task in self.pipeline["root"]["dag"]["tasks"].values()}

    def label(self, title: str) -> str:
        component = self.tasks[title]["componentRef"]["name"]
        return str(self.pipeline["components"][component]["executorLabel"])

    def executor(self, title: str) -> dict[str, Any]:
        found: dict[str, Any] = self.pipeline["deploymentSpec"]["executors"][self.label(title)]
        return found

    def platform(self, title: str) -> dict[str, Any]:
        executors = self.platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        found: dict[str, Any] = executors.get(self.label(title), {})
        return found

    def source(self, title: str, artifact: str) -> str:
        """Where a task's input artifact comes from, as "title of the producer/output"."""
        output = self.tasks[title]["inputs"]["artifacts"][artifact]["taskOutputArtifact"]
        producer = self.pipeline["root"]["dag"]["tasks"][output["producerTask"]]["taskInfo"]["name"]
        return f"{producer}/{output['outputArtifactKey']}"

    def parameter(self, title: str, name: str) -> Any:
        return self.tasks[title]["inputs"]["parameters"][name]["runtimeValue"]["constant"]


def compiled(
    name: str | Path, tmp_path: Path, *overrides: str, pipeline: str = "trackrec", profile: str | None = None
) -> Compiled:
    """The shipped config `name`, or a file, through `trackrec compile`; the paper's settings need GPUs."""
    if profile is None and str(name).endswith("qwen2.5-7b"):
        profile = "gke-a100"
    path = tmp_path / "pipeline.yaml"
    command = [
        Path(sys.executable).with_name("trackrec"),
        "compile",
        "-c",
        name if isinstance(name, Path) else f"pipelines/configs/{name}.yaml",
        "--pipeline",
        pipeline,
        "-o",
        path,
    ]
    if profile:
        command += ["--profile", profile]
    for override in overrides:
        command += ["--set", override]
    subprocess.run(command, check=True)
    documents = list(yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader))
    return Compiled(documents[0], documents[1])


@pytest.fixture(scope="session", params=["quickstart", "ml-1m-qwen2.5-7b", "amazon-book-qwen2.5-7b"])
def shipped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Compiled]:
    """Each shipped config as raw YAML, and its compiled pipeline."""
    raw = yaml.safe_load(Path("pipelines/configs", f"{request.param}.yaml").read_text())
    return raw, compiled(request.param, tmp_path_factory.mktemp("ir"))


@pytest.fixture(scope="session")
def ml_1m(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compiled("ml-1m-qwen2.5-7b", tmp_path_factory.mktemp("ir"))
