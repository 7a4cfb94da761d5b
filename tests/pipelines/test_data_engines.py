"""How the section `data` reaches the stages, and a log that stays where it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler
from kfp.dsl.graph_component import GraphComponent

from pipelines import batch_features, cli, trackrec
from trackrec.run_config import RunConfig

SPARK = {"engine": "spark", "spark": {"remote": "sc://spark:15002", "scratch": "gs://shop/scratch"}}
BIGQUERY = {"engine": "bigquery", "bigquery": {"project": "p", "dataset": "d"}}


def config(raw_data: str, data: dict[str, Any]) -> RunConfig:
    log = {"label": "clicked", "valid_from": "2025-05-01", "test_from": "2025-06-01"}
    return RunConfig.model_validate(
        {
            "name": "shop",
            "raw_data": raw_data,
            "raw_data_version": "2026-01-01",
            "base_model": "gs://shop/model",
            "ingest": {"dataset": "impressions", "log": log},
            "contexts": {"domain": "generic"},
            "loop": {"iterations": 0, "distillation": False},
            "data": data,
        }
    )


def tasks(
    loaded: RunConfig, folder: Path, build: Callable[[RunConfig], GraphComponent] = trackrec.build
) -> dict[str, Any]:
    compiler.Compiler().compile(build(loaded), str(folder / "ir.yaml"))
    ir = next(yaml.safe_load_all((folder / "ir.yaml").read_text(encoding="utf-8")))
    found: dict[str, Any] = ir["root"]["dag"]["tasks"]
    return {task["taskInfo"]["name"]: task for task in found.values()}


@pytest.mark.parametrize(("raw_data", "data"), [("gs://shop/raw", SPARK), ("bq://p.web", BIGQUERY)])
def test_a_log_that_the_engine_reads_is_no_artifact(tmp_path: Path, raw_data: str, data: dict[str, Any]) -> None:
    loaded = config(raw_data, data)
    found = tasks(loaded, tmp_path)
    assert "raw data" not in found
    inputs = found["ingest"]["inputs"]
    assert inputs["parameters"]["raw_uri"] == {"componentInputParameter": "raw_data"}
    # A new version of what lies there is a new key of the cache.
    assert inputs["parameters"]["raw_version"] == {"runtimeValue": {"constant": "2026-01-01"}}
    assert "artifacts" not in inputs and found["ingest"]["dependentTasks"] == ["preflight"]
    # Nor does the command line look for it on this machine.
    assert cli.local_inputs(loaded, ["raw_data"]) == ({}, {})


@pytest.mark.parametrize(("raw_data", "data"), [("gs://shop/raw", SPARK), ("bq://p.web", BIGQUERY)])
def test_the_batch_jobs_engine_reads_each_days_log_anew(tmp_path: Path, raw_data: str, data: dict[str, Any]) -> None:
    given = config(raw_data, data).model_dump(mode="json", exclude_none=True)
    loaded = RunConfig.model_validate(given | {"features": {"out": "gs://shop/features"}})
    found = tasks(loaded, tmp_path, batch_features.build)
    assert "raw data" not in found
    parameters = found["ingest"]["inputs"]["parameters"]
    assert parameters["raw_uri"] == {"componentInputParameter": "raw_data"}
    assert parameters["raw_version"] == {"componentInputParameter": "dt"}
    engine = found["active_users"]["inputs"]["parameters"]["data"]["runtimeValue"]["constant"]["engine"]
    assert engine == loaded.data.engine


def test_any_other_raw_data_is_an_artifact_of_ingest(tmp_path: Path) -> None:
    found = tasks(config("gs://shop/raw", {"memory_limit": "32Gi"}), tmp_path)
    assert found["raw data"]["dependentTasks"] == ["preflight"]
    inputs = found["ingest"]["inputs"]
    assert inputs["artifacts"]["raw"]["taskOutputArtifact"]["producerTask"] == "importer-2"
    assert "raw_uri" not in inputs["parameters"]
    for stage in ("ingest", "contexts"):
        data = found[stage]["inputs"]["parameters"]["data"]["runtimeValue"]["constant"]
        assert (data["engine"], data["memory_limit"]) == ("duckdb", "32Gi")
