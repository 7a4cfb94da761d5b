from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.stages.decoding_inputs import Killed, contexts, examples, watched
from trackrec import storage
from trackrec.config import DecodingSettings
from trackrec.data import schema
from trackrec.llm.chat import encode_chat
from trackrec.prompts.render import cot_prompt
from trackrec.stages import decoding, generate

SETTINGS = DecodingSettings(max_tokens=6)
ALL = ("train", "valid", "test")


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))


def write(folder: Path, model: Path, splits: Sequence[str]) -> None:
    generate.run(
        SETTINGS,
        splits=splits,
        examples=examples(folder / "examples"),
        contexts=contexts(folder / "contexts"),
        base_model=model,
        generator=model,
        recots=folder / "recots",
    )


def test_every_split_is_decoded_greedily(tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    given = contexts(tmp_path / "contexts")
    write(tmp_path, tiny_model, ALL)
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
    out = tmp_path / "recots"
    asked: list[int] = []
    monkeypatch.setattr(decoding, "open_engine", watched(4, asked))
    with pytest.raises(Killed):
        write(tmp_path, tiny_model, ALL)
    assert not out.exists()
    monkeypatch.setattr(decoding, "open_engine", watched(None, asked))
    write(tmp_path, tiny_model, ALL)
    assert asked == [6, 2]
    facts = storage.read_manifest(out).facts
    assert (facts["recots"], facts["decoded"]) == (6, 2) and facts["seconds_per_recot"] > 0
    assert [row["context_id"] for row in schema.rows(out, "recots")] == [f"c{k}" for k in range(6)]


def test_only_what_the_splits_use_is_decoded(tiny_model: Path, tmp_path: Path) -> None:
    """A test example may be judged in a context that a train one has used first."""
    write(tmp_path, tiny_model, ["test"])
    assert [row["context_id"] for row in schema.rows(tmp_path / "recots", "recots")] == ["c0", "c5"]


def test_no_context_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no example in the splits later"):
        write(tmp_path, tiny_model, ["later"])
