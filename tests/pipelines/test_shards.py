"""Stages cut into shards: the compiled loops over pods, and the same on this machine."""

import io
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import dsl
from kfp.dsl.graph_component import GraphComponent
from rich.console import Console

from components import images
from components.sample.component import sample
from components.score.component import score
from pipelines import local
from pipelines.placement import values
from pipelines.sharding import written
from tests.stages.decoding_inputs import contexts, examples
from trackrec import config_file, storage
from trackrec.data import schema
from trackrec.run_config import RunConfig
from trackrec.stages import sample as sample_stage

from .conftest import Compiled, compiled
from .test_local import QUICKSTART, newest, ran, trackrec
from .test_profiles import EXPECTED, check

SHARDED = {"sample": 4, "score": 3, "generate": 2, "encode": 5}
# What the loops write, and who reads it.
TABLES = {"sample 2": "recots", "score 2": "rewards", "generate 2": "recots", "encode 2": "vectors"}
SHARDS = tuple(f"resources.{stage}.shards={count}" for stage, count in SHARDED.items())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compiled("ml-1m-qwen2.5-7b", tmp_path_factory.mktemp("ir"), *SHARDS)


def inside(pipeline: Compiled, title: str) -> tuple[Compiled, dict[str, Any], str]:
    """A loop's DAG as if it were a pipeline, its outputs, and the title of its one task."""
    loop = pipeline.pipeline["components"][pipeline.tasks[title]["componentRef"]["name"]]
    dag = Compiled(pipeline.pipeline | {"root": loop}, pipeline.platforms)
    [inner] = dag.tasks
    return dag, loop["dag"]["outputs"]["artifacts"], inner


@pytest.mark.parametrize("title", TABLES)
def test_a_loop_starts_a_pod_a_shard_and_gather_joins_what_they_write(sharded: Compiled, title: str) -> None:
    count, table = SHARDED[title.split()[0]], TABLES[title]
    iterator = sharded.tasks[title]["parameterIterator"]
    assert yaml.safe_load(iterator["items"]["raw"]) == list(range(count))
    # All pods at once, as far as the quota goes.
    assert "iteratorPolicy" not in sharded.tasks[title]
    dag, outputs, inner = inside(sharded, title)
    assert inner == f"{title}, one shard"
    assert dag.tasks[inner]["inputs"]["parameters"]["shard"] == {"componentInputParameter": iterator["itemInput"]}
    assert dag.parameter(inner, "shards") == count

    gather = f"gather ({title})"
    [(key, collected)] = outputs.items()
    assert collected["artifactSelectors"][0]["outputArtifactKey"] == table
    assert sharded.source(gather, "parts") == f"{title}/{key}"
    assert sharded.parameter(gather, "table") == table
    assert (
        sharded.executor(gather)["container"]["image"].split("/")[-1] == f"data:gather-{images.source_hash('gather')}"
    )


def test_each_shard_has_the_stages_whole_pod(sharded: Compiled, ml_1m: Compiled) -> None:
    """On both documents: GPU, memory, selectors, tolerations, mounts and cache, as the one pod has them."""
    for title in TABLES:
        dag, _, inner = inside(sharded, title)
        # The component itself is another: one that is told its shard.
        container, whole = dag.executor(inner)["container"], ml_1m.executor(title)["container"]
        assert container["resources"] == whole["resources"]
        assert container["resources"]["accelerator"]["resourceCount"] == "1"
        assert container["image"] == whole["image"]
        assert dag.platform(inner) == ml_1m.platform(title)
        assert dag.platform(inner)["nodeSelector"]["labels"] == {"cloud.google.com/gke-accelerator": "nvidia-a100-80gb"}
        assert dag.platform(inner)["tolerations"] and dag.platform(inner)["pvcMount"]
        assert dag.tasks[inner]["cachingOptions"] == ml_1m.tasks[title]["cachingOptions"]
        asked = ml_1m.tasks[title]["inputs"]["parameters"]
        assert {name: dag.tasks[inner]["inputs"]["parameters"][name] for name in asked} == asked
        check(sharded, f"gather ({title})", "gather", EXPECTED["gke-a100"]["defaults"])


def test_what_follows_reads_the_gathered_tables(sharded: Compiled) -> None:
    for title, artifact, source in (
        ("score 2", "recots", "sample 2"),
        ("preferences 2", "recots", "sample 2"),
        ("preferences 2", "rewards", "score 2"),
        ("tabulate (iteration 2)", "rewards", "score 2"),
        ("rec_tune 2", "recots", "generate 2"),
        ("evaluate (iteration 2)", "recots", "generate 2"),
        ("encode 2", "recots", "generate 2"),
        ("train_ctr din 2", "vectors", "encode 2"),
        ("compare", "after", "generate 3"),
    ):
        if title in TABLES:
            dag, _, inner = inside(sharded, title)
            artifact = dag.tasks[inner]["inputs"]["artifacts"][artifact]["componentInputArtifact"]
        assert sharded.source(title, artifact) == f"gather ({source})/joined"


def test_one_shard_is_no_loop(tmp_path: Path, ml_1m: Compiled) -> None:
    one = compiled("ml-1m-qwen2.5-7b", tmp_path, *(f"resources.{stage}.shards=1" for stage in SHARDED))
    assert one.pipeline["root"] == ml_1m.pipeline["root"]
    assert not any("parameterIterator" in task for task in one.tasks.values())
    assert not any(title.startswith("gather") for title in one.tasks)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"resources.sample.shards": 0}, r"resources\.sample\.shards.*greater than or equal to 1"),
        ({"resources.sdpo.shards": 2}, r"resources\.sdpo\.shards: unknown key"),
        (
            {"resources.score.shards": 3, "resources.score.accelerator.count": 4},
            r"`resources\.score`: 3 shards × 4 GPUs are 12, and a shard works on 1 of its own; set "
            r"`accelerator\.count: 1`",
        ),
        (
            {"resources.encode.shards": 2, "resources.encode.accelerator.count": 2},
            r"`resources\.encode`: 2 shards × 2 GPUs are 4, and a shard works on 1",
        ),
    ],
)
def test_shards_that_make_no_sense_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(config_file.ConfigError, match=message):
        config_file.load(Path("pipelines/configs/ml-1m-qwen2.5-7b.yaml"), overrides, profile="gke-a100")


def test_a_shard_may_hold_a_model_that_needs_several_gpus() -> None:
    pod = "resources.sample.accelerator.count"
    overrides = {"resources.sample.shards": 3, pod: 4, "sample.engine.tensor_parallel_size": 4}
    loaded = config_file.load(Path("pipelines/configs/ml-1m-qwen2.5-7b.yaml"), overrides, profile="gke-a100")
    assert loaded.resources.sample.shards == 3


# --- on this machine --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config() -> RunConfig:
    small = {"sample.n": 2, "sample.max_tokens": 8, "sample.max_contexts": 3}
    return config_file.load(Path(QUICKSTART), small | {f"resources.{stage}.shards": 2 for stage in SHARDED})


def built(config: RunConfig, root: Path, model: Path) -> GraphComponent:
    """Sampling and scoring of the tests' own contexts, as the loop has them."""

    @dsl.pipeline(name="shards")
    def shards() -> None:
        base = dsl.importer(artifact_uri=str(model), artifact_class=dsl.Model).output
        shown = dsl.importer(artifact_uri=str(root / "contexts"), artifact_class=dsl.Dataset).output
        asked = dsl.importer(artifact_uri=str(root / "examples"), artifact_class=dsl.Dataset).output
        sampling = partial(
            sample,
            settings=values(config.sample),
            seed=config.seed,
            iteration=1,
            contexts=shown,
            base_model=base,
            generator=base,
        )
        recots = written("sample", config, "sample 1", sampling)
        scoring = partial(
            score,
            settings=values(config.score),
            examples=asked,
            contexts=shown,
            recots=recots,
            base_model=base,
            validator=base,
        )
        written("score", config, "score 1", scoring)

    return shards


def execute(config: RunConfig, root: Path, model: Path) -> tuple[local.RunRecord, str]:
    said = io.StringIO()
    record = local.execute(
        built(config, root, model),
        yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)),
        root=root / "runs",
        arguments={},
        caching=True,
        console=Console(file=said, width=200),
    )
    return record, said.getvalue()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    contexts(root / "contexts")
    examples(root / "examples")
    return root


@pytest.fixture(scope="module")
def done(config: RunConfig, inputs: Path, tiny_model: Path) -> tuple[local.RunRecord, str]:
    return execute(config, inputs, tiny_model)


def test_the_record_has_one_task_a_stage_with_its_parts(
    done: tuple[local.RunRecord, str], config: RunConfig, inputs: Path, tiny_model: Path
) -> None:
    record, said = done
    tasks = {task.title: task for task in record.tasks.values() if task.stage}
    assert list(tasks) == ["sample 1", "score 1"]
    for task in tasks.values():
        assert not task.cached and len(task.parts) == 2
        for part in task.parts:
            assert not part.cached and storage.read_manifest(Path(part.uri)).facts["shards"] == 2
    assert tasks["sample 1"].parameters == {"settings": values(config.sample), "seed": config.seed, "iteration": 1}
    assert tasks["score 1"].inputs["recots"].uri == tasks["sample 1"].outputs["recots"].uri
    assert tasks["sample 1"].outputs["recots"].metadata["recots"] == 6
    assert len(schema.rows(Path(tasks["score 1"].outputs["rewards"].uri), "rewards")) == 6
    assert said.count("✔ sample 1, one shard") == 2 and said.count("✔ gather (score 1)") == 1

    sample_stage.run(
        config.sample,
        contexts=inputs / "contexts",
        base_model=tiny_model,
        generator=tiny_model,
        recots=inputs / "one pod",
        seed=config.seed,
        iteration=1,
    )
    gathered = Path(tasks["sample 1"].outputs["recots"].uri)
    assert storage.content_hash(gathered) == storage.content_hash(inputs / "one pod")


def test_a_second_run_takes_every_shard_from_the_cache(
    done: tuple[local.RunRecord, str], config: RunConfig, inputs: Path, tiny_model: Path
) -> None:
    again, _ = execute(config, inputs, tiny_model)
    for task in again.tasks.values():
        if task.stage:
            assert task.cached and [part.cached for part in task.parts] == [True, True]


def test_a_sharded_stage_is_run_again_alone(done: tuple[local.RunRecord, str], inputs: Path) -> None:
    record, _ = done
    again = trackrec(inputs / "runs", "stage", "sample 1", "--run-id", record.run, settings=("sample.n=3",))
    assert again.returncode == 0, again.stdout + again.stderr
    [task] = [task for task in newest(inputs / "runs").tasks.values() if task.stage]
    assert task.title == "sample 1" and len(task.parts) == 2
    assert task.outputs["recots"].uri in again.stdout
    assert len(schema.rows(Path(task.outputs["recots"].uri), "recots")) == 3 * 3


def test_a_failing_shard_ends_the_run_before_the_next_one(config: RunConfig, inputs: Path, tiny_model: Path) -> None:
    longer = config.model_copy(update={"sample": config.sample.model_copy(update={"max_tokens": 4096})})
    with pytest.raises(local.RunFailed, match=r"^sample 1, one shard failed: .*PromptTooLongError") as failed:
        execute(longer, inputs, tiny_model)
    log = re.search(r"The whole log is (\S+)\.", str(failed.value))
    assert log and Path(log[1]).read_text().count("Executing task 'sample'") == 1


def test_a_run_with_shards_is_reported_and_explained(tmp_path: Path, tiny_model: Path) -> None:
    settings = (
        "loop.iterations=0",
        "loop.distillation=false",
        "loop.controls=false",
        "ranking=null",
        "contexts.max_train_contexts=2",
        "contexts.max_test_contexts=2",
        "contexts.max_examples_per_context=1",
        "generate.max_tokens=8",
        "resources.generate.shards=2",
        f"base_model={tiny_model}",
    )
    run = trackrec(tmp_path, "run", "--config", QUICKSTART, settings=settings)
    assert run.returncode == 0, run.stdout + run.stderr
    record = newest(tmp_path)
    tasks = {task.title: task for task in record.tasks.values()}
    assert {"generate 0", "evaluate (iteration 0)"} <= ran(record) and len(tasks["generate 0"].parts) == 2
    report = trackrec(tmp_path, "report", "--run", record.run)
    assert report.returncode == 0 and tasks["generate 0"].outputs["recots"].uri in report.stdout
    judged = schema.rows(Path(tasks["contexts"].outputs["examples"].uri), "examples")
    user = next(row["user_id"] for row in judged if row["split"] == "test")
    explained = trackrec(tmp_path, "explain", "--run", record.run, "--user", user)
    assert explained.returncode == 0 and "RecCoT of iteration 0" in explained.stdout, explained.stderr
