"""A compiled pipeline as a file: written, named by its content, and with the run's config inside.

The config travels in the pipeline's description, so that a run started from Kubeflow's pages has it, too. It names
secrets and holds none.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler
from kfp.dsl.graph_component import GraphComponent

from trackrec.run_config import RunConfig

_MARK = "\n\nThe config of its runs:\n\n"
# Hexadecimal digits of a version's name: enough for a pipeline's versions, few enough to read out.
_DIGITS = 16


def config_text(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def write(pipeline: GraphComponent, config: RunConfig, path: Path) -> None:
    """Compiles `pipeline` to `path`, both documents of its IR, with `config` in the description."""
    described = f"{(pipeline.description or '').strip()}{_MARK}{config_text(config)}"
    pipeline.component_spec.description = described
    pipeline.pipeline_spec.pipeline_info.description = described
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(pipeline, str(path))


def read(path: Path) -> list[dict[str, Any]]:
    """The documents of an IR file: the pipeline, then what it asks of Kubernetes."""
    return list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader))


def version(path: Path) -> str:
    """The name of an IR's version: a hash over all its documents."""
    text = json.dumps(read(path), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def config_in(spec: dict[str, Any]) -> str:
    """The config, as YAML, that travelled in a pipeline's first document.

    Raises:
        LookupError: there is none; another program compiled the pipeline.
    """
    info = spec.get("pipelineInfo", {})
    _, mark, text = str(info.get("description", "")).partition(_MARK)
    if not mark:
        raise LookupError(f"the pipeline {info.get('name')} holds no config of TrackRec's")
    return text


def inline(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """An IR's documents as the API takes them inside a run."""
    if len(documents) == 1:
        return documents[0]
    spec, platforms = documents
    return {"pipeline_spec": spec, "platform_spec": platforms}


def uncached(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with every task's caching off, those of sub-pipelines included; `documents` itself is changed."""
    for component in (documents[0]["root"], *documents[0]["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            task["cachingOptions"] = {}
    return documents
