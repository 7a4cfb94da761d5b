"""Loading and saving models: Hugging Face directories that hold full weights, or a PEFT adapter and its base's hash."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from trackrec import storage

ADAPTER_CONFIG = "adapter_config.json"


class WrongBaseError(ValueError):
    """An adapter that was trained on another base model than the given one."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def torch_dtype(name: str) -> torch.dtype:
    """ "float32", "bfloat16", or "auto": bfloat16 on a GPU, float32 on a CPU (where it is the faster one)."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return cast(torch.dtype, getattr(torch, name))


def load_tokenizer(base_model: Path) -> PreTrainedTokenizerFast:
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(base_model, local_files_only=True))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def is_adapter(model: Path) -> bool:
    return (Path(model) / ADAPTER_CONFIG).is_file()


def check_whole(base_model: Path, model: Path) -> None:
    """
    Raises:
        CorruptError: `model` is a stage's output and differs from its checksums. A base is not looked at: it was
            checked when it was fetched, or is hashed whole where it has no manifest.
    """
    if model != base_model and (Path(model) / storage.MANIFEST).is_file():
        storage.verify(model)


def check_base(base_model: Path, adapter: Path) -> None:
    """
    Raises:
        WrongBaseError: `adapter` does not name `base_model`'s content hash as its base.
    """
    named = json.loads((Path(adapter) / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    found = _base_name(base_model)
    if named != found:
        raise WrongBaseError(
            f"the adapter in {adapter} sits on {named}, but {base_model} is {found}; give the base it was trained on"
        )


def load_model(base_model: Path, model: Path, *, dtype: str, trainable: bool = False) -> PreTrainedModel | PeftModel:
    """The model in directory `model`: `base_model` itself, other full weights, or an adapter on `base_model`.

    For inference (`trainable=False`) it is in eval mode on the GPU where there is one. With `trainable=True` it stays
    where `from_pretrained` puts it, since a trainer (or ZeRO-3) places it, and an adapter's weights require gradients.

    Args:
        dtype: "float32", "bfloat16" or "auto" (`torch_dtype`).

    Raises:
        WrongBaseError: `model` is an adapter on another base.
    """
    adapter = is_adapter(model)
    if adapter:
        check_base(base_model, model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        base_model if adapter else model,
        dtype=torch_dtype(dtype),
        local_files_only=True,
        use_safetensors=True,  # a pickled checkpoint could run code
        attn_implementation="sdpa",
    )
    if adapter:
        loaded = PeftModel.from_pretrained(loaded, str(model), is_trainable=trainable)
    if trainable:
        return loaded
    if adapter and loaded.dtype == torch.float32:
        # Saves the adapter's own products at each step. Not in bfloat16, which would round small updates away.
        loaded = loaded.merge_and_unload()
    return loaded.to(device()).eval()


def save_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast, base_model: Path, out: Path
) -> None:
    """Writes full weights, or the adapter alone with the content hash of its base; safetensors, no path inside."""
    if isinstance(model, PeftModel):
        model.save_pretrained(str(out), save_embedding_layers=False)
        config = Path(out) / ADAPTER_CONFIG
        adapter = json.loads(config.read_text(encoding="utf-8"))
        adapter["base_model_name_or_path"] = _base_name(base_model)
        config.write_text(json.dumps(adapter, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        # A card with the base model's local path in it.
        (Path(out) / "README.md").unlink(missing_ok=True)
    else:
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _base_name(base_model: Path) -> str:
    return f"sha256:{storage.content_hash(base_model)}"
