import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerFast

from trackrec import storage
from trackrec.config import EngineSettings, PreferencesSettings
from trackrec.llm.engine import open_engine
from trackrec.llm.models import (
    WrongBaseError,
    check_whole,
    is_adapter,
    load_model,
    load_tokenizer,
    save_model,
    torch_dtype,
)

IDS = torch.tensor([[1, 50, 60, 70]])


def adapted(base_model: Path, out: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> torch.Tensor:
    """Saves an adapter that changes the model, and returns its logits before saving."""
    model = get_peft_model(
        load_model(base_model, base_model, dtype="float32", trainable=True),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    with torch.inference_mode():
        logits = model(IDS).logits
    save_model(model, tokenizer, base_model, out)
    return logits


def test_an_adapter_comes_back_as_it_was(tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    expected = adapted(tiny_model, tmp_path, tokenizer)
    assert is_adapter(tmp_path) and not (tmp_path / "model.safetensors").exists()
    merged = load_model(tiny_model, tmp_path, dtype="float32")
    assert not isinstance(merged, PeftModel) and not merged.training
    trainable = load_model(tiny_model, tmp_path, dtype="float32", trainable=True)
    assert {name.split(".")[-3] for name, weight in trainable.named_parameters() if weight.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    for model in (merged, trainable):
        with torch.inference_mode():
            torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    base = load_model(tiny_model, tiny_model, dtype="float32")
    with torch.inference_mode():
        assert (base(IDS).logits - expected).abs().max() > 0.1
    # Rounding the merged weights to bfloat16 would lose small updates.
    assert isinstance(load_model(tiny_model, tmp_path, dtype="bfloat16"), PeftModel)


def test_an_adapter_names_its_base_by_content_and_no_path(
    tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    adapted(tiny_model, tmp_path, tokenizer)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == f"sha256:{storage.content_hash(tiny_model)}"
    for file in tmp_path.iterdir():
        if file.suffix != ".safetensors":
            assert str(tiny_model) not in file.read_text(encoding="utf-8")
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_model.safetensors", "tokenizer.json"}


def test_an_adapter_on_another_base_is_refused(
    tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    adapted(tiny_model, tmp_path / "adapter", tokenizer)
    other = load_model(tiny_model, tiny_model, dtype="float32")
    other.lm_head.weight.data[0, 0] += 1
    save_model(other, tokenizer, tiny_model, tmp_path / "other")
    with pytest.raises(WrongBaseError, match=r"sits on sha256:\w+, but .*other is sha256:\w+; give the base"):
        load_model(tmp_path / "other", tmp_path / "adapter", dtype="float32")


def test_full_weights_come_back(tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = load_model(tiny_model, tiny_model, dtype="float32")
    model.lm_head.weight.data *= 2
    save_model(model, tokenizer, tiny_model, tmp_path)
    assert not is_adapter(tmp_path)
    again = load_model(tiny_model, tmp_path, dtype="float32")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert load_tokenizer(tmp_path).encode("In 1997") == tokenizer.encode("In 1997")


def test_dtypes() -> None:
    assert torch_dtype("bfloat16") == torch.bfloat16
    assert torch_dtype("auto") == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def test_a_model_that_was_changed_is_refused(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's output, by its checksums; the base is checked where it is fetched."""
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))
    settings, tokenizer = PreferencesSettings(), load_tokenizer(tiny_model)
    with storage.publish("sdpo", settings, inputs={}, outputs={"model": tmp_path / "model"}) as job:
        save_model(load_model(tiny_model, tiny_model, dtype="float32"), tokenizer, tiny_model, job.outputs["model"])
    check_whole(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    for read in (check_whole, lambda base, model: open_engine(EngineSettings(), base, model)):
        with pytest.raises(storage.CorruptError, match=r"config\.json is missing or differs"):
            read(tiny_model, tmp_path / "model")
