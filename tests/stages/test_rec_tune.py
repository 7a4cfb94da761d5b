from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.stages.training_inputs import TITLES, publish_table, publish_tables
from trackrec import storage
from trackrec.config import LoraSettings, RecTuneSettings
from trackrec.data import schema
from trackrec.llm.models import is_adapter
from trackrec.stages import rec_tune

SETTINGS = RecTuneSettings(
    lora=LoraSettings(r=2), batch_size=4, micro_batch_size=2, epochs=1, learning_rate=1e-2, warmup_ratio=0
)


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKREC_WORK", str(tmp_path / "work"))


def test_examples_are_the_train_split_with_their_contexts_recot(tmp_path: Path) -> None:
    tables = publish_tables(tmp_path, contexts=3, examples_per_context=2)
    histories = {row["context_id"]: row["history"] for row in schema.rows(tables["contexts"], "contexts")}
    texts = {row["context_id"]: row["text"] for row in schema.rows(tables["recots"], "recots")}
    examples = rec_tune.train_examples(tables["examples"], tables["contexts"], tables["recots"])
    assert [(e.row_id, e.title, e.label) for e in examples] == [
        (2 * context + place, TITLES[context + place], (context + place) % 2)
        for context in range(3)
        for place in range(2)
    ]
    for example in examples:
        context = f"c{example.row_id // 2}"
        assert example.history == histories[context]
        assert example.recot == texts[context]


def test_without_recots_none_is_shown(tmp_path: Path) -> None:
    tables = publish_tables(tmp_path, contexts=2)
    examples = rec_tune.train_examples(tables["examples"], tables["contexts"], None)
    assert [e.recot for e in examples] == [None, None]


def test_of_several_recots_of_a_context_the_first_is_shown(tmp_path: Path) -> None:
    tables = publish_tables(tmp_path, contexts=1)
    first = schema.rows(tables["recots"], "recots")[0]
    recots = publish_table(tmp_path / "r", "recots", [first | {"sample": 1, "text": "Another."}, first])
    [example] = rec_tune.train_examples(tables["examples"], tables["contexts"], recots)
    assert example.recot == first["text"]


def test_a_context_without_recot_is_an_error(tmp_path: Path) -> None:
    tables = publish_tables(tmp_path, contexts=2)
    recots = publish_table(tmp_path / "r", "recots", schema.rows(tables["recots"], "recots")[:1])
    with pytest.raises(ValueError, match=r"no RecCoT for context c1.* run `generate`"):
        rec_tune.train_examples(tables["examples"], tables["contexts"], recots)


def test_a_second_iteration_goes_on_from_the_first_ones_validator(tiny_model: Path, tmp_path: Path) -> None:
    tables = publish_tables(tmp_path, contexts=4)

    def tune(validator: Path, tuned: Path, iteration: int, recots: Path | None = tables["recots"]) -> dict:
        rec_tune.run(
            SETTINGS,
            examples=tables["examples"],
            contexts=tables["contexts"],
            recots=recots,
            base_model=tiny_model,
            validator=validator,
            tuned=tuned,
            iteration=iteration,
        )
        assert is_adapter(tuned)
        return load_file(tuned / "adapter_model.safetensors")

    first = tune(tiny_model, tmp_path / "v1", 1)
    second = tune(tmp_path / "v1", tmp_path / "v2", 2)
    afresh = tune(tiny_model, tmp_path / "w2", 2)
    # A step of Adam is about the learning rate in size: an adapter continued stays near, a new one does not.
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert 0 < (second[name] - first[name]).abs().max() < 2e-2
    assert (afresh[name] - first[name]).abs().max() > 5e-2
    facts = storage.read_manifest(tmp_path / "v2").facts
    assert (facts["examples"], facts["steps"]) == (4, 1)
    # The control sees shorter prompts.
    tune(tiny_model, tmp_path / "control", 1, recots=None)
    assert storage.read_manifest(tmp_path / "control").facts["tokens"] < facts["tokens"]


def test_an_iteration_draws_its_examples_by_hash(tmp_path: Path) -> None:
    tables = publish_tables(tmp_path, contexts=6, examples_per_context=2)
    every = rec_tune.train_examples(tables["examples"], tables["contexts"], None)
    assert rec_tune.draw(every, None, seed=1) == every
    first, second = (rec_tune.draw(every, 5, seed=seed) for seed in (1, 2))
    assert len(first) == len(second) == 5 and first != second
    assert rec_tune.draw(list(reversed(every)), 5, seed=1) == first
    # A larger draw holds the smaller one.
    assert {e.row_id for e in first} < {e.row_id for e in rec_tune.draw(every, 7, seed=1)}
