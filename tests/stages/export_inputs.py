"""A run's small models for the tests of `export` and of what serves them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from tests.stages import ranking_inputs
from tests.tables import publish
from trackrec.config import DecodingSettings, EncodeSettings
from trackrec.fetch import fetch
from trackrec.llm.models import load_tokenizer, save_model
from trackrec.serving_config import ExportSettings
from trackrec.stages import export

RUN = "small-20260101-000000"
CONFIG = "name: small\nencoder: package:all-minilm-l6-v2\n"
EXPERIMENT = {"salt": "exp-1", "control": 0.1, "treatment": 0.1}
GENERATE = DecodingSettings(max_tokens=12, repetition_penalty=1.1)


def adapter(base_model: Path, out: Path) -> Path:
    """A LoRA adapter that changes what the model writes."""
    model: Any = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"])
        )
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:  # zero at first: it would change nothing
                torch.nn.init.normal_(weight, std=0.1)
    out.mkdir(parents=True)
    save_model(adapted, load_tokenizer(base_model), base_model, out)
    return out


def encoder(out: Path, *, width: int = ranking_inputs.WIDTH) -> Path:
    """A random one-layer BERT with all-MiniLM-L6-v2's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(fetch("all-minilm-l6-v2"))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = BertModel(config, add_pooling_layer=False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def inputs(root: Path, tiny_model: Path, *, ranked: bool = True) -> dict[str, Path]:
    """The arguments of `export` that are paths, but for its output."""
    given = {
        "base_model": tiny_model,
        "generator": adapter(tiny_model, root / "generator"),
        "metrics": publish(root / "metrics", {"auc": 0.61, "rows": 40}),
    }
    if not ranked:
        return given
    tables = ranking_inputs.inputs(root)
    return given | {
        "encoder": encoder(root / "encoder"),
        "items": tables["items"],
        "ranker_base": ranking_inputs.trained(root, tables, feature="none") / "trained",
        "ranker_trackrec": ranking_inputs.trained(root, tables, feature="recot") / "trained",
    }


def exported(repository: Path, given: dict[str, Path], **settings: object) -> Path:
    export.run(
        ExportSettings.model_validate({"ready_s": 300, **settings}),
        generate=GENERATE,
        encode=EncodeSettings(),
        domain="movies",
        history_length=10,
        run=RUN,
        run_config=CONFIG,
        repository=repository,
        **given,  # type: ignore[arg-type]
    )
    return repository
