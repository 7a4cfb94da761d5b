"""`export` on tiny models, tried by the real server."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.stages import export_inputs
from tests.stages.export_inputs import EXPERIMENT, GENERATE, RUN, exported
from trackrec import storage
from trackrec.config import EngineSettings
from trackrec.ctr import ranker as rankers
from trackrec.llm import models
from trackrec.llm.chat import encode_chat
from trackrec.llm.engine import open_engine
from trackrec.prompts.render import cot_prompt
from trackrec.serving import repository, server, smoke, version
from trackrec.serving.contract import GeneratorContract
from trackrec.stages import export


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    return export_inputs.inputs(tmp_path_factory.mktemp("inputs"), tiny_model)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, given: dict[str, Path]) -> Path:
    return exported(tmp_path_factory.mktemp("export") / "repository", given, experiment=EXPERIMENT)


def test_a_version_says_what_it_is(served: Path, given: dict[str, Path]) -> None:
    storage.verify(served)
    found = version.read(served)
    assert (found.run, found.config, found.absent) == (
        RUN,
        {"name": "small", "encoder": "package:all-minilm-l6-v2"},
        {},
    )
    assert found.metrics["validator"]["auc"] == 0.61
    assert found.metrics["ranker_trackrec"]["auc"] == storage.numbers(given["ranker_trackrec"])["auc"]
    assert set(found.models) == {path.parent.name for path in served.glob("*/config.pbtxt")} == set(found.smoke)
    manifest = storage.read_manifest(served)
    assert manifest.inputs["generator"] == storage.content_hash(given["generator"])
    # Nothing that the server left, and no pickle.
    suffixes = {Path(name).suffix for name in manifest.files}
    assert suffixes == {".json", ".pbtxt", ".py", ".safetensors", ".jinja", ".parquet"}
    assert found.models["ranker_trackrec"]["encoder_version"] == found.models["encoder"]["model_version"]
    assert found.models["ranker_base"]["encoder_version"] is None
    assert found.smoke["ranker"]["scores"].keys() == {"control", "treatment"}
    assert (found.models["ranker_base"]["uses_recot"], found.models["ranker_trackrec"]["uses_recot"]) == (False, True)


def test_what_the_generator_answered_is_what_the_engine_writes(served: Path, given: dict[str, Path]) -> None:
    """The adapter on its base, in this process, with the same prompt."""
    engine = open_engine(EngineSettings(dtype="float32"), given["base_model"], given["generator"])
    ids = encode_chat(engine.tokenizer, cot_prompt("movies", smoke._HISTORY))
    [(_, written)] = engine.greedy([ids], max_tokens=smoke._TOKENS, repetition_penalty=GENERATE.repetition_penalty)
    answer = version.read(served).smoke["generator"]
    assert answer["text"].strip() == written.text.strip()
    assert answer["prompt_tokens"] == len(ids)


def test_the_configs_are_what_both_backends_named_vllm_read(served: Path) -> None:
    config = repository.read_config(served / "generator")
    assert (config.backend, config.max_batch_size, config.model_transaction_policy.decoupled) == ("vllm", 0, True)
    assert [group.kind for group in config.instance_group] == [repository.pb.ModelInstanceGroup.KIND_MODEL]
    contract = GeneratorContract.of(config)
    arguments = json.loads((served / "generator/1/model.json").read_text())
    assert arguments == {
        "model": "generator/1/weights",
        "dtype": "auto",
        "hf_overrides": {"head_dtype": "float32"},
        "max_model_len": 4096,
        "gpu_memory_utilization": 0.9,
        "tensor_parallel_size": 1,
    }
    assert contract.max_prompt_tokens == 4096 - GENERATE.max_tokens
    assert (served / arguments["model"] / "model.safetensors").is_file()
    assert (contract.domain, contract.lora_name) == ("movies", None)


def test_the_merged_weights_are_the_adapters_on_the_base(served: Path, given: dict[str, Path]) -> None:
    merged = AutoModelForCausalLM.from_pretrained(served / "generator/1/weights", dtype=torch.float32)
    adapted = models.load_model(given["base_model"], given["generator"], dtype="float32")
    ids = torch.tensor([[1, 17, 900, 5]])
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits)
    base = AutoModelForCausalLM.from_pretrained(given["base_model"], dtype=torch.float32)
    assert not torch.allclose(merged(input_ids=ids).logits, base(input_ids=ids).logits, atol=0.1)


def test_the_first_seeds_ranker_and_its_catalogue(served: Path, given: dict[str, Path]) -> None:
    """Another seed is asked for by `export.seed`."""
    config = rankers.RankerConfig.model_validate_json((given["ranker_base"] / rankers.CONFIG).read_text())
    weights = [path.name for path in (served / "ranker_base/1/ranker").glob("*.safetensors")]
    assert weights == [f"seed-{config.seeds[0]}.safetensors"] and len(config.seeds) == 2
    assert (served / "ranker_base/1/items.parquet").read_bytes() == (given["items"] / "items.parquet").read_bytes()


def test_an_adapter_kept_apart_is_served_by_its_name(tmp_path: Path, given: dict[str, Path], served: Path) -> None:
    """A run without encoder and rankers: the version says that they are not there, and why."""
    alone = {name: given[name] for name in ("base_model", "generator", "metrics")}
    apart = exported(tmp_path / "repository", alone, adapter="lora", max_model_len=512)
    found = version.read(apart)
    assert set(found.models) == {"generator"} and set(found.absent) == {"encoder", "ranker_base", "ranker_trackrec"}
    assert "`ranking`" in found.absent["ranker_base"]
    arguments = json.loads((apart / "generator/1/model.json").read_text())
    assert (arguments["enable_lora"], arguments["max_lora_rank"], arguments["max_model_len"]) == (True, 8, 512)
    lora = json.loads((apart / "generator/1/multi_lora.json").read_text())
    assert list(lora) == [found.models["generator"]["lora_name"]]
    models.check_base(apart / "generator/1/weights", apart / lora["trackrec"])
    # The same model: the same words.
    assert found.smoke["generator"]["text"] == version.read(served).smoke["generator"]["text"]


def test_a_model_that_answers_nonsense_is_not_published(tmp_path: Path, given: dict[str, Path]) -> None:
    """Not-a-number in the encoder's weights: the server loads it and is ready."""
    broken = tmp_path / "encoder"
    shutil.copytree(given["encoder"], broken)
    weights = load_file(broken / "model.safetensors")
    save_file({name: weight * float("nan") for name, weight in weights.items()}, broken / "model.safetensors")
    out = tmp_path / "out"
    few = {name: given[name] for name in ("base_model", "generator", "metrics")} | {"encoder": broken}
    with pytest.raises(smoke.SmokeError, match=r"zero or not finite[\s\S]*the end of the server's log"):
        exported(out / "repository", few)
    assert not list(out.glob("*"))


def test_a_model_that_the_server_does_not_load_is_not_published(tmp_path: Path, given: dict[str, Path]) -> None:
    """Its reason is in the error."""
    broken = tmp_path / "generator"
    shutil.copytree(given["base_model"], broken)
    (broken / "model.safetensors").write_bytes(b"no weights at all")
    few = {name: given[name] for name in ("base_model", "metrics")} | {"generator": broken}
    with pytest.raises(server.ServerError, match=r"the Triton server ended[\s\S]*generator[\s\S]*SafetensorError"):
        exported(tmp_path / "out/repository", few)
    assert not list((tmp_path / "out").glob("*"))


def test_a_model_that_writes_into_its_own_folder_is_not_published(
    tmp_path: Path, given: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version's name would be of other files than those that answered."""

    def tried(settings: object, folder: Path, log: Path) -> tuple[dict[str, object], dict[str, object]]:
        (folder / "generator/1/weights/cache.json").write_text("{}")
        return {}, {}

    monkeypatch.setattr(export, "_tried", tried)
    few = {name: given[name] for name in ("base_model", "generator", "metrics")}
    with pytest.raises(ValueError, match=r"a model changed generator/1/weights/cache\.json while it was served"):
        exported(tmp_path / "out/repository", few)
    assert not list((tmp_path / "out").glob("*"))


def test_without_a_server_nothing_is_written(
    tmp_path: Path, given: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(server.ENV, str(tmp_path / "none"))
    monkeypatch.setattr(repository, "write_generator", lambda *_, **__: pytest.fail("it was written"))
    with pytest.raises(server.ServerError, match=r"make one with `bash requirements/venv\.sh triton`"):
        exported(tmp_path / "repository", given)


def test_what_does_not_fit_together_is_refused_before_anything_is_written(
    tmp_path: Path, given: dict[str, Path]
) -> None:
    swapped = given | {"ranker_base": given["ranker_trackrec"]}
    with pytest.raises(ValueError, match="reads vectors of width 4, and ranker_base is given those of width 0"):
        exported(tmp_path / "repository", swapped)
    wide = given | {"encoder": export_inputs.encoder(tmp_path / "encoder", width=8)}
    with pytest.raises(ValueError, match="width 4, and ranker_trackrec is given those of width 8"):
        exported(tmp_path / "repository", wide)
    half = {name: path for name, path in given.items() if name != "ranker_base"}
    with pytest.raises(ValueError, match="the rankers go together"):
        exported(tmp_path / "repository", half)
    alone = {name: given[name] for name in ("base_model", "generator", "metrics")}
    with pytest.raises(ValueError, match=r"`export\.experiment` is a test of two rankers"):
        exported(tmp_path / "repository", alone, experiment=EXPERIMENT)
    with pytest.raises(LookupError, match="no model of seed 99"):
        exported(tmp_path / "repository", given, seed=99)
    with pytest.raises(ValueError, match=r"`export\.max_model_len` is 8192"):
        exported(tmp_path / "repository", given, max_model_len=8192)
    assert not (tmp_path / "repository").exists()


def test_another_bases_adapter_is_refused(tmp_path: Path, given: dict[str, Path]) -> None:
    other = tmp_path / "other"
    shutil.copytree(given["base_model"], other)
    weights = load_file(other / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(models.WrongBaseError):
        exported(tmp_path / "repository", given | {"base_model": other})
