"""The batch feature job as a pipeline: its IR, and on this machine against a real server whose models cost nothing."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from components import images
from pipelines import batch_features
from pipelines.local import RunRecord
from tests.serving import fakes
from trackrec import config_file, storage
from trackrec.data import schema
from trackrec.features.partition import Place, read_manifest
from trackrec.features.partition import newest as newest_day
from trackrec.serving import server

from .conftest import Compiled, compiled
from .test_local import QUICKSTART, newest, ran, trackrec
from .test_shards import inside

GATHER = "gather (features)"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("ir")
    wanted = ("resources.features.shards=4", "resources.features.cache=true", "resources.commit_features.cache=true")
    longer = "train_ctr.history_length=15"
    return compiled("ml-1m-qwen2.5-7b", folder, *wanted, longer, pipeline="batch_features")


def of_pipeline(name: str) -> dict[str, str]:
    return {"componentInputParameter": name}


def test_the_log_the_server_the_place_and_the_day_are_parameters(sharded: Compiled) -> None:
    assert sharded.pipeline["root"]["inputDefinitions"]["parameters"] == {
        "raw_data": {"parameterType": "STRING", "isOptional": True, "defaultValue": "gs://YOUR-BUCKET/raw/ml-1m.zip"},
        "triton": {"parameterType": "STRING", "isOptional": True, "defaultValue": "trackrec-triton:8001"},
        "out": {"parameterType": "STRING", "isOptional": True, "defaultValue": "gs://YOUR-BUCKET/features"},
        "dt": {"parameterType": "STRING", "isOptional": True, "defaultValue": ""},
    }
    given = {title: sharded.tasks[title]["inputs"]["parameters"] for title in ("ingest", "active_users")}
    # A day's log is another log, and so are its users: both come from the cache for one day only.
    assert given["ingest"]["raw_version"] == given["active_users"]["as_of"] == of_pipeline("dt")
    checked = sharded.tasks["preflight"]["inputs"]["parameters"]
    assert {name: checked[name] for name in ("raw_data", "triton", "out")} == {
        name: of_pipeline(name) for name in ("raw_data", "triton", "out")
    }
    assert sharded.tasks["commit_features"]["inputs"]["parameters"]["out"] == of_pipeline("out")
    # Not in the settings as well, where another one could stand.
    assert "out" not in sharded.parameter("commit_features", "settings")


def test_histories_are_of_the_contexts_kind_and_as_long_as_any_model_reads(sharded: Compiled) -> None:
    config = config_file.load(Path("pipelines/configs/ml-1m-qwen2.5-7b.yaml"), profile="gke-a100")
    assert sharded.parameter("active_users", "domain") == config.contexts.domain
    # More than the ten of a prompt, which takes the newest.
    assert config.contexts.history_length == 10
    assert sharded.parameter("active_users", "history_length") == 15


def test_pods_share_the_users_and_the_commit_waits_for_all(sharded: Compiled) -> None:
    assert yaml.safe_load(sharded.tasks["features"]["parameterIterator"]["items"]["raw"]) == [0, 1, 2, 3]
    dag, outputs, inner = inside(sharded, "features")
    assert dag.parameter(inner, "shards") == 4
    [collected] = outputs.values()
    assert collected["artifactSelectors"][0]["outputArtifactKey"] == "feature_shards"
    assert sharded.source("commit_features", "feature_shards") == f"{GATHER}/joined"
    assert sharded.source("commit_features", "users") == "active_users/users"
    assert dag.platform(inner)["podMetadata"]["labels"]["trackrec/stage"] == "features"
    # The GPUs are the server's; what a killed pod goes on from outlives it.
    container = dag.executor(inner)["container"]
    assert "accelerator" not in container["resources"]
    assert [mount["constant"] for mount in dag.platform(inner)["pvcMount"]] == ["trackrec-work"]
    assert container["image"].endswith(f"data:features-{images.source_hash('features')}")


def test_what_writes_outside_of_the_run_is_never_cached(sharded: Compiled) -> None:
    dag, _, inner = inside(sharded, "features")
    cached = {
        title: task["cachingOptions"].get("enableCache", False)
        for title, task in sharded.tasks.items()
        if "cachingOptions" in task and title != "raw data"
    }
    assert cached == {
        "preflight": False,
        "ingest": True,
        "active_users": True,
        GATHER: False,
        "commit_features": False,
    }
    assert dag.tasks[inner]["cachingOptions"] == {}


def test_without_a_place_for_the_features_there_is_no_such_pipeline() -> None:
    loaded = config_file.load(Path(QUICKSTART), {"features.out": None})
    with pytest.raises(ValueError, match=r"needs `features\.out`: gs://BUCKET/PATH or a folder"):
        batch_features.build(loaded)


# --- on this machine --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("triton")
    with server.running(fakes.repository(folder / "repository"), folder / "log") as running:
        yield running.grpc


def job(root: Path, triton: str, *settings: str, fails: bool = False) -> str:
    wanted = (
        f"features.triton={triton}",
        f"features.out={root / 'features'}",
        "features.shard_users=8",
        "resources.features.shards=2",
        *settings,
    )
    done = trackrec(root, "run", "--config", QUICKSTART, "--pipeline", "batch_features", settings=wanted)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def first(triton: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, RunRecord]:
    root = tmp_path_factory.mktemp("runs")
    return root, job(root, triton), newest(root)


def test_a_run_ends_with_a_committed_day(first: tuple[Path, str, RunRecord]) -> None:
    root, said, record = first
    out = Place(str(root / "features"))
    # MovieLens-100k ends on April 22nd.
    assert newest_day(out) == "1998-04-23"
    manifest = read_manifest(out, "1998-04-23")
    assert manifest is not None and manifest.rows == 32 and manifest.status["ok"] == 32
    assert "32 users: 32 ok; 0 copied, 32 generated" in said
    assert f"The features: {out}/dt=1998-04-23" in " ".join(said.split())
    tasks = {task.title: task for task in record.tasks.values() if task.stage}
    assert list(tasks) == ["preflight", "ingest", "active_users", "features", "commit_features"]
    assert len(tasks["features"].parts) == 2
    users = Path(tasks["active_users"].outputs["users"].uri)
    assert manifest.identity.users == storage.content_hash(users)
    assert tasks["commit_features"].outputs["committed"].metadata["place"] == f"{out}/dt=1998-04-23"
    shards = Path(tasks["features"].outputs["feature_shards"].uri)
    assert [row["rows"] for row in schema.rows(shards, "feature_shards")] == [16, 16]


def test_the_same_day_again_finds_all_there(first: tuple[Path, str, RunRecord], triton: str) -> None:
    root, _, _ = first
    before = read_manifest(Place(str(root / "features")), "1998-04-23")
    job(root, triton)
    assert ran(newest(root)) == {"features", "commit_features"}
    [task] = newest(root).of_stage("features").values()
    facts = storage.read_manifest(Path(task.outputs["feature_shards"].uri)).facts
    assert (facts["there"], facts["generated"]) == (4, 0)
    assert read_manifest(Place(str(root / "features")), "1998-04-23") == before


def test_another_day_copies_what_did_not_change(first: tuple[Path, str, RunRecord], triton: str) -> None:
    root, _, _ = first
    said = job(root, triton, "active_users.as_of=1998-04-24")
    assert {"ingest", "active_users", "features", "commit_features"} >= ran(newest(root)) >= {"active_users"}
    found = re.search(r"32 users: 32 ok; (\d+) copied, (\d+) generated", said)
    # The log has nothing after the first day: only who is active can have changed.
    assert found and int(found[1]) > 25 and int(found[1]) + int(found[2]) == 32


def test_one_stage_again_with_another_place(first: tuple[Path, str, RunRecord]) -> None:
    root, _, record = first
    done = trackrec(root, "stage", "features", "--run-id", record.run, settings=(f"features.out={root / 'elsewhere'}",))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((root / "elsewhere").glob("dt=1998-04-23/shard=*/part.parquet"))) == 4
    assert newest_day(Place(str(root / "elsewhere"))) is None


def test_without_a_server_nothing_begins(tmp_path: Path) -> None:
    said = " ".join(job(tmp_path, "127.0.0.1:9", fails=True).split())
    assert "preflight failed" in said and "Triton at 127.0.0.1:9 does not answer" in said
    assert not list(tmp_path.glob("artifacts/*/ingest")) and not (tmp_path / "features").exists()
