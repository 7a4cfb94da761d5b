"""Opens the engine that a generator's `model.json` describes."""

import copy
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from trackrec.llm.continuous import ContinuousEngine
from trackrec.llm.models import device, load_model, load_tokenizer
from trackrec.serving.vllm_args import EngineArguments


def open_generator(arguments: EngineArguments, version: Path) -> tuple[PreTrainedTokenizerFast, ContinuousEngine]:
    """
    Args:
        version: the folder with `model.json`, and `multi_lora.json` where LoRA is on.

    Returns:
        a tokenizer for the thread that takes requests (the engine decodes with its own), and the engine.

    Raises:
        ArgumentError: an adapter is not as it must be.
        UnsupportedModelError: the model's attention is not plain causal attention.
    """
    weights = Path(arguments.model)
    tokenizer = load_tokenizer(Path(arguments.tokenizer or weights))
    model: Any = load_model(weights, weights, dtype=arguments.dtype)
    # Inside the model adapters have numbers: a module's name may have no dot.
    names = {}
    for number, (name, adapter) in enumerate(arguments.adapters(version).items()):
        names[name] = f"lora{number}"
        if isinstance(model, PeftModel):
            model.load_adapter(str(adapter), adapter_name=names[name])
        else:
            model = PeftModel.from_pretrained(model, str(adapter), adapter_name=names[name])
    engine = ContinuousEngine(
        tokenizer,
        model.to(device()).eval(),
        adapters=names,
        max_rows=arguments.max_num_seqs,
        cache_tokens=max(1, arguments.kv_cache_memory_bytes // token_bytes(model.config, model.dtype.itemsize)),
        prefill_tokens=arguments.max_num_batched_tokens,
        max_length=arguments.max_model_len,
    )
    return copy.deepcopy(tokenizer), engine


def token_bytes(config: PretrainedConfig, itemsize: int) -> int:
    """What one token's keys and values take, in all layers."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * size * itemsize
