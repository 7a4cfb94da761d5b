from pathlib import Path

import pytest

from tests.stages.training_inputs import publish_table, publish_tables
from trackrec import storage
from trackrec.align import distillation
from trackrec.config import LoraSettings, SftSettings
from trackrec.data import schema
from trackrec.llm.models import is_adapter, load_model
from trackrec.prompts.render import cot_prompt
from trackrec.stages import sft_generator

SETTINGS = SftSettings(lora=LoraSettings(r=2), batch_size=4, micro_batch_size=2, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKREC_WORK", str(tmp_path / "work"))


def test_writes_an_adapter_and_the_facts_of_its_training(tiny_model: Path, tmp_path: Path) -> None:
    tables = publish_tables(tmp_path, contexts=5)
    generator = tmp_path / "generator"
    sft_generator.run(
        SETTINGS,
        contexts=tables["contexts"],
        recots=tables["recots"],
        base_model=tiny_model,
        generator=generator,
    )
    assert is_adapter(generator)
    load_model(tiny_model, generator, dtype="float32")
    facts = storage.read_manifest(generator).facts
    assert (facts["examples"], facts["steps"], facts["processes"], facts["resumed_from_step"]) == (5, 2, 1, 0)
    assert len(facts["loss"]) == 2
    assert facts["tokens_per_second"] == pytest.approx(facts["tokens"] / facts["train_seconds"], rel=0.01)
    assert not list((tmp_path / "work").iterdir())


def test_each_recot_is_taught_with_its_own_contexts_prompt(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = publish_tables(tmp_path, contexts=3)
    rows = schema.rows(tables["recots"], "recots")
    rows[1]["finish_reason"] = "length"
    recots = publish_table(tmp_path / "reversed", "recots", rows[::-1])
    taught: list[distillation.Demonstration] = []
    monkeypatch.setattr(
        distillation, "distil", lambda settings, demonstrations, *_: taught.extend(demonstrations) or {}
    )
    sft_generator.run(
        SETTINGS, contexts=tables["contexts"], recots=recots, base_model=tiny_model, generator=tmp_path / "out"
    )
    contexts = {row["context_id"]: row for row in schema.rows(tables["contexts"], "contexts")}
    assert [(d.context_id, d.prompt, d.recot, d.finished) for d in taught] == [
        (
            row["context_id"],
            cot_prompt("movies", contexts[row["context_id"]]["history"]),
            row["text"],
            row["finish_reason"] == "stop",
        )
        for row in rows[::-1]
    ]
    assert [d.finished for d in taught] == [True, False, True]


def test_a_recot_of_no_known_context_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    tables = publish_tables(tmp_path, contexts=2)
    row = schema.rows(tables["recots"], "recots")[0] | {"context_id": "elsewhere"}
    recots = publish_table(tmp_path / "recots", "recots", [row])
    with pytest.raises(ValueError, match=r"RecCoT for context elsewhere, which .* has not"):
        sft_generator.run(
            SETTINGS, contexts=tables["contexts"], recots=recots, base_model=tiny_model, generator=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
