"""The compiled ranking part (paper 3.6), the pipeline that runs it alone, and the ablations."""

import re
from pathlib import Path
from typing import get_args

import pytest

from trackrec.config import Backbone

from .conftest import Compiled, compiled

TABLES = {"interactions": "ingest", "items": "ingest", "contexts": "contexts", "examples": "contexts"}


def arms(pipeline: Compiled) -> dict[str, tuple[str, str, str | None]]:
    """Backbone, feature and source of the vectors of each `train_ctr` task, by title."""
    return {
        title: (
            pipeline.parameter(title, "backbone"),
            pipeline.parameter(title, "feature"),
            pipeline.source(title, "vectors") if "vectors" in pipeline.tasks[title]["inputs"]["artifacts"] else None,
        )
        for title in pipeline.tasks
        if title.startswith("train_ctr ")
    }


def chain(pipeline: Compiled) -> list[str]:
    """The tasks that grew the report, newest first."""
    titles = [pipeline.source("compare", "report").removesuffix("/report")]
    while "previous" in pipeline.tasks[titles[-1]]["inputs"]["artifacts"]:
        titles.append(pipeline.source(titles[-1], "previous").removesuffix("/report"))
    return titles


def test_every_backbone_with_and_without_the_last_recots(ml_1m: Compiled) -> None:
    """Table 2; each control (random, shuffled, raw history) beside it; Figure 5 on DIN."""
    expected: dict[str, tuple[str, str, str | None]] = {}
    for backbone in get_args(Backbone):
        expected[f"train_ctr {backbone}"] = (backbone, "none", None)
        expected[f"train_ctr {backbone} 3"] = (backbone, "recot", "encode 3/vectors")
        for control in ("shuffled", "random"):
            expected[f"train_ctr {backbone} 3, {control}"] = (backbone, control, "encode 3/vectors")
        expected[f"train_ctr {backbone} 3, history"] = (backbone, "history", "encode 3 (history)/vectors")
    for t in range(3):
        expected[f"train_ctr din {t}"] = ("din", "recot", f"encode {t}/vectors")
    assert arms(ml_1m) == expected


def test_all_arms_have_one_budget_and_the_same_rows(ml_1m: Compiled) -> None:
    settings = [ml_1m.parameter(title, "settings") for title in arms(ml_1m)]
    assert all(given == settings[0] for given in settings)
    for title in arms(ml_1m):
        assert {name: ml_1m.source(title, name) for name in TABLES} == {
            name: f"{stage}/{name}" for name, stage in TABLES.items()
        }
        assert ml_1m.parameter(title, "seed") == 0


def test_what_is_encoded(ml_1m: Compiled) -> None:
    for t in range(4):
        assert ml_1m.source(f"encode {t}", "recots") == f"generate {t}/recots"
        assert ml_1m.source(f"encode {t}", "encoder") == "encoder/artifact"
        assert ml_1m.parameter(f"encode {t}", "of_history") is False
    assert ml_1m.source("encode 3 (history)", "recots") == "generate 3/recots"
    assert ml_1m.parameter("encode 3 (history)", "of_history") is True


def test_every_result_reaches_the_report(ml_1m: Compiled) -> None:
    read = {
        ml_1m.source(title, name)
        for title in chain(ml_1m)
        for name in ("metrics", "none", "recot", "shuffled", "random", "history")
        if name in ml_1m.tasks[title]["inputs"]["artifacts"]
    }
    assert read == {f"{title}/metrics" for title in ml_1m.tasks if re.match(r"evaluate|train_ctr", title)}
    assert ml_1m.source("compare", "before") == "generate 0/recots"
    assert ml_1m.source("compare", "after") == "generate 3/recots"


def test_without_ranking_the_report_is_of_v_alone(tmp_path: Path) -> None:
    text = Path("pipelines/configs/ml-1m-qwen2.5-7b.yaml").read_text(encoding="utf-8")
    config = tmp_path / "config.yaml"
    config.write_text(text.replace("ranking:\n  by_iteration_of: [din]\n", ""), encoding="utf-8")
    pipeline = compiled(config, tmp_path, profile="gke-a100")
    assert not arms(pipeline)
    assert not any(title.startswith("encode") for title in pipeline.tasks)
    assert "compare" in pipeline.tasks


def test_without_an_iteration_a_text_is_neither_before_nor_after_alignment(tmp_path: Path) -> None:
    pipeline = compiled("ml-1m-smollm2", tmp_path)
    assert "before" not in pipeline.tasks["compare"]["inputs"]["artifacts"]
    assert pipeline.source("compare", "after") == "generate 0/recots"


def test_backbones_alone(tmp_path: Path) -> None:
    """On the tables and texts that its parameters name."""
    pipeline = compiled("quickstart", tmp_path, pipeline="backbones")
    assert pipeline.source("encode 3", "recots") == "recots/artifact"
    assert pipeline.source("train_ctr din 3", "interactions") == "interactions/artifact"
    assert {backbone for backbone, _, _ in arms(pipeline).values()} == set(get_args(Backbone))
    assert not any(re.match(r"ingest|generate|evaluate|sdpo", title) for title in pipeline.tasks)
    parameters = set(pipeline.pipeline["root"]["inputDefinitions"]["parameters"])
    assert {"interactions", "items", "contexts", "examples", "recots", "encoder"} <= parameters


@pytest.fixture(scope="module")
def ablations(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compiled("ml-1m-qwen2.5-7b", tmp_path_factory.mktemp("ir"), pipeline="ablations")


def test_without_alignment_g_stays(ablations: Compiled) -> None:
    """Table 6 is of a single iteration: V is tuned once, on the texts of the distilled G."""
    tuning, evaluation = "rec_tune 1, no alignment", "evaluate (iteration 1), no alignment"
    assert ablations.source(tuning, "recots") == "generate 0/recots"
    assert ablations.source(tuning, "validator") == "base model/artifact"
    for name in ("settings", "seed", "iteration"):
        assert ablations.parameter(tuning, name) == ablations.parameter("rec_tune 1", name)
    assert ablations.source(evaluation, "validator") == f"{tuning}/tuned"
    assert ablations.source(evaluation, "recots") == "generate 0/recots"
    assert ablations.parameter("generate 0", "splits") == ["train", "valid", "test"]
    assert not any(re.match(r"(sdpo|rec_tune 2).*no alignment", title) for title in ablations.tasks)


def test_without_distillation_g_begins_as_the_base_model(ablations: Compiled) -> None:
    assert ablations.source("generate 0, no distillation", "generator") == "base model/artifact"
    assert ablations.source("sample 1, no distillation", "generator") == "base model/artifact"
    assert ablations.source("generate 3, no distillation", "generator") == "sdpo 3, no distillation/aligned"
    assert ablations.source("generate 0", "generator") == "sft_generator/generator"
    assert ablations.source("compare", "untuned") == "generate (untuned)/recots"


def test_the_ablations_rankers(ablations: Compiled) -> None:
    """The paper's DIN: one base, the full loop's first and last texts, and each variant's."""
    assert arms(ablations) == {
        "train_ctr din": ("din", "none", None),
        "train_ctr din 3": ("din", "recot", "encode 3/vectors"),
        "train_ctr din 0, no alignment": ("din", "recot", "encode 0, no alignment/vectors"),
        "train_ctr din 3, no distillation": ("din", "recot", "encode 3, no distillation/vectors"),
        "train_ctr din 1": ("din", "recot", "encode 1/vectors"),
    }
    variants = [ablations.parameter(title, "variant") for title in chain(ablations)]
    assert set(variants) == {"full", "no alignment", "no distillation"}


def test_ablations_share_their_tasks_with_the_whole_pipeline(ablations: Compiled, ml_1m: Compiled) -> None:
    """Same component, image, parameters and sources: the cache key of a run on one machine, whose results are found."""
    shared = [
        title for title in ablations.tasks if title in ml_1m.tasks and not title.startswith(("tabulate", "compare"))
    ]
    assert {"ingest", "contexts", "sft_generator", "sdpo 3", "rec_tune 3", "generate 0", "train_ctr din 3"} <= set(
        shared
    )
    for title in shared:
        one, other = ablations.tasks[title].get("inputs", {}), ml_1m.tasks[title].get("inputs", {})
        assert one.get("parameters") == other.get("parameters"), title
        for name in one.get("artifacts", {}):
            assert ablations.source(title, name) == ml_1m.source(title, name), (title, name)


@pytest.mark.parametrize("pipeline", ["backbones", "ablations"])
@pytest.mark.parametrize("name", ["quickstart", "amazon-book-qwen2.5-7b"])
def test_each_config_compiles_to_each_pipeline(tmp_path: Path, name: str, pipeline: str) -> None:
    assert "compare" in compiled(name, tmp_path, pipeline=pipeline).tasks
