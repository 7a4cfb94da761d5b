import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


@pytest.fixture(scope="session")
def stopping_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with every eighth token ending a sequence: rows of one batch end at different steps."""
    out = tmp_path_factory.mktemp("stopping_model")
    shutil.copytree(tiny_model, out, dirs_exist_ok=True)
    stops = {"eos_token_id": list(range(2, 49152, 8)), "pad_token_id": 2}
    (out / "generation_config.json").write_text(json.dumps(stops), encoding="utf-8")
    return out


@pytest.fixture(scope="session")
def qwen2_model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paper's family in small: biases in attention, one key-value head for all, its head tied to the embeddings."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        initializer_range=0.1,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    out = tmp_path_factory.mktemp("qwen2_model")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out
