from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.stages.decoding_inputs import Killed, contexts, watched
from tests.tables import publish
from trackrec import storage
from trackrec.config import DecodingSettings
from trackrec.data import schema
from trackrec.llm.chat import encode_chat
from trackrec.prompts.render import cot_prompt
from trackrec.stages import decoding, generate

SETTINGS = DecodingSettings(max_tokens=6)


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))


def test_every_split_is_decoded_greedily(tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    given = contexts(tmp_path / "contexts")
    generate.run(SETTINGS, contexts=given, base_model=tiny_model, generator=tiny_model, recots=tmp_path / "recots")
    rows = schema.rows(tmp_path / "recots", "recots")
    assert [(row["context_id"], row["sample"]) for row in rows] == [(f"c{k}", 0) for k in range(6)]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for context, row in zip(schema.rows(given, "contexts"), rows, strict=True):
        prompt = encode_chat(tokenizer, cot_prompt("movies", context["history"]))
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6, repetition_penalty=1.05)
        written = ids[0, len(prompt) :].tolist()
        assert row["text"] == tokenizer.decode(written, skip_special_tokens=True)
        assert row["num_tokens"] == len(written)
        assert row["finish_reason"] == ("stop" if written[-1] == 2 else "length")


def test_a_killed_stage_decodes_only_what_is_left(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, out = contexts(tmp_path / "contexts"), tmp_path / "recots"
    asked: list[int] = []
    monkeypatch.setattr(decoding, "open_engine", watched(4, asked))
    with pytest.raises(Killed):
        generate.run(SETTINGS, contexts=given, base_model=tiny_model, generator=tiny_model, recots=out)
    assert not out.exists()
    monkeypatch.setattr(decoding, "open_engine", watched(None, asked))
    generate.run(SETTINGS, contexts=given, base_model=tiny_model, generator=tiny_model, recots=out)
    assert asked == [6, 2]
    assert [row["context_id"] for row in schema.rows(out, "recots")] == [f"c{k}" for k in range(6)]


def test_no_context_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    given = publish(tmp_path / "contexts", contexts=[])
    with pytest.raises(ValueError, match="has no context"):
        generate.run(SETTINGS, contexts=given, base_model=tiny_model, generator=tiny_model, recots=tmp_path / "recots")
