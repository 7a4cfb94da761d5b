"""A training on several nodes: what the IR has Kubeflow hand to the task that starts them."""

import json
from pathlib import Path
from typing import Any

import pytest

from components import images
from components.nodes import ENV
from tests.pipelines.conftest import Compiled, compiled
from trackrec import config_file

TRAINED = ("sft_generator", "sdpo", "rec_tune")


def passed(pipeline: Compiled, title: str) -> dict[str, bool]:
    """The fields handed over, and whether the task's own pod keeps them, too."""
    component = pipeline.pipeline["components"][pipeline.tasks[title]["componentRef"]["name"]]
    return {entry["field"]: entry.get("applyToTask", False) for entry in component.get("taskConfigPassthroughs", [])}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The paper's settings with `sdpo` and `sft_generator` on two nodes."""
    overrides = ["resources.sft_generator.nodes=2", "resources.sdpo.nodes=2"]
    return compiled("ml-1m-qwen2.5-7b", tmp_path_factory.mktemp("ir"), *overrides)


@pytest.mark.parametrize(("title", "stage"), [("sdpo 1", "sdpo"), ("sdpo 3", "sdpo"), ("sft_generator",) * 2])
def test_a_task_on_several_nodes_hands_its_pods_resources_over(pipeline: Compiled, title: str, stage: str) -> None:
    assert passed(pipeline, title) == {
        "RESOURCES": False,
        "KUBERNETES_NODE_SELECTOR": False,
        "KUBERNETES_TOLERATIONS": False,
        "KUBERNETES_AFFINITY": False,
        # The task's own pod copies the inputs to the claim.
        "KUBERNETES_VOLUMES": True,
        "ENV": True,
    }
    container = pipeline.executor(title)["container"]
    # What is handed over is there as without nodes.
    assert container["resources"]["accelerator"]["resourceCount"] == "8"
    [environment] = container["env"]
    assert environment["name"] == ENV
    assert json.loads(environment["value"]) == {
        "count": 2,
        "image": images.tagged(stage, "YOUR-REGISTRY/trackrec"),
        "scratch": "200Gi",
        "shm": "64Gi",
        "labels": {"trackrec/stage": stage, "trackrec/priority-class": "trackrec-train"},
    }
    component = pipeline.pipeline["components"][pipeline.tasks[title]["componentRef"]["name"]]
    parameter = component["inputDefinitions"]["parameters"]["task_config"]
    assert parameter["parameterType"] == "TASK_CONFIG" and parameter["isOptional"]
    # Kubeflow's driver fills it in, after it has looked into its cache.
    assert "task_config" not in pipeline.tasks[title]["inputs"]["parameters"]


def test_a_task_in_one_pod_keeps_its_resources_itself(pipeline: Compiled, ml_1m: Compiled) -> None:
    for at, title in [(pipeline, "rec_tune 1"), (pipeline, "sample 1"), (ml_1m, "sdpo 1"), (ml_1m, "sft_generator")]:
        assert passed(at, title) == {}
        assert ENV not in {entry["name"] for entry in at.executor(title)["container"].get("env", [])}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"resources.sample.nodes": 2}, "only sft_generator, sdpo, rec_tune run on several nodes"),
        ({"resources.sdpo.nodes": 2, "resources.sdpo.work_claim": None}, "`sdpo.nodes` needs `sdpo.work_claim`"),
        ({"resources.sdpo.nodes": 3}, r"`sdpo.batch_size` \(32\) must be a multiple .* \(24 processes\)"),
        ({"resources.sdpo.nodes": 0}, "greater than or equal to 1"),
    ],
)
def test_what_nodes_do_not_go_with_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(config_file.ConfigError, match=message):
        config_file.load(Path("pipelines/configs/ml-1m-qwen2.5-7b.yaml"), overrides, profile="gke-a100")
