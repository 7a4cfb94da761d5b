"""The pipeline `release`: compiled, and on this machine on a run of tiny models."""

import json
from pathlib import Path

import pytest

from pipelines import local, release
from pipelines.recording import Artifact, RunRecord, TaskRecord
from tests.pipelines.test_local import trackrec
from tests.stages import export_inputs
from trackrec import config_file, storage
from trackrec.config_file import ConfigError
from trackrec.serving import version

from .conftest import Compiled, compiled

RANKERS = {"items", "ranker_base", "ranker_trackrec"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compiled("quickstart", tmp_path_factory.mktemp("ir"), pipeline="release")


def test_export_then_deploy(whole: Compiled) -> None:
    artifacts = whole.tasks["export"]["inputs"]["artifacts"]
    assert set(artifacts) == {"base_model", "generator", "metrics", "encoder"} | RANKERS
    for name in artifacts:
        assert whole.source("export", name) == f"{name.replace('_', ' ')}/artifact"
    assert whole.source("deploy", "repository") == "export/repository"
    assert whole.executor("export")["container"]["image"].startswith("trackrec/triton:export-")
    assert whole.parameter("export", "domain") == "movies"
    assert whole.parameter("export", "history_length") == 8
    assert whole.parameter("export", "generate")["max_tokens"] == 80
    needed = whole.pipeline["root"]["inputDefinitions"]["parameters"]
    assert {name for name, one in needed.items() if "defaultValue" not in one} == {
        *("run", "run_config", "generator", "metrics"),
        *RANKERS,
    }


def test_without_ranking_there_are_no_rankers(tmp_path: Path) -> None:
    text = Path("pipelines/configs/ml-1m-qwen2.5-7b.yaml").read_text(encoding="utf-8")
    config = tmp_path / "config.yaml"
    config.write_text(text.replace("ranking:\n  by_iteration_of: [din]\n", ""), encoding="utf-8")
    alone = compiled(config, tmp_path, pipeline="release", profile="gke-a100")
    assert not RANKERS & set(alone.tasks["export"]["inputs"]["artifacts"])
    assert not RANKERS & set(alone.pipeline["root"]["inputDefinitions"]["parameters"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, RunRecord]:
    """A root with the record of a run of two iterations, and what `export` reads of it."""
    root = tmp_path_factory.mktemp("runs")
    given = {name: Artifact(uri=str(path), kind="") for name, path in inputs_of(root, tiny_model).items()}
    other = Artifact(uri=str(root / "nothing"), kind="")

    def task(title: str, *, stage: str = "", **parts: object) -> TaskRecord:
        return TaskRecord.model_validate({"title": title, "stage": stage or title.split()[0], "cached": False, **parts})

    tasks = [
        *(
            task(
                f"generate {t}",
                inputs={"base_model": given["base_model"], "generator": given["generator"] if t == 2 else other},
            )
            for t in range(3)
        ),
        task("generate 3, no distillation", inputs={"base_model": other, "generator": other}),
        task("evaluate (iteration 1)", outputs={"metrics": other}),
        task("evaluate (iteration 2)", outputs={"metrics": given["metrics"]}),
        *(
            task(f"train_ctr {title}", outputs={"trained": trained}, inputs={"items": given["items"]})
            for title, trained in {
                "din": other,
                "deepfm": given["ranker_base"],
                "deepfm 1": other,
                "deepfm 2": given["ranker_trackrec"],
                "deepfm 2, shuffled": other,
            }.items()
        ),
        task("encode 2", inputs={"encoder": given["encoder"]}),
    ]
    record = RunRecord(run=export_inputs.RUN, seconds=1, tasks={str(n): task for n, task in enumerate(tasks)})
    folder = root / export_inputs.RUN
    folder.mkdir()
    (folder / local.RECORD).write_text(record.model_dump_json())
    text = Path("pipelines/configs/quickstart.yaml").read_text(encoding="utf-8")
    (folder / local.CONFIG).write_text(text, encoding="utf-8")
    return root, record


def inputs_of(root: Path, tiny_model: Path) -> dict[str, Path]:
    return export_inputs.inputs(root / "inputs", tiny_model)


def test_the_last_iterations_models_are_released(run: tuple[Path, RunRecord]) -> None:
    _, record = run
    path = Path("pipelines/configs/quickstart.yaml")
    own = config_file.load(path)
    found = release.arguments(record, config_file.load(path, {"export.backbone": "deepfm"}), own, "text")
    of = {title: task for task in record.tasks.values() if (title := task.title)}
    assert found == {
        "run": record.run,
        "run_config": "text",
        "base_model": of["generate 2"].inputs["base_model"].uri,
        "generator": of["generate 2"].inputs["generator"].uri,
        "metrics": of["evaluate (iteration 2)"].outputs["metrics"].uri,
        "encoder": of["encode 2"].inputs["encoder"].uri,
        "items": of["train_ctr deepfm"].inputs["items"].uri,
        "ranker_base": of["train_ctr deepfm"].outputs["trained"].uri,
        "ranker_trackrec": of["train_ctr deepfm 2"].outputs["trained"].uri,
    }


def test_a_release_that_contradicts_its_run_is_refused(run: tuple[Path, RunRecord]) -> None:
    _, record = run
    path = Path("pipelines/configs/quickstart.yaml")
    own = config_file.load(path)
    with pytest.raises(ConfigError, match=r"`encode\.pooling` is 'cls', and the run small-.* was made with 'mean'"):
        release.arguments(record, config_file.load(path, {"encode.pooling": "cls"}), own, "")
    with pytest.raises(LookupError, match="no stage or task 'train_ctr dcn'"):
        release.arguments(record, config_file.load(path, {"export.backbone": "dcn"}), own, "")
    less = record.model_copy(update={"tasks": {n: t for n, t in record.tasks.items() if t.stage != "generate"}})
    with pytest.raises(LookupError, match="no stage or task 'generate'"):
        release.arguments(less, own, own, "")


def test_on_this_machine(run: tuple[Path, RunRecord]) -> None:
    """The export alone; `runs/release` is the newest version."""
    root, record = run
    settings = ("export.backbone=deepfm", "generate.max_tokens=80")
    arguments = ("--config", "pipelines/configs/quickstart.yaml", "--pipeline", "release", "--from", record.run)
    done = trackrec(root, "run", *arguments, settings=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    served = root / "release"
    storage.verify(served)
    found = version.read(served)
    assert f"version {found.version} of {record.run}" in done.stdout and "generator answered" in done.stdout
    assert f"trackrec serve --repository {served}" in done.stdout
    assert set(found.models) == {"generator", "encoder", "ranker_base", "ranker_trackrec"}
    assert found.config["name"] == "quickstart"
    first = served.resolve()
    # Again, from the cache.
    assert trackrec(root, "run", *arguments, settings=settings).returncode == 0
    assert served.resolve() == first
    [made] = [json.loads(path.read_text()) for path in sorted(root.glob("*release*/run.json"))[1:]]
    assert [task["cached"] for task in made["tasks"].values() if task["stage"]] == [True]
    done = trackrec(root, "run", *arguments[:4])
    assert done.returncode == 1 and "--from RUN goes with" in " ".join(done.stderr.split())
