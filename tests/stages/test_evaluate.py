import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.tables import publish
from trackrec import storage
from trackrec.config import EvaluateSettings
from trackrec.data import schema
from trackrec.evaluation import results
from trackrec.llm.chat import encode_rec
from trackrec.llm.tokens import yes_no_ids
from trackrec.llm.transformers_engine import TransformersEngine
from trackrec.stages import evaluate

USERS, CONTEXTS_PER_USER, EXAMPLES_PER_CONTEXT = 3, 2, 3
# user, context
CONTEXTS = [(f"u{u}", f"c{u}{k}") for u in range(USERS) for k in range(CONTEXTS_PER_USER)]


def history(place: int) -> list[dict[str, Any]]:
    return [
        {"title": f"Film {place + step} (199{step})", "rating": float(step + 2), "label": step % 2} for step in range(3)
    ]


def examples() -> list[dict[str, Any]]:
    rows = []
    for place, (user, context) in enumerate(CONTEXTS):
        for k in range(EXAMPLES_PER_CONTEXT):
            row_id = place * EXAMPLES_PER_CONTEXT + k
            rows.append(
                {
                    "row_id": row_id,
                    "split": "test",
                    "context_id": context,
                    "user_id": user,
                    "item_id": f"i{row_id}",
                    "title": f"Target {row_id} (1999)",
                    "label": int(row_id % 2 == 0),
                    "user_train_rows": 20 * (user != "u0"),
                    "item_train_rows": 20,
                    "item_mean": 0.2 if row_id % 2 else 0.9,
                }
            )
    return [*rows, rows[0] | {"row_id": 100, "split": "train", "item_mean": None}]


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))


@pytest.fixture
def inputs(tmp_path: Path, tiny_model: Path) -> dict[str, Path]:
    contexts = [
        {"context_id": c, "user_id": u, "as_of": 1, "split": "test", "domain": "movies", "history": history(place)}
        for place, (u, c) in enumerate(CONTEXTS)
    ]
    recots = [
        {"context_id": c, "sample": 0, "text": TEXTS[c], "num_tokens": 4 + place, "model": "m"}
        | {"finish_reason": "stop" if place else "length"}
        for place, (_, c) in enumerate(CONTEXTS)
    ]
    # One of a train context, which evaluation is not to read.
    recots.append(recots[0] | {"context_id": "other", "num_tokens": 999})
    return {
        "contexts": publish(tmp_path / "contexts", contexts=contexts),
        "examples": publish(tmp_path / "examples", examples=examples()),
        "recots": publish(tmp_path / "recots", recots=recots),
        "base_model": tiny_model,
        "validator": tiny_model,
    }


TEXTS = {context: f"The user of {context} likes films number {place}." for place, (_, context) in enumerate(CONTEXTS)}


class Reference:
    """P(Yes) by one plain forward pass over the whole prompt, as transformers loads the model."""

    def __init__(self, model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.tokenizer = tokenizer

    def __call__(self, row: dict[str, Any], recot: str | None) -> float:
        place = [context for _, context in CONTEXTS].index(row["context_id"])
        prefix, [suffix] = encode_rec(self.tokenizer, "movies", history(place), row["title"], [recot])
        with torch.no_grad():
            logits = self.model(torch.tensor([prefix + suffix])).logits[0, -1].double()
        yes, no = logits[list(yes_no_ids(self.tokenizer))].exp().tolist()
        return yes / (yes + no)


@pytest.fixture
def reference(tiny_model: Path, tokenizer: PreTrainedTokenizerFast) -> Reference:
    return Reference(tiny_model, tokenizer)


def run(out: Path, inputs: dict[str, Path], seed: int = 0, shuffled: bool = False, **settings: Any) -> dict[int, float]:
    evaluate.run(
        EvaluateSettings.model_validate(settings),
        **inputs,  # type: ignore[arg-type]
        predictions=out / "predictions",
        metrics=out / "metrics",
        shuffled=shuffled,
        seed=seed,
    )
    return {row["row_id"]: row["score"] for row in schema.rows(out / "predictions", "predictions")}


def held_out() -> list[dict[str, Any]]:
    return [row for row in examples() if row["split"] == "test"]


def test_predictions_are_those_of_a_plain_forward_pass(
    tmp_path: Path, inputs: dict[str, Path], reference: Reference
) -> None:
    found = run(tmp_path, inputs)
    expected = {row["row_id"]: reference(row, TEXTS[row["context_id"]]) for row in held_out()}
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(expected.values()) - min(expected.values()) > 0.01  # else any order of rows would pass


def test_without_recots(tmp_path: Path, inputs: dict[str, Path], reference: Reference) -> None:
    found = run(tmp_path, inputs | {"recots": None})  # type: ignore[dict-item]
    assert found == pytest.approx({row["row_id"]: reference(row, None) for row in held_out()}, abs=1e-5)
    evaluation = results.read(tmp_path / "metrics")
    assert (evaluation.recots, evaluation.mean_tokens, evaluation.cut) == ("none", None, None)


def test_shuffled_texts_come_from_other_users(tmp_path: Path, inputs: dict[str, Path], reference: Reference) -> None:
    found = run(tmp_path, inputs, shuffled=True)
    assert found == run(tmp_path / "again", inputs, shuffled=True)
    givers: dict[str, str] = {}
    for row in held_out():
        context, score = row["context_id"], found[row["row_id"]]
        if context not in givers:
            # Which text gives the score that was written?
            by_giver = {giver: reference(row, text) for giver, text in TEXTS.items()}
            givers[context] = min(by_giver, key=lambda giver: abs(by_giver[giver] - score))
        assert score == pytest.approx(reference(row, TEXTS[givers[context]]), abs=1e-5)
    owner = {context: user for user, context in CONTEXTS}
    assert sorted(givers) == sorted(givers.values())
    assert all(owner[receiver] != owner[giver] for receiver, giver in givers.items())
    assert results.read(tmp_path / "metrics").recots == "shuffled"


def test_metrics_stand_beside_the_baseline_on_the_same_rows(tmp_path: Path, inputs: dict[str, Path]) -> None:
    found = run(tmp_path, inputs)
    evaluation = results.read(tmp_path / "metrics")
    assert (evaluation.split, evaluation.recots) == ("test", "own")
    # 4 … 9 tokens of the six texts evaluated.
    assert evaluation.mean_tokens == 6.5
    assert evaluation.cut == pytest.approx(1 / 6)
    overall = evaluation.validator["overall"]
    rows = held_out()
    right = sum((found[row["row_id"]] >= 0.5) == row["label"] for row in rows)
    assert (overall.rows, overall.positives, overall.users) == (18, 9, 3)
    assert overall.acc == right / 18
    assert overall.log_loss == pytest.approx(
        -sum(math.log(found[r["row_id"]] if r["label"] else 1 - found[r["row_id"]]) for r in rows) / 18
    )
    assert evaluation.item_mean is not None
    baseline = evaluation.item_mean["overall"]
    assert (baseline.auc, baseline.uauc, baseline.acc, baseline.rows) == (1, 1, 1, 18)
    # The first user has no train rows: six cold rows, which are the long tail too.
    assert {name: m.rows for name, m in evaluation.validator.items()} == {
        "overall": 18, "warm": 12, "cold": 6, "long_tail": 6,
    }  # fmt: skip
    facts = storage.read_manifest(tmp_path / "metrics").facts
    assert (facts["rows"], facts["contexts"], facts["auc"]) == (18, 6, overall.auc)


def test_the_train_split_has_no_baseline(tmp_path: Path, inputs: dict[str, Path]) -> None:
    assert list(run(tmp_path, inputs, split="train")) == [100]
    evaluation = results.read(tmp_path / "metrics")
    assert evaluation.item_mean is None and evaluation.validator["overall"].auc is None


def test_a_killed_evaluation_scores_only_what_is_left(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", inputs)
    scored: list[int] = []
    score = TransformersEngine.score

    def killed(self: TransformersEngine, groups: Sequence[Any]) -> Iterator[tuple[int, np.ndarray]]:
        for index, probabilities in score(self, groups):
            if len(scored) == 4:
                raise KeyboardInterrupt
            scored.append(len(probabilities))
            yield index, probabilities

    def counting(self: TransformersEngine, groups: Sequence[Any]) -> Iterator[tuple[int, np.ndarray]]:
        for index, probabilities in score(self, groups):
            scored.append(len(probabilities))
            yield index, probabilities

    # A context's three examples make groups of two and one.
    monkeypatch.setattr(evaluate, "_TARGETS", 2)
    monkeypatch.setattr(TransformersEngine, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", inputs)
    assert not (tmp_path / "out" / "metrics").exists()
    monkeypatch.setattr(TransformersEngine, "score", counting)
    assert run(tmp_path / "out", inputs) == pytest.approx(whole, abs=1e-6)
    assert sum(scored) == 18


def test_faulty_inputs_are_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    row = {"context_id": "c00", "sample": 0, "text": "t", "num_tokens": 1, "finish_reason": "stop", "model": "m"}
    few = publish(tmp_path / "few", recots=[row])
    with pytest.raises(ValueError, match=r"'recots' lacks 5 of the 6 evaluated contexts"):
        run(tmp_path / "out", inputs | {"recots": few})
    several = publish(tmp_path / "several", recots=[row, row | {"sample": 1}])
    with pytest.raises(ValueError, match="several rows of one context"):
        run(tmp_path / "out", inputs | {"recots": several})
    with pytest.raises(ValueError, match="no texts to shuffle"):
        run(tmp_path / "out", inputs | {"recots": None}, shuffled=True)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="no example in split 'valid'"):
        run(tmp_path / "out", inputs, split="valid")
    assert not (tmp_path / "out" / "metrics").exists()
