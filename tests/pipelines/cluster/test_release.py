"""A finished run's models as a run of the pipeline `release` on the cluster."""

import yaml

from tests.pipelines.cluster.conftest import BUCKET, Run, run_in
from tests.pipelines.cluster.server import KfpServer

VERSIONS = ("--set", "deploy.versions=gs://bucket/versions")


def test_a_clusters_run_is_released_with_its_own_artifacts(server: KfpServer, trackrec: Run, config: str) -> None:
    whole = run_in(trackrec("submit", "--config", config, "--set", "sample.n=3"))
    server.work(whole)
    submitted = trackrec("submit", "--config", config, "--pipeline", "release", "--from", whole, *VERSIONS)
    run = server.runs[run_in(submitted)]
    assert run.runtime_config is not None
    given = dict(run.runtime_config.parameters)
    # The settings that the run had, not the release's.
    assert yaml.safe_load(given.pop("run_config"))["sample"]["n"] == 3
    written = f"gs://bucket/v2/{whole}"
    assert given == {
        "run": whole,
        "base_model": BUCKET["base_model"],
        "encoder": BUCKET["encoder"],
        "generator": f"{written}/sdpo/aligned",
        "metrics": f"{written}/evaluate-2/metrics",
        "items": f"{written}/ingest/items",
        "ranker_base": f"{written}/train-ctr/trained",
        "ranker_trackrec": f"{written}/train-ctr-2/trained",
    }
    spec = server.spec(run)
    tasks = spec["root"]["dag"]["tasks"]
    assert tasks["deploy"]["inputs"]["artifacts"]["repository"]["taskOutputArtifact"]["producerTask"] == "export"
    assert not tasks["deploy"]["cachingOptions"].get("enableCache", False)


def test_what_cannot_be_released_is_told_before_anything_is_uploaded(
    server: KfpServer, trackrec: Run, config: str
) -> None:
    whole = run_in(trackrec("submit", "--config", config))
    release = ("submit", "--config", config, "--pipeline", "release", "--from", whole)
    assert "`deploy.versions` is not set" in trackrec(*release, fails=True)
    failed = run_in(trackrec("submit", "--config", config))
    server.work(failed, until="sdpo 1")
    assert f"the run {failed} is FAILED" in trackrec(*release[:-1], failed, *VERSIONS, fails=True)
    server.work(whole)
    changed = ("--set", "generate.max_tokens=11")
    told = " ".join(trackrec(*release, *VERSIONS, *changed, fails=True).split())
    assert f"`generate.max_tokens` is 11, and the run {whole} was made with 80" in told
    assert "--from RUN goes with" in trackrec("submit", "--config", config, "--from", whole, fails=True)
    assert len(server.versions) == 1
