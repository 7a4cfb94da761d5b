"""Memory and shapes against what models really have, and against the peaks that the README's benchmarks measured."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen2Config

from trackrec.config import EngineSettings, LoraSettings, TrainingSettings
from trackrec.planning import memory
from trackrec.planning.shapes import KNOWN, ModelShape, known

README = Path(__file__).parents[2] / "README.md"
SEVEN = KNOWN["qwen2.5-7b"]


def measured(row: str, model: str) -> float:
    """Our peak in GiB, of the README's table of one H100."""
    found = re.search(rf"^\| {re.escape(row)}[^|]*\| {model} \|.*→ ([0-9.]+) GiB", README.read_text(), re.M)
    assert found, row
    return float(found[1])


def test_a_published_models_parameters() -> None:
    assert SEVEN.parameters == pytest.approx(7_615_616_512, rel=1e-4)  # its biases are left out


def test_a_shape_read_from_a_models_files(smollm2: Path) -> None:
    shape = ModelShape.of_config(json.loads((smollm2 / "config.json").read_text()))
    assert shape.model_copy(update={"head_width": None}) == known("package:smollm2-135m-instruct")
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        assert shape.parameters == sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def test_a_config_without_a_decoders_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks intermediate_size, num_hidden_layers"):
        ModelShape.of_config({"hidden_size": 4, "num_attention_heads": 2, "vocab_size": 3})


def test_an_adapters_parameters_are_those_of_peft(tiny_model: Path) -> None:
    shape = ModelShape.of_config(json.loads((tiny_model / "config.json").read_text()))
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(r=8, target_modules="all-linear")
    )
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert shape.adapter(LoraSettings(r=8)) == trained


def test_keys_and_values_of_one_token() -> None:
    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    cache = model(torch.tensor([[1]]), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert ModelShape.of_config(config.to_dict()).kv_bytes == held


@pytest.mark.parametrize(("model", "batch"), [("7b", 1), ("1.5b", 2)])
def test_a_lora_steps_memory_is_what_the_benchmark_measured(model: str, batch: int) -> None:
    settings = TrainingSettings(lora=LoraSettings(), micro_batch_size=batch, batch_size=batch)
    planned = memory.training(KNOWN[f"qwen2.5-{model}"], settings, 1, row_tokens=400 + 10 * 100) / memory.GIB
    assert planned == pytest.approx(measured("S-DPO step, LoRA", model.upper()), rel=0.05)


@pytest.mark.parametrize(("row", "model"), [("scoring", "7B"), ("scoring", "1.5B"), ("sampling", "7B")])
def test_an_engines_memory_is_what_the_benchmark_measured(row: str, model: str) -> None:
    # Sampling's batch is the benchmark's own, of 4 prompts and 40 texts.
    engine = EngineSettings(batch_tokens=4 * 400 + 40 * 100) if row == "sampling" else EngineSettings()
    planned = memory.decoding(KNOWN[f"qwen2.5-{model.lower()}"], engine, longest=500) / memory.GIB
    assert planned == pytest.approx(measured(row, model), rel=0.12)


def test_zero_divides_what_its_stage_says() -> None:
    """7.6 billion weights: 2 bytes each, 2 of gradient and 12 of optimiser."""
    row, weights = 1, SEVEN.parameters

    def per_gpu(deepspeed: str | None, gpus: int) -> float:
        return memory.training(SEVEN, TrainingSettings.model_validate({"deepspeed": deepspeed}), gpus, row)

    assert per_gpu("zero2", 4) - per_gpu("zero2", 8) == pytest.approx(14 * weights / 8)
    assert per_gpu("zero3", 4) - per_gpu("zero3", 8) == pytest.approx(16 * weights / 8)
    assert per_gpu(None, 8) == per_gpu(None, 1) == pytest.approx(18 * weights, rel=0.02)


def test_gradient_checkpointing_keeps_one_layer_and_the_others_inputs() -> None:
    plain, saved = (
        memory.training(SEVEN, TrainingSettings(gradient_checkpointing=given), 1, row_tokens=1000)
        for given in (False, True)
    )
    assert plain - saved == 1000 * (27 * SEVEN.activation_bytes - 28 * 2 * SEVEN.hidden)


def test_vllm_holds_weights_and_one_longest_text_on_each_gpu_of_its_group() -> None:
    engine = EngineSettings(kind="vllm", max_model_len=4096, tensor_parallel_size=2)
    assert memory.decoding(SEVEN, engine, longest=700) == (2 * SEVEN.parameters + 4096 * SEVEN.kv_bytes) / 2


def test_what_a_training_writes_is_as_large_as_planned(tiny_model: Path) -> None:
    shape = ModelShape.of_config(json.loads((tiny_model / "config.json").read_text()))
    written = (tiny_model / "model.safetensors").stat().st_size
    assert memory.model_file(shape, TrainingSettings()) == pytest.approx(written, rel=0.01)
    # Three checkpoints of float32 weights and two moments.
    assert memory.checkpoints(shape, TrainingSettings()) == 3 * 12 * shape.parameters
