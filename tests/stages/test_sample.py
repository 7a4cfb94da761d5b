from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.stages.decoding_inputs import Killed, contexts, watched
from tests.tables import publish
from trackrec import seeds, storage
from trackrec.config import EngineSettings, SampleSettings
from trackrec.data import schema
from trackrec.llm.chat import encode_chat
from trackrec.llm.engine import open_engine
from trackrec.prompts.render import cot_prompt
from trackrec.stages import decoding, sample

SETTINGS = SampleSettings(n=3, max_tokens=8, engine=EngineSettings(batch_tokens=400))


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))


def run(tiny_model: Path, given: Path, out: Path, settings: SampleSettings = SETTINGS, **seeds: int) -> list[Any]:
    sample.run(settings, contexts=given, base_model=tiny_model, generator=tiny_model, recots=out, **seeds)
    return schema.rows(out, "recots")


def test_each_train_context_gets_n_samples_of_their_own_seeds(
    tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    given = contexts(tmp_path / "contexts")
    rows = run(tiny_model, given, tmp_path / "recots", seed=5, iteration=2)
    assert [(row["context_id"], row["sample"]) for row in rows] == [(f"c{c}", s) for c in range(4) for s in range(3)]
    assert {row["model"] for row in rows} == {storage.content_hash(tiny_model)}
    # One context alone, straight from the engine.
    shown = next(row for row in schema.rows(given, "contexts") if row["context_id"] == "c2")
    engine = open_engine(EngineSettings(), tiny_model, tiny_model)
    own = [seeds.derive(5, 2, "c2", number) for number in range(3)]
    prompt = encode_chat(tokenizer, cot_prompt("movies", shown["history"]))
    [(_, expected)] = engine.sample([prompt], [own], temperature=1.0, top_p=0.9, max_tokens=8)
    assert [(row["text"], row["num_tokens"], row["finish_reason"]) for row in rows[6:9]] == [
        (c.text, c.num_tokens, c.finish_reason) for c in expected
    ]
    facts = storage.read_manifest(tmp_path / "recots").facts
    tokens = [row["num_tokens"] for row in rows]
    assert (facts["contexts"], facts["recots"], facts["tokens"]) == (4, 12, sum(tokens))
    assert facts["mean_tokens"] == pytest.approx(sum(tokens) / 12)
    assert facts["finished"] == Counter(row["finish_reason"] for row in rows)["stop"] / 12
    assert facts["decoded"] == 12
    # Both of the same seconds.
    assert facts["seconds_per_recot"] * facts["tokens_per_second"] == pytest.approx(facts["mean_tokens"], rel=0.01)


def test_the_seed_and_the_iteration_decide(tiny_model: Path, tmp_path: Path) -> None:
    given = contexts(tmp_path / "contexts", train=1)
    texts = {
        (seed, iteration): tuple(
            row["text"]
            for row in run(tiny_model, given, tmp_path / f"{seed}{iteration}", seed=seed, iteration=iteration)
        )
        for seed in range(2)
        for iteration in range(2)
    }
    assert len(set(texts.values())) == 4
    assert tuple(row["text"] for row in run(tiny_model, given, tmp_path / "again", seed=1)) == texts[1, 0]


def test_contexts_are_drawn_anew_each_iteration() -> None:
    given = [{"context_id": f"c{k:02}", "split": "train" if k % 2 else "test"} for k in range(60)]
    drawn = [
        [context["context_id"] for context in sample.draw_contexts(given, 10, seed, iteration)]
        for seed, iteration in ((0, 0), (0, 1), (1, 0))
    ]
    assert all(len(set(names)) == 10 and names == sorted(names) for names in drawn)
    assert all(int(name[1:]) % 2 for names in drawn for name in names)
    assert len({tuple(names) for names in drawn}) == 3
    # A draw does not hang on the order or number of held-out contexts.
    again = sample.draw_contexts([c for c in reversed(given) if c["split"] == "train"], 10, 0, 0)
    assert [context["context_id"] for context in again] == drawn[0]
    assert len(sample.draw_contexts(given, None, 0, 0)) == 30


def test_a_killed_stage_samples_only_what_is_left(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = contexts(tmp_path / "contexts")
    whole = run(tiny_model, given, tmp_path / "whole")
    asked: list[int] = []
    monkeypatch.setattr(decoding, "open_engine", watched(3, asked))
    with pytest.raises(Killed):
        run(tiny_model, given, tmp_path / "recots")
    assert not (tmp_path / "recots").exists()
    monkeypatch.setattr(decoding, "open_engine", watched(None, asked))
    assert run(tiny_model, given, tmp_path / "recots") == whole
    assert asked == [4, 1]


def test_no_train_context_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    given = publish(tmp_path / "contexts", contexts=[])
    with pytest.raises(ValueError, match="has no train context to sample"):
        run(tiny_model, given, tmp_path / "recots")
    assert not (tmp_path / "recots").exists()
