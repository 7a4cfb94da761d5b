from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.stages.decoding_inputs import TITLES, Killed, contexts, watched
from tests.tables import publish
from trackrec import storage
from trackrec.config import ScoreSettings
from trackrec.data import schema
from trackrec.llm.chat import encode_rec
from trackrec.llm.tokens import yes_no_ids
from trackrec.stages import score

SAMPLES = 3


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))


@pytest.fixture
def inputs(tiny_model: Path, tmp_path: Path) -> dict[str, Path]:
    """Contexts c0 (two train examples), c1 (one) and c2 (one) are sampled; c3 is not; c4 and c5 are held out."""
    owners = ["c0", "c0", "c1", "c2", "c3", "c4", "c5"]
    rows = [
        {
            "row_id": 10 + k,
            "split": {"c4": "valid", "c5": "test"}.get(owner, "train"),
            "context_id": owner,
            "user_id": owner.replace("c", "u"),
            "item_id": f"i{k}",
            "title": TITLES[k % 4],
            "label": k % 2,
        }
        for k, owner in enumerate(owners)
    ]
    # An example of a sampled context in another split is not feedback to train on.
    rows.append(rows[0] | {"row_id": 99, "split": "valid"})
    recots = [
        {
            "context_id": f"c{c}",
            "sample": s,
            "text": f"The user likes {s + 1} kinds of {'very ' * c}old films.",
            "num_tokens": 9,
            "finish_reason": "stop",
            "model": "m",
        }
        # Not in order: rewards must follow the sample's number.
        for s in reversed(range(SAMPLES))
        for c in range(3)
    ]
    return {
        "examples": publish(tmp_path / "examples", examples=rows),
        "contexts": contexts(tmp_path / "contexts"),
        "recots": publish(tmp_path / "recots", recots=recots),
        "base_model": tiny_model,
        "validator": tiny_model,
    }


def run(inputs: dict[str, Path], out: Path) -> list[dict[str, Any]]:
    score.run(ScoreSettings(), **inputs, rewards=out)
    return schema.rows(out, "rewards")


def test_rewards_are_those_of_each_whole_prompt(
    inputs: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = run(inputs, tmp_path / "rewards")
    assert [(row["context_id"], row["row_id"], row["sample"]) for row in rows] == [
        (context, row_id, s) for context, row_id in (("c0", 10), ("c0", 11), ("c1", 12), ("c2", 13)) for s in range(3)
    ]
    model = AutoModelForCausalLM.from_pretrained(inputs["base_model"])
    histories = {row["context_id"]: row["history"] for row in schema.rows(inputs["contexts"], "contexts")}
    texts = {(row["context_id"], row["sample"]): row["text"] for row in schema.rows(inputs["recots"], "recots")}
    shown = {row["row_id"]: row for row in schema.rows(inputs["examples"], "examples")}
    for row in rows:
        title, text = shown[row["row_id"]]["title"], texts[row["context_id"], row["sample"]]
        prefix, [suffix] = encode_rec(tokenizer, "movies", histories[row["context_id"]], title, [text])
        with torch.inference_mode():
            p = model(torch.tensor([prefix + suffix])).logits[0, -1].double().softmax(-1)
        p_yes, p_no = (float(p[token]) for token in yes_no_ids(tokenizer))
        assert row["p_yes"] == pytest.approx(p_yes / (p_yes + p_no), abs=1e-5)
        assert row["p_yes"] + row["p_no"] == pytest.approx(1, abs=1e-12)
        assert row["reward"] == (row["p_yes"] if shown[row["row_id"]]["label"] else row["p_no"])
    assert {shown[row["row_id"]]["label"] for row in rows} == {0, 1}
    facts = storage.read_manifest(tmp_path / "rewards").facts
    assert (facts["contexts"], facts["rows"]) == (3, 12)
    assert facts["mean_reward"] == pytest.approx(sum(row["reward"] for row in rows) / 12)


def test_a_killed_stage_scores_only_what_is_left(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(score, "open_engine", watched(3, asked))
    with pytest.raises(Killed):
        run(inputs, tmp_path / "rewards")
    monkeypatch.setattr(score, "open_engine", watched(None, asked))
    rows = run(inputs, tmp_path / "rewards")
    assert asked == [4, 1]
    monkeypatch.setattr(score, "open_engine", watched(None, asked))
    whole = run(inputs, tmp_path / "whole")
    assert [row | {"p_yes": 0, "p_no": 0, "reward": 0} for row in rows] == [
        row | {"p_yes": 0, "p_no": 0, "reward": 0} for row in whole
    ]
    assert [row["reward"] for row in rows] == pytest.approx([row["reward"] for row in whole], abs=1e-5)


def test_a_sampled_context_without_example_or_history_is_an_error(inputs: dict[str, Path], tmp_path: Path) -> None:
    rows = schema.rows(inputs["examples"], "examples")
    fewer = publish(tmp_path / "fewer", examples=[row for row in rows if row["context_id"] != "c1"])
    with pytest.raises(ValueError, match=r"1 sampled contexts \(first: c1\) are not in .* or have no train example"):
        run(inputs | {"examples": fewer}, tmp_path / "rewards")
    with pytest.raises(ValueError, match=r"1 sampled contexts \(first: c2\) are not in"):
        run(inputs | {"contexts": contexts(tmp_path / "two", train=0)}, tmp_path / "rewards")
