"""The typed settings: what is refused, and how it is said."""

import math
import re
import types
import typing
from datetime import date
from pathlib import Path

import pytest
import yaml

from trackrec import config, config_file, run_config
from trackrec.config import Settings
from trackrec.config_file import ConfigError
from trackrec.ctr.backbones import BACKBONES
from trackrec.prompts import render
from trackrec.run_config import RankingSettings, RunConfig, Toleration
from trackrec.serving_config import ExperimentSettings

CONFIGS = sorted(Path("pipelines/configs").glob("*.yaml"))
PAPER = Path("pipelines/configs/ml-1m-qwen2.5-7b.yaml")
MINIMAL = {
    "name": "small",
    "raw_data": "raw",
    "base_model": "model",
    "ingest": {"dataset": "ml-1m"},
    "contexts": {"domain": "movies"},
    "distill_data": {"teacher": {"kind": "recorded"}},
}
BIGQUERY = {"engine": "bigquery", "bigquery": {"project": "p", "dataset": "d"}}


def shipped(path: Path) -> RunConfig:
    """The paper's settings need a profile with GPUs."""
    return config_file.load(path, profile="gke-a100" if "7b" in path.stem else None)


def written(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
    return path


def spark(**settings: object) -> dict[str, object]:
    return {"data": {"engine": "spark", "spark": settings}}


def impressions(domain: str, **log: object) -> dict[str, object]:
    """The changes that make a run one on an impression log."""
    dates = {"valid_from": date(2025, 5, 1), "test_from": "2025-06-01"}
    return {"ingest": {"dataset": "impressions", "log": {**dates, **log}}, "contexts": {"domain": domain}}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path) -> None:
    loaded = shipped(path)
    # The paper's T; the one that is of the backbones alone trains no G.
    assert loaded.loop.iterations == (0 if path.stem == "ml-1m-smollm2" else 3)
    assert loaded.ranking is not None


def test_the_papers_settings() -> None:
    """Section 4.1.4: N=10, t=1, top_p=.9, T=3, learning rate 1e-5; section 3.5: about 5 % for distillation."""
    loaded = shipped(PAPER)
    assert (loaded.sample.n, loaded.sample.temperature, loaded.sample.top_p) == (10, 1.0, 0.9)
    assert loaded.loop.iterations == 3 and loaded.loop.validator_init == "previous"
    assert loaded.sdpo.learning_rate == loaded.rec_tune.learning_rate == loaded.sft_generator.learning_rate == 1e-5
    assert loaded.sdpo.beta == 0.1 and loaded.sdpo.lora is None
    assert loaded.distill_data is not None and loaded.distill_data.share == 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampel": {}}, r"sampel: unknown key; allowed here: .*\bsample\b"),
        ({"sample": {"m": 4}}, r"sample\.m: unknown key; allowed here: .*\bn\b.*\btop_p\b"),
        ({"sample": {"n": "many"}}, r"sample\.n: .*integer.*'many'"),
        ({"sample": {"n": 1}}, r"sample\.n: .*greater than or equal to 2"),
        ({"contexts": {"domain": "films"}}, r"contexts\.domain: .*'movies', 'books' or 'generic'.*'films'"),
        ({"sdpo": {"batch_size": 6, "micro_batch_size": 4}}, r"sdpo: `batch_size` \(6\) must be a multiple"),
        ({"contexts": {"domain": "movies", "min_history": 11}}, r"contexts: `min_history` \(11\) is more than"),
        ({"distill_data": None}, r"needs `distill_data`"),
        (
            {"sdpo": {"batch_size": 6}, "resources": {"sdpo": {"accelerator": {"count": 4}}}},
            r"`sdpo\.batch_size` \(6\) must be a multiple of `sdpo\.micro_batch_size` \(1\) × .* \(4 processes\)",
        ),
        (
            {
                "resources": {
                    stage: {"secrets": [{"secret": f"of-{stage}", "key": "key", "env": "TOKEN"}]}
                    for stage in ("ingest", "sample")
                }
            },
            r"resources: `sample\.secrets` gives TOKEN another secret",
        ),
        ({"sdpo": {"lora": {"r": 8}}}, r"`sdpo\.lora` goes on with the adapter of `sft_generator`"),
        ({"sdpo": {"lora": {"r": 8}}, "sft_generator": {"lora": {"r": 16}}}, r"give both the same `lora`"),
        (
            {"sdpo": {"deepspeed": "zero3"}},
            r"`sdpo\.deepspeed` needs GPUs: name a profile .*or set `resources\.sdpo\.acc",
        ),
        (
            {"sample": {"engine": {"kind": "vllm", "tensor_parallel_size": 2}}},
            r"tensor_parallel_size` is 2.*gives 0 GPUs",
        ),
        ({"ingest": {"dataset": "impressions"}}, r"ingest: `log` goes with `dataset: impressions`"),
        ({"resources": {"sampel": {}}}, r"resources\.sampel: unknown key; allowed here: .*\bsample\b"),
        ({"resources": {"sample": {"memory": "lots"}}}, r"resources\.sample\.memory: .*'lots'"),
        (
            {"resources": {"sample": {"tolerations": [{"key": "a", "value": "b"}]}}},
            r"resources\.sample\.tolerations\.0: `value` goes with `operator: Equal`",
        ),
        ({"distill_data": {"teacher": {"kind": "openai", "model": "m"}}}, r"max_cost_usd: Field required"),
        (
            {"distill_data": {"teacher": {"kind": "recorded", "pth": "x"}}},
            r"pth: unknown key; allowed here: kind, min_matches, path",
        ),
        # A wrong type, though it could be converted.
        ({"loop": {"iterations": True}}, r"loop\.iterations: .*valid integer \(got True\)"),
        ({"loop": {"controls": "yes"}}, r"loop\.controls: .*valid boolean \(got 'yes'\)"),
        ({"sample": {"n": "4"}}, r"sample\.n: .*valid integer \(got '4'\)"),
        ({"sample": {"n": 4.0}}, r"sample\.n: .*valid integer \(got 4\.0\)"),
        ({"sdpo": {"learning_rate": "0.1"}}, r"sdpo\.learning_rate: .*valid number \(got '0\.1'\)"),
        ({"sdpo": {"learning_rate": True}}, r"sdpo\.learning_rate: .*valid number \(got True\)"),
        ({"raw_data_version": True}, r"raw_data_version: .*valid string \(got True\)"),
        # A value that no run could mean.
        ({"sdpo": {"learning_rate": math.inf}}, r"sdpo\.learning_rate: .*finite number \(got inf\)"),
        ({"sdpo": {"learning_rate": math.nan}}, r"sdpo\.learning_rate: .*finite number \(got nan\)"),
        ({"sdpo": {"holdout": 1.0}}, r"sdpo\.holdout: .*less than 1 \(got 1\.0\)"),
        ({"preferences": {"tolerance": 1.5}}, r"preferences\.tolerance: .*less than 1 \(got 1\.5\)"),
        ({"score": {"engine": {"kind": "vllm", "max_model_len": 16}}}, r"engine\.max_model_len: .*64 \(got 16\)"),
        ({"data": {"memory_limit": "500m"}}, r"data\.memory_limit: .*\(got '500m'\)"),
        ({"data": {"memory_limit": "0Gi"}}, r"data\.memory_limit: .*\(got '0Gi'\)"),
        ({"resources": {"sample": {"memory": "500m"}}}, r"resources\.sample\.memory: .*\(got '500m'\)"),
        ({"resources": {"sample": {"cpu": "32Gi"}}}, r"resources\.sample\.cpu: .*\(got '32Gi'\)"),
        ({"resources": {"sample": {"shm": "0.5"}}}, r"resources\.sample\.shm: .*\(got '0\.5'\)"),
        ({"raw_data": ""}, r"raw_data: .*at least 1 character"),
        ({"base_model": ""}, r"base_model: .*at least 1 character"),
        # Settings that do not go together.
        (spark(remote="sc://host", application={}, scratch="gs://b"), r"data\.spark: `remote` names .*one of them"),
        (spark(remote="sc://host"), r"data\.spark: `scratch`, a folder that both see, goes with `remote`"),
        (spark(scratch="gs://b"), r"data\.spark: `scratch`, a folder that both see, goes with `remote`"),
        (spark(remote="sc://host/;token=abc", scratch="gs://b"), r"data\.spark\.remote: .*SPARK_CONNECT_TOKEN"),
        ({"data": {"spark": {"remote": "sc://host", "scratch": "/x"}}}, r"data: `spark` goes with `engine: spark`"),
        ({"data": {"engine": "bigquery"}}, r"data: `bigquery` goes with `engine: bigquery`"),
        ({"raw_data": "bq://p.d"}, r"`raw_data` is in BigQuery; set `data\.engine: bigquery`"),
        ({"raw_data": "bq://p.d", "data": BIGQUERY}, r"goes with `dataset: impressions`, not 'ml-1m'"),
        ({"sample": {"engine": {"max_model_len": 4096}}}, r"sample\.engine: `max_model_len` is vLLM's;.*`kind: vllm`"),
        ({"score": {"engine": {"gpu_memory_utilization": 0.5}}}, r"score\.engine: `gpu_memory_utilization` is vLLM's"),
        ({"score": {"engine": {"tensor_parallel_size": 2}}}, r"score\.engine: `tensor_parallel_size` is vLLM's"),
        (impressions("generic", label="clicked", rating="stars", liked_from=4), r"log: `label` and `liked_from`"),
        (impressions("generic", rating="stars"), r"ingest\.log: give `label`, or both `rating` and `liked_from`"),
        (impressions("movies", label="clicked"), r"domain: movies` shows ratings, and `ingest\.log\.rating`"),
        (impressions("movies", rating="stars", liked_from=3), r"above 3 means like, but `impressions` likes from 3 on"),
        (impressions("books", rating="stars", liked_from=4), r"above 4 means like, but .* from 4 on; .*generic`"),
        ({"contexts": {"domain": "books"}}, r"domain: books` .* above 4 means like, but `ml-1m` likes from 4 on"),
        ({"ingest": {"dataset": "amazon-book"}}, r"above 3 means like, but `amazon-book` likes from 5 on; .*generic`"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_file.load(written(tmp_path, **changes))


def test_overrides_replace_single_settings(tmp_path: Path) -> None:
    key, value = config_file.parse_override("sample.n=4")
    loaded = config_file.load(written(tmp_path, sample={"n": 8, "top_p": 0.5}), {key: value})
    assert (loaded.sample.n, loaded.sample.top_p) == (4, 0.5)
    with pytest.raises(ConfigError, match="write KEY=VALUE"):
        config_file.parse_override("sample.n")
    with pytest.raises(ConfigError, match="name is a value, not a section"):
        config_file.load(written(tmp_path), {"name.x": 1})


@pytest.mark.parametrize(
    "changes",
    [
        {"contexts": {"domain": "generic"}},
        {"ingest": {"dataset": "amazon-book"}, "contexts": {"domain": "books"}},
        {"ingest": {"dataset": "amazon-book"}, "contexts": {"domain": "generic"}},
        impressions("generic", label="clicked"),
        impressions("generic", rating="stars", liked_from=2),
        impressions("movies", label="clicked", rating="stars"),
        impressions("movies", rating="stars", liked_from=3.5),
        impressions("books", rating="stars", liked_from=5),
    ],
)
def test_prompts_that_tell_what_is_liked(tmp_path: Path, changes: dict[str, object]) -> None:
    config_file.load(written(tmp_path, **changes))


def test_a_file_is_read_strictly_and_yet_as_it_is_written(tmp_path: Path) -> None:
    """Whole numbers for floats, exponents without a dot, and dates without quotes are no wrong types."""
    changes = impressions("movies", rating="stars", liked_from=4, item_attributes=["genre"])
    path = written(tmp_path, **changes, distill_data={"teacher": {"kind": "recorded"}, "share": 1})
    for text in ("1E-5", "1.0e-5", "1e-05", ".1e-4"):
        assert config_file.parse_override(f"sdpo.learning_rate={text}") == ("sdpo.learning_rate", 1e-5)
    assert config_file.parse_override("sdpo.learning_rate=1e1")[1] == 10
    key, rate = config_file.parse_override("sdpo.learning_rate=1e-5")
    loaded = config_file.load(path, {key: rate})
    assert loaded.sdpo.learning_rate == 1e-5
    assert loaded.distill_data is not None and loaded.distill_data.share == 1.0
    assert loaded.ingest.log is not None and loaded.ingest.log.valid_from == "2025-05-01"
    assert loaded.ingest.log.item_attributes == ["genre"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_written_out_whole_is_read_as_the_same(tmp_path: Path, path: Path) -> None:
    """A run keeps its config that way, and `trackrec stage` reads it."""
    loaded = shipped(path)
    whole = tmp_path / "config.yaml"
    whole.write_text(yaml.safe_dump(loaded.model_dump(mode="json", exclude_none=True)))
    assert config_file.load(whole) == loaded


@pytest.mark.parametrize(
    "text", ["name: a\nsample:\n  n: 4\n  top_p: 0.5\n  n: 8\n", "name: a\n\n\nsample: {n: 4,\n  n: 8}\n"]
)
def test_a_key_given_twice_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"the key 'n' is given twice, first on line [34]\n.*line 5, column 3"):
        config_file.load(path)
    with pytest.raises(ConfigError, match=r"the key 'n' is given twice"):
        config_file.parse_override("sample={n: 4, n: 8}")


def test_a_key_beside_a_merged_one_is_not_given_twice(tmp_path: Path) -> None:
    """Also where the merged mapping merges another one, and lies deeper than where it is used."""
    path = written(tmp_path)
    path.write_text(
        path.read_text()
        + """
sft_generator: &small {batch_size: 8, epochs: 2}
sdpo:
  <<: *small
  epochs: 3
sample: {engine: &a {batch_tokens: 64}}
score: {engine: &b {<<: *a, batch_tokens: 128}}
generate:
  engine: {<<: *b, dtype: float32}
"""
    )
    loaded = config_file.load(path)
    assert (loaded.sdpo.batch_size, loaded.sdpo.epochs) == (8, 3)
    assert loaded.score.engine.batch_tokens == loaded.generate.engine.batch_tokens == 128


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "", "a: 2025-13-01\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml: (cannot be read as YAML|expected a mapping)"):
        config_file.load(path)


def test_settings_that_may_be_none_default_to_none() -> None:
    """Kubeflow's parameters carry no null: None travels as "left out", so it must be what left out means."""

    def sections(annotation: object) -> list[type[Settings]]:
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            return [annotation]
        return [section for part in typing.get_args(annotation) for section in sections(part)]

    seen: set[type[Settings]] = set()
    waiting: list[type[Settings]] = [RunConfig]
    while waiting:
        section = waiting.pop()
        if section in seen:
            continue
        seen.add(section)
        for name, field in section.model_fields.items():
            waiting += sections(field.annotation)
            optional = types.NoneType in typing.get_args(field.annotation)
            assert not optional or field.default is None, f"{section.__name__}.{name}"
    assert config.SdpoSettings in seen and Toleration in seen


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encoder=null", "`ranking` needs `encoder`"),
        ("ranking={backbones: [din], controls_of: [autoint]}", "`controls_of` names autoint, which `backbones` lacks"),
        ("ranking.backbones=[]", "ranking.backbones"),
        ("ranking.by_iteration_of=[din, din]", "`by_iteration_of` names a backbone twice"),
        ("ranking.backbones=[xdeepfm]", "ranking.backbones"),
        ("train_ctr.hidden=[64, 33]", r"the last of `hidden` \(33\) must be even"),
        ("train_ctr.seeds=1", "train_ctr.seeds"),
        ("evaluate.long_tail_rows=5", "`train_ctr.long_tail_rows` and `evaluate.long_tail_rows` must be equal"),
        ("train_ctr.grid.dropout=[]", "train_ctr.grid.dropout"),
        ("train_ctr.grid.dropout=[1.0]", "train_ctr.grid.dropout"),
        ("export.experiment={salt: a:b, control: 0.5, treatment: 0.5}", "export.experiment.*salt"),
        ("export.experiment={salt: a, control: 0.6, treatment: 0.5}", "add up to more than 1"),
        ("export.experiment={salt: a, control: 0.5}", "export.experiment.treatment"),
    ],
)
def test_ranking_settings_that_are_refused(override: str, message: str) -> None:
    given = dict([config_file.parse_override(override)])
    with pytest.raises(config_file.ConfigError, match=message):
        config_file.load(PAPER, given, profile="gke-a100")


def test_an_experiment_needs_rankers() -> None:
    given = {"ranking": None, "export.experiment": {"salt": "a", "control": 0.5, "treatment": 0.5}}
    with pytest.raises(config_file.ConfigError, match=r"without `ranking` there are none"):
        config_file.load(PAPER, given, profile="gke-a100")


def test_an_experiment_does_not_depend_on_the_order_of_its_keys() -> None:
    """Kubeflow's struct parameters keep none, and the order of the shares says who is in which bucket."""
    given = {"salt": "a", "control": 0.25, "treatment": 0.5}
    turned = dict(reversed(given.items()))
    experiments = [ExperimentSettings.model_validate(each).experiment for each in (given, turned)]
    assert [list(each.shares) for each in experiments] == [["control", "treatment"]] * 2
    assert experiments[0].model_dump_json() == experiments[1].model_dump_json()


def test_the_backbones_of_the_config_are_those_there_are() -> None:
    assert set(typing.get_args(config.Backbone)) == set(BACKBONES)


def test_settings_survive_kubeflows_numbers() -> None:
    """Kubeflow's struct parameters turn every number into a float."""
    assert config.SampleSettings.model_validate({"n": 4.0, "max_tokens": 8.0}) == config.SampleSettings(
        n=4, max_tokens=8
    )


def test_a_domains_prompts_say_what_the_config_takes_them_to_say() -> None:
    for domain, above in run_config._LIKED_ABOVE.items():
        for task in ("cot", "rec"):
            template = (Path(render.__file__).parent / "templates" / f"{domain}_{task}.jinja").read_text()
            assert f"RATING>{above} means like" in template


def test_the_config_that_the_docs_show_is_one(tmp_path: Path) -> None:
    [shown] = re.findall(r"```yaml\n(name: shop.*?)```", Path("docs/data.md").read_text(), re.DOTALL)
    (tmp_path / "shop.yaml").write_text(shown)
    loaded = config_file.load(tmp_path / "shop.yaml")
    assert loaded.ingest.log is not None and loaded.ingest.log.label == "clicked"


def test_the_ranking_settings_follow_the_backbones() -> None:
    """What is compared with controls and by iteration is of the backbones, if the config names no others."""
    dcn = RankingSettings.model_validate({"backbones": ["dcn"]})
    assert (dcn.controls_of, dcn.by_iteration_of) == (["dcn"], [])
    two = RankingSettings.model_validate({"backbones": ["din", "dcn"], "controls_of": []})
    assert (two.controls_of, two.by_iteration_of) == ([], ["din"])
    assert set(RankingSettings().controls_of) == set(typing.get_args(config.Backbone))
