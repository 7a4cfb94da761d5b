"""What docs/cluster.md says of what re-runs what, computed from the IR as Kubeflow 2.17 computes its keys."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipelines import ir
from tests.pipelines.conftest import FROM_SDPO

# What the config's pipeline holds beside `preflight`, which never comes from the cache.
BEFORE_SDPO = {
    "ingest",
    "contexts",
    "distill_data",
    "sft_generator",
    "generate 0",
    "generate (untuned)",
    "evaluate (iteration 0)",
    "tabulate (iteration 0)",
    "sample 1",
    "score 1",
    "preferences 1",
    "train_ctr dcn",
}
SECOND = {title.replace("1", "2") for title in FROM_SDPO | {"sample 1", "score 1", "preferences 1"}}
EVERYTHING = BEFORE_SDPO | FROM_SDPO
EXPECTED = {
    "sdpo.beta=0.2": FROM_SDPO,
    "seed=8": EVERYTHING - {"ingest"},
    "loop.iterations=2": SECOND,
    "raw_data_version=2": EVERYTHING,
    "resources.sdpo.memory=64Gi": set(),
    "resources.sdpo.work_claim=other": FROM_SDPO,
    "registry=elsewhere/trackrec": EVERYTHING,
    "name=other": EVERYTHING,
}
COMPILE = """
import json, sys
from pathlib import Path
from pipelines import ir, options
from trackrec import config_file
for number, setting in enumerate(json.loads(sys.argv[3])):
    config = config_file.load(Path(sys.argv[1]), options.overrides([setting] if setting else []))
    ir.write(options.built("trackrec", config), config, Path(sys.argv[2], f"{number}.yaml"))
"""


def keys(documents: list[dict[str, Any]]) -> dict[str, str]:
    """A task's title to what Kubeflow would know it by, which is what it looks for in its cache."""
    spec, platforms = documents
    executors = spec["deploymentSpec"]["executors"]
    places = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    defaults = {name: one.get("defaultValue") for name, one in spec["root"]["inputDefinitions"]["parameters"].items()}
    found: dict[str, str] = {}
    labels: dict[str, str] = {}

    def key(name: str) -> str:
        task = spec["root"]["dag"]["tasks"][name]
        title = task["taskInfo"]["name"]
        if title not in found:
            component = spec["components"][task["componentRef"]["name"]]
            label = labels[title] = component["executorLabel"]
            given = {
                parameter: defaults.get(value["componentInputParameter"])
                if "componentInputParameter" in value
                else value["runtimeValue"]
                for parameter, value in task.get("inputs", {}).get("parameters", {}).items()
            }
            read = {
                artifact: (key(source["taskOutputArtifact"]["producerTask"]), source["taskOutputArtifact"])
                for artifact, source in task.get("inputs", {}).get("artifacts", {}).items()
            }
            container = executors[label].get("container", {})
            material = [
                spec["pipelineInfo"]["name"],
                [container.get(part) for part in ("image", "command", "args")],
                # An importer's metadata as they stand: Kubeflow fills no parameter in.
                executors[label].get("importer"),
                given,
                read,
                component.get("outputDefinitions"),
                sorted(mount["pvcNameParameter"]["runtimeValue"]["constant"] for mount in pvcs(places.get(label, {}))),
            ]
            found[title] = hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()
        return found[title]

    cached = {
        task["taskInfo"]["name"]: key(name)
        for name, task in spec["root"]["dag"]["tasks"].items()
        if task["cachingOptions"].get("enableCache")
    }
    return {title: its for title, its in cached.items() if "importer" not in executors[labels[title]]}


def pvcs(place: dict[str, Any]) -> list[dict[str, Any]]:
    return [mount for mount in place.get("pvcMount", ()) if "pvcNameParameter" in mount]


def test_the_table_of_what_re_runs_what_is_true_of_kubeflow(config: str, tmp_path: Path) -> None:
    page = Path("docs/cluster.md").read_text(encoding="utf-8")
    [section] = re.findall(r"## What re-runs what\n(.*?)\n## ", page, re.DOTALL)
    examples = re.findall(r"^\| [^|]+ \| `([^`|]+)` \|", section, re.MULTILINE)
    assert examples == [*EXPECTED]
    # In a process of its own: kfp walks the whole stack at every setting of a task.
    line = [sys.executable, "-c", COMPILE, config, str(tmp_path), json.dumps(["", *examples])]
    subprocess.run(line, check=True)
    before, *after = (keys(ir.read(tmp_path / f"{number}.yaml")) for number in range(len(examples) + 1))
    assert before.keys() == EVERYTHING
    changed = {
        example: {title for title, key in its.items() if before.get(title) != key}
        for example, its in zip(examples, after, strict=True)
    }
    assert changed == EXPECTED
