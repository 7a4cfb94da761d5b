"""The compiled pipeline: Algorithm 2's wiring, and what each stage's pod asks for."""

from pathlib import Path
from typing import Any

import pytest

from components import images

from .conftest import Compiled, compiled

STAGES_OF_AN_ITERATION = ("sample", "score", "preferences", "sdpo", "generate", "rec_tune")


def stage_of(title: str) -> str:
    return title.split(" ")[0]


def stage_tasks(pipeline: Compiled) -> list[str]:
    return [title for title in pipeline.tasks if title not in ("raw data", "base model", "encoder")]


def test_the_loop_is_unrolled(shipped: tuple[dict[str, Any], Compiled]) -> None:
    raw, pipeline = shipped
    for t in range(1, raw["loop"]["iterations"] + 1):
        assert {f"{stage} {t}" for stage in STAGES_OF_AN_ITERATION} <= set(pipeline.tasks)
        assert f"evaluate (iteration {t})" in pipeline.tasks
    assert "evaluate (iteration 0)" in pipeline.tasks
    assert f"sample {raw['loop']['iterations'] + 1}" not in pipeline.tasks


def test_algorithm_2(ml_1m: Compiled) -> None:
    """G and V are inherited from the previous iteration; each step reads what Algorithms 1 and 2 say."""
    assert ml_1m.source("sft_generator", "recots") == "distill_data/recots"
    generator, validator = "sft_generator/generator", "base model/artifact"
    assert ml_1m.source("generate 0", "generator") == generator
    assert ml_1m.source("evaluate (iteration 0)", "validator") == validator
    for t in (1, 2, 3):
        assert ml_1m.source(f"sample {t}", "generator") == generator
        assert ml_1m.source(f"score {t}", "validator") == validator
        assert ml_1m.source(f"score {t}", "recots") == f"sample {t}/recots"
        assert ml_1m.source(f"preferences {t}", "rewards") == f"score {t}/rewards"
        assert ml_1m.source(f"sdpo {t}", "preferences") == f"preferences {t}/preferences"
        assert ml_1m.source(f"sdpo {t}", "generator") == generator
        generator = f"sdpo {t}/aligned"
        assert ml_1m.source(f"generate {t}", "generator") == generator
        assert ml_1m.source(f"rec_tune {t}", "recots") == f"generate {t}/recots"
        assert ml_1m.source(f"rec_tune {t}", "validator") == validator
        validator = f"rec_tune {t}/tuned"
        assert ml_1m.source(f"evaluate (iteration {t})", "validator") == validator
        assert ml_1m.source(f"evaluate (iteration {t})", "recots") == f"generate {t}/recots"
        assert ml_1m.parameter(f"sample {t}", "iteration") == t


def test_controls(ml_1m: Compiled) -> None:
    """Figure 1's (no RecCoT, zero-shot and tuned), and RecCoTs shuffled between users on the last V and G."""
    zero_shot, tuned = "evaluate (no RecCoT, zero-shot)", "evaluate (no RecCoT, tuned)"
    assert ml_1m.source(zero_shot, "validator") == "base model/artifact"
    # Tuned as V is: as often, on the same draws.
    validator = "base model/artifact"
    for t in (1, 2, 3):
        control = f"rec_tune {t} (no RecCoT)"
        assert ml_1m.source(control, "validator") == validator
        for name in ("iteration", "seed", "settings"):
            assert ml_1m.parameter(control, name) == ml_1m.parameter(f"rec_tune {t}", name)
        assert "recots" not in ml_1m.tasks[control]["inputs"]["artifacts"]
        validator = f"{control}/tuned"
    assert ml_1m.source(tuned, "validator") == validator
    for title in (zero_shot, tuned):
        assert "recots" not in ml_1m.tasks[title]["inputs"]["artifacts"]
    shuffled = "evaluate (RecCoTs shuffled between users)"
    assert ml_1m.source(shuffled, "validator") == "rec_tune 3/tuned"
    assert ml_1m.source(shuffled, "recots") == "generate 3/recots"
    assert ml_1m.parameter(shuffled, "shuffled") is True
    assert ml_1m.parameter("evaluate (iteration 3)", "shuffled") is False


def test_the_report_grows_by_every_evaluation(ml_1m: Compiled) -> None:
    row = "tabulate (RecCoTs shuffled between users)"
    evaluations = set()
    while True:
        evaluations.add(ml_1m.source(row, "metrics"))
        if "previous" not in ml_1m.tasks[row]["inputs"]["artifacts"]:
            break
        row = ml_1m.source(row, "previous").removesuffix("/report")
    assert evaluations == {f"{title}/metrics" for title in ml_1m.tasks if title.startswith("evaluate")}


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("ranking.by_iteration_of=[]", ["valid", "test"]),
        # Figure 5's iteration 0 trains a ranking model on them.
        ("ranking.by_iteration_of=[din]", ["train", "valid", "test"]),
    ],
)
def test_the_first_g_writes_train_texts_where_they_are_read(tmp_path: Path, override: str, first: list[str]) -> None:
    pipeline = compiled("ml-1m-qwen2.5-7b", tmp_path, override)
    splits = [pipeline.parameter(f"generate {t}", "splits") for t in range(4)]
    assert splits == [first] + [["train", "valid", "test"]] * 3


def test_the_untuned_generator_writes_what_the_aligned_one_does(ml_1m: Compiled) -> None:
    """Table 5a: the base model, on the prompts and under the settings of the last G."""
    untuned, last = "generate (untuned)", "generate 3"
    assert ml_1m.source("compare", "untuned") == f"{untuned}/recots"
    assert ml_1m.source(untuned, "generator") == "base model/artifact"
    for name in ("settings", "splits"):
        assert ml_1m.parameter(untuned, name) == ml_1m.parameter(last, name)
    for name in ("examples", "contexts", "base_model"):
        assert ml_1m.source(untuned, name) == ml_1m.source(last, name)
    assert ml_1m.executor(untuned)["container"]["image"] == ml_1m.executor(last)["container"]["image"]


@pytest.mark.parametrize(
    ("overrides", "source"),
    [
        (["loop.untuned=false"], None),
        (["loop.iterations=0"], None),
        # The first G is the base model: it writes for train as well where Figure 5 reads that, or else once more.
        (["loop.distillation=false"], "generate 0/recots"),
        (["loop.distillation=false", "ranking.by_iteration_of=[]"], "generate (untuned)/recots"),
    ],
)
def test_the_untuned_generator_runs_where_it_is_needed(
    tmp_path: Path, overrides: list[str], source: str | None
) -> None:
    pipeline = compiled("quickstart", tmp_path, *overrides)
    assert ("generate (untuned)" in pipeline.tasks) == (source == "generate (untuned)/recots")
    if source is None:
        assert "untuned" not in pipeline.tasks["compare"]["inputs"]["artifacts"]
    else:
        assert pipeline.source("compare", "untuned") == source


@pytest.mark.parametrize("override", ["seed=1", "loop.validator_init=base", "loop.distillation=false"])
def test_what_is_written_is_read(tmp_path: Path, override: str) -> None:
    """Every model and every text; V and the texts of the last iteration by its evaluation."""
    pipeline = compiled("quickstart", tmp_path, override)
    read = {
        pipeline.source(title, name)
        for title in stage_tasks(pipeline)
        for name in pipeline.tasks[title]["inputs"].get("artifacts", {})
    }
    outputs = {"sft_generator": "generator", "sdpo": "aligned", "generate": "recots", "rec_tune": "tuned"}
    written = {f"{t}/{outputs[stage_of(t)]}" for t in stage_tasks(pipeline) if stage_of(t) in outputs}
    assert len(written) > 8 and written <= read


@pytest.mark.parametrize(
    ("override", "changed"),
    [("evaluate.split=valid", {"evaluate"}), ("loop.iterations=2", set()), ("rec_tune.epochs=2", {"rec_tune"})],
)
def test_a_setting_changes_what_its_own_stage_is_given(tmp_path: Path, override: str, changed: set[str]) -> None:
    before, after = (compiled("quickstart", tmp_path, given).tasks for given in ("loop.iterations=3", override))
    of_both = [t for t in after if t in before and "parameters" in after[t].get("inputs", {})]
    different = [t for t in of_both if before[t]["inputs"]["parameters"] != after[t]["inputs"]["parameters"]]
    # The controls' rows carry T, and the check before a run the whole config.
    assert {stage_of(t) for t in different if not t.startswith(("tabulate", "compare", "preflight"))} == changed


@pytest.mark.parametrize(
    ("override", "check"),
    [
        ("loop.validator_init=base", ("rec_tune 3 (no RecCoT)", "validator", "base model/artifact")),
        ("loop.validator_init=base", ("rec_tune 3", "validator", "base model/artifact")),
        ("loop.distillation=false", ("sample 1", "generator", "base model/artifact")),
    ],
)
def test_loop_settings(tmp_path: Path, override: str, check: tuple[str, str, str]) -> None:
    title, artifact, source = check
    assert compiled("quickstart", tmp_path, override).source(title, artifact) == source


def test_without_controls(tmp_path: Path) -> None:
    titles = stage_tasks(compiled("quickstart", tmp_path, "loop.controls=false", "loop.iterations=1"))
    assert sorted(title for title in titles if title.startswith(("evaluate", "rec_tune"))) == [
        "evaluate (iteration 0)",
        "evaluate (iteration 1)",
        "rec_tune 1",
    ]


def test_every_hyperparameter_comes_from_the_config(shipped: tuple[dict[str, Any], Compiled]) -> None:
    raw, pipeline = shipped
    for title in stage_tasks(pipeline):
        stage = stage_of(title)
        if stage in ("preflight", "tabulate", "tabulate_ctr", "compare"):
            continue
        assert "settings" in pipeline.tasks[title]["inputs"]["parameters"], title
        given = pipeline.parameter(title, "settings")
        for key, value in raw.get(stage, {}).items():
            if not isinstance(value, dict):
                assert given[key] == value, f"{title}: {key}"
        if "seed" in pipeline.tasks[title]["inputs"]["parameters"]:
            assert pipeline.parameter(title, "seed") == raw["seed"]


def test_images(shipped: tuple[dict[str, Any], Compiled]) -> None:
    """Every stage runs in the image that `components.images` names, under a tag of its own sources."""
    raw, pipeline = shipped
    registry = raw.get("registry", "trackrec")
    for title in stage_tasks(pipeline):
        stage = stage_of(title)
        image = pipeline.executor(title)["container"]["image"]
        assert image == f"{registry}/{images.IMAGE_OF[stage]}:{stage}-{images.source_hash(stage)}"


def test_resources_can_be_changed_for_one_stage_alone(tmp_path: Path) -> None:
    sample = "resources.sample"
    pipeline = compiled("quickstart", tmp_path, f"{sample}.cache=false", f"{sample}.memory=3Gi", f"{sample}.retries=5")
    assert not pipeline.tasks["sample 1"]["cachingOptions"].get("enableCache", False)
    assert pipeline.executor("sample 1")["container"]["resources"]["resourceMemoryLimit"] == "3Gi"
    assert pipeline.tasks["sample 1"]["retryPolicy"]["maxRetryCount"] == 5
    assert pipeline.tasks["score 1"]["cachingOptions"]["enableCache"] is True


def test_no_secret_in_the_ir(ml_1m: Compiled) -> None:
    """The teacher's key comes from a Kubernetes secret; the IR names it and holds no value."""
    assert ml_1m.platform("distill_data")["secretAsEnv"][0]["secretName"] == "trackrec-teacher"
    assert "env" not in ml_1m.executor("distill_data")["container"]
