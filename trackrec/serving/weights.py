"""G and its tokenizer as one folder of safetensors, whatever the training left: full weights, or an adapter on a base.

The files are the base's own wherever they can be: the server reads them with other releases of the libraries.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from trackrec import storage
from trackrec.config_file import ConfigError
from trackrec.llm import models
from trackrec.serving_config import ExportSettings

# Configs, tokenizers, chat templates and weights; never a pickle, and nothing that a model may bring to be executed.
_SERVED = (".safetensors", ".json", ".txt", ".model", ".jinja")
# The ranks that vLLM has kernels for.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def copy_model(model: Path, out: Path) -> None:
    """The served files of a Hugging Face directory.

    Raises:
        ValueError: it has no safetensors.
    """
    found = [path for path in sorted(model.iterdir()) if path.suffix in _SERVED and path.name != storage.MANIFEST]
    if not any(path.suffix == ".safetensors" for path in found):
        raise ValueError(f"{model} has no *.safetensors; convert the model's weights with `save_pretrained`")
    out.mkdir(parents=True)
    for path in found:
        # As they lie here: a cache may hold links into itself.
        shutil.copyfile(path, out / path.name)


def write_generator(settings: ExportSettings, base_model: Path, generator: Path, out: Path) -> dict[str, str | int]:
    """Writes `out/weights`, and `out/adapter` where an adapter is kept apart.

    Returns:
        Of vLLM's engine arguments, those that an adapter needs.

    Raises:
        WrongBaseError: the adapter is of another base.
        ConfigError: the adapter is larger than vLLM can apply.
    """
    weights = out / "weights"
    if not models.is_adapter(generator):
        copy_model(generator, weights)
        return {}
    models.check_base(base_model, generator)
    if settings.adapter == "merged":
        _merge(settings, base_model, generator, weights)
        return {}
    copy_model(base_model, weights)
    adapter = out / "adapter"
    adapter.mkdir()
    shutil.copyfile(generator / "adapter_model.safetensors", adapter / "adapter_model.safetensors")
    config = json.loads((generator / models.ADAPTER_CONFIG).read_text(encoding="utf-8"))
    # Fewer files than the base has: another hash.
    config["base_model_name_or_path"] = f"sha256:{storage.content_hash(weights)}"
    write_json(adapter / models.ADAPTER_CONFIG, config)
    fitting = [rank for rank in _RANKS if rank >= config["r"]]
    if not fitting:
        raise ConfigError(
            f"`export.adapter: lora`: vLLM applies adapters of rank {_RANKS[-1]} at most, and this one has "
            f"{config['r']}; set `export.adapter: merged`"
        )
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": fitting[0]}


def _merge(settings: ExportSettings, base_model: Path, adapter: Path, weights: Path) -> None:
    """In float32, whatever the result's type: in bfloat16 each matrix's update would be rounded twice.

    In main memory: a GPU's is the server's, which is started next.
    """
    adapted: Any = models.load_model(base_model, adapter, dtype="float32", trainable=True)
    model = adapted.merge_and_unload()
    config = json.loads((base_model / "config.json").read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"
    name = config.get(key) or "float32" if settings.dtype == "auto" else settings.dtype
    model.to(models.torch_dtype(name)).save_pretrained(weights)
    # All but the weights is the base's own.
    for path in sorted(base_model.iterdir()):
        is_weights = path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")
        if path.suffix in _SERVED and path.name != storage.MANIFEST and not is_weights:
            shutil.copyfile(path, weights / path.name)
    write_json(weights / "config.json", {**config, key: name})


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
