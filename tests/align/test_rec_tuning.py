import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trackrec.align import rec_tuning
from trackrec.align.rec_tuning import Example, RecTuningLoss
from trackrec.align.training import EmptyTrainingError, TooLongError
from trackrec.config import EngineSettings, LoraSettings, RecTuneSettings
from trackrec.llm.chat import encode_rec, encode_targets
from trackrec.llm.engine import open_engine

HISTORY = [{"title": "Fargo (1996)", "rating": 4.0, "label": 1}, {"title": "Scream (1996)", "rating": 2.0, "label": 0}]


def _example(title: str = "Alien (1979)", label: int = 1, recot: str | None = "Likes noir.") -> Example:
    return Example(row_id=7, domain="movies", history=HISTORY, title=title, label=label, recot=recot)


def test_the_loss_is_eq_6_on_the_normalised_probability() -> None:
    # Logits ln 6, ln 2 and ln 4 of No, Yes and some other token: P(Yes) = 1/6, P(No) = 1/2, V = (1/6) / (4/6) = 1/4.
    logits = torch.log(torch.tensor([[6.0, 2.0, 4.0], [6.0, 2.0, 4.0]])).requires_grad_()
    losses = RecTuningLoss(yes_id=1, no_id=0)(logits, torch.tensor([1, 0]))
    assert losses.tolist() == pytest.approx([-math.log(1 / 4), -math.log(3 / 4)])
    losses.sum().backward()
    assert logits.grad is not None
    # d/d(z_yes - z_no) = V - y: -3/4 for y = 1, 1/4 for y = 0. The other token has no say.
    assert logits.grad.flatten().tolist() == pytest.approx([3 / 4, -3 / 4, 0, -1 / 4, 1 / 4, 0])


def test_the_loss_is_finite_at_any_gap_and_in_bfloat16() -> None:
    logits = torch.tensor([[3e4, -3e4], [-3e4, 3e4]], dtype=torch.bfloat16)
    losses = RecTuningLoss(0, 1)(logits, torch.tensor([0, 0]))
    assert losses.dtype == torch.float32
    assert losses.tolist() == [59904.0, 0.0]  # 3e4 is 29952 in bfloat16


def test_prompts_are_those_that_score_and_evaluate(tokenizer: PreTrainedTokenizerFast) -> None:
    for recot in ("Likes noir.", None):
        [row] = rec_tuning.encode(tokenizer, [_example(recot=recot)], 500)
        prefix, [suffix] = encode_rec(tokenizer, "movies", HISTORY, "Alien (1979)", [recot])
        assert row == {"input_ids": prefix + suffix, "label": 1}
        prefix, [suffix] = encode_targets(tokenizer, "movies", HISTORY, [("Alien (1979)", recot)])
        assert row["input_ids"] == prefix + suffix


def test_a_prompt_that_is_too_long_is_refused_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TooLongError, match=r"example 7 has \d+ tokens, more than max_length 50"):
        rec_tuning.encode(tokenizer, [_example()], 50)


def test_collate_pads_behind_and_points_at_the_answer() -> None:
    batch = rec_tuning.collate([{"input_ids": [5, 6, 7], "label": 1}, {"input_ids": [8], "label": 0}])
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "last": [2, 0],
        "labels": [1, 0],
    }


def test_no_example_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(EmptyTrainingError, match="no train example"):
        rec_tuning.tune(RecTuneSettings(), [], tiny_model, tiny_model, tmp_path, tmp_path, seed=0)


def _scored(validator: Path, base: Path, tokenizer: PreTrainedTokenizerFast, data: list[Example]) -> float:
    """Eq. 6 from the probabilities that the scoring engine gives, mean over the examples."""
    groups = [encode_rec(tokenizer, e.domain, e.history, e.title, [e.recot]) for e in data]
    total = 0.0
    for index, answers in open_engine(EngineSettings(dtype="float32"), base, validator).score(groups):
        p_yes, p_no = answers[0]
        total -= math.log(p_yes if data[index].label else p_no)
    return total / len(data)


@pytest.mark.parametrize("lora", [LoraSettings(r=4), None], ids=["lora", "full"])
def test_what_is_trained_is_what_is_scored(
    lora: LoraSettings | None, tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = [
        _example("Alien (1979)", 1),
        _example("Clueless (1995)", 0, "Likes crime, above all when it goes wrong in the snow of Minnesota."),
        _example("Brazil (1985)", 1, None),
    ]
    settings = RecTuneSettings(
        lora=lora, learning_rate=3e-3, batch_size=3, micro_batch_size=3, epochs=8, lr_schedule="constant"
    )
    facts = rec_tuning.tune(settings, data, tiny_model, tiny_model, tmp_path / "v", tmp_path / "work", seed=0)
    # The first step's loss, of a padded batch, against the engine's, one prompt at a time.
    assert facts["loss"][0] == pytest.approx(_scored(tiny_model, tiny_model, tokenizer, data), rel=1e-4)
    assert _scored(tmp_path / "v", tiny_model, tokenizer, data) < 0.5 * facts["loss"][0]
