import json
from pathlib import Path
from typing import Any

import pytest

from trackrec.llm.continuous import Sampling
from trackrec.serving.vllm_args import ArgumentError, EngineArguments, SamplingParameters


def read(folder: Path, given: Any) -> EngineArguments:
    (folder / "model.json").write_text(given if isinstance(given, str) else json.dumps(given), encoding="utf-8")
    return EngineArguments.read(folder)


def test_defaults_are_vllms() -> None:
    assert SamplingParameters.read("") == SamplingParameters.read("{}") == Sampling()
    assert Sampling() == Sampling(temperature=1, top_p=1, top_k=0, repetition_penalty=1, max_tokens=16, min_tokens=0)


def test_sampling_parameters() -> None:
    text = json.dumps({"temperature": "0.5", "stop": "\n", "lora_name": "x", "max_tokens": None, "seed": 7})
    assert SamplingParameters.read(text) == Sampling(temperature=0.5, stop=("\n",), lora="x", max_tokens=None, seed=7)
    assert SamplingParameters.read('{"stop": ["a", "b"]}').stop == ("a", "b")


def test_a_sampling_parameter_at_vllms_default_asks_for_nothing() -> None:
    given = {"n": 1, "presence_penalty": 0.0, "min_p": 0, "logprobs": None, "skip_special_tokens": True, "top_k": 3}
    assert SamplingParameters.read(json.dumps(given)) == Sampling(top_k=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"n": 2, "min_p": 0}', r"sampling_parameters: 'n' is not supported"),
        ('{"presence_penalty": 0.1}', "'presence_penalty' is not supported"),
        ('{"skip_special_tokens": false}', "'skip_special_tokens' is not supported"),
        ('{"logprobs": 0}', "'logprobs' is not supported"),
        ('{"best_of": 2}', r"'best_of' is not supported .* temperature, top_p"),
        ('{"temperature": -1}', "temperature: .* greater than or equal to 0"),
        ('{"temperature": NaN}', "temperature: .* finite"),
        ('{"top_p": 0}', "top_p: "),
        ('{"max_tokens": 0}', "max_tokens: "),
        ('{"min_tokens": 20}', r"`min_tokens` \(20\) exceeds `max_tokens` \(16\)"),
        ('{"stop": ["a", ""]}', "empty string"),
        ('{"seed": 18446744073709551616}', "seed: "),
        ("[1]", "must be a JSON object, not list"),
        ("{", "is no JSON"),
    ],
)
def test_what_is_not_supported_is_named(given: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SamplingParameters.read(given)


def test_engine_arguments(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"model\.json is missing"):
        EngineArguments.read(tmp_path)
    found = read(
        tmp_path,
        {"model": "w", "max_model_len": 100, "gpu_memory_utilization": 0.9, "tensor_parallel_size": 4, "dtype": "auto"},
    )
    assert (found.model, found.max_model_len, found.max_num_seqs) == ("w", 100, 64)
    assert found.adapters(tmp_path) == {}
    for given, message in (
        ({"model": "w", "speculative_config": {}}, "'speculative_config' is not supported"),
        ({"model": "w", "trust_remote_code": True}, "trust_remote_code: "),
        ({"model": "w", "quantization": "awq"}, "quantization: "),
        ({"model": "w", "dtype": "float16"}, "dtype: "),
        ({}, "model: Field required"),
    ):
        with pytest.raises(ArgumentError, match=message):
            read(tmp_path, given)


def test_adapters(tmp_path: Path) -> None:
    arguments = read(tmp_path, {"model": "w", "enable_lora": True, "max_lora_rank": 8})
    with pytest.raises(ArgumentError, match=r"multi_lora\.json is missing"):
        arguments.adapters(tmp_path)
    adapter = tmp_path / "adapter"
    (tmp_path / "multi_lora.json").write_text(json.dumps({"recot": str(adapter)}), encoding="utf-8")
    with pytest.raises(ArgumentError, match=r"'recot' has no adapter_model\.safetensors"):
        arguments.adapters(tmp_path)
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    for rank in (16, 8):
        (adapter / "adapter_config.json").write_text(json.dumps({"r": rank}), encoding="utf-8")
        if rank == 16:
            with pytest.raises(ArgumentError, match="rank 16, above `max_lora_rank` 8"):
                arguments.adapters(tmp_path)
    assert arguments.adapters(tmp_path) == {"recot": adapter}
