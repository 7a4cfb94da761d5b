"""The typed settings: what is refused, and how it is said."""

import types
import typing
from pathlib import Path

import pytest
import yaml

from trackrec import config, config_file
from trackrec.config import RunConfig, Settings
from trackrec.config_file import ConfigError

CONFIGS = sorted(Path("pipelines/configs").glob("*.yaml"))
MINIMAL = {
    "name": "small",
    "raw_data": "raw",
    "base_model": "model",
    "ingest": {"dataset": "ml-1m"},
    "contexts": {"domain": "movies"},
    "distill_data": {"teacher": {"kind": "recorded"}},
}


def written(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path) -> None:
    assert config_file.load(path).loop.iterations == 3


def test_the_papers_settings() -> None:
    """Section 4.1.4: N=10, t=1, top_p=.9, T=3, learning rate 1e-5; section 3.5: about 5 % for distillation."""
    loaded = config_file.load(Path("pipelines/configs/ml-1m-qwen2.5-7b.yaml"))
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
            r"`sdpo\.batch_size` \(6\) must be a multiple of `sdpo\.micro_batch_size` \(1\) × .* \(4\)",
        ),
        ({"sdpo": {"lora": {"r": 8}}}, r"`sdpo\.lora` goes on with the adapter of `sft_generator`"),
        ({"sdpo": {"lora": {"r": 8}}, "sft_generator": {"lora": {"r": 16}}}, r"give both the same `lora`"),
        ({"sdpo": {"deepspeed": "zero3"}}, r"`sdpo\.deepspeed` needs `resources\.sdpo\.accelerator`"),
        ({"sample": {"engine": {"tensor_parallel_size": 2}}}, r"tensor_parallel_size` is 2.*gives 0 GPUs"),
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


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", ""])
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
    assert config.SdpoSettings in seen and config.Toleration in seen


def test_settings_survive_kubeflows_numbers() -> None:
    """Kubeflow's struct parameters turn every number into a float."""
    assert config.SampleSettings.model_validate({"n": 4.0, "max_tokens": 8.0}) == config.SampleSettings(
        n=4, max_tokens=8
    )
