from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trackrec.align import distillation
from trackrec.align.distillation import Demonstration
from trackrec.align.training import EmptyTrainingError, TooLongError
from trackrec.config import LoraSettings, SftSettings
from trackrec.llm.chat import encode_chat
from trackrec.llm.models import load_model

RECOT = "Likes noir."


def _demonstration(recot: str = RECOT, finished: bool = True, prompt: str = "Summarize.") -> Demonstration:
    return Demonstration("c0", prompt, recot, finished)


def test_the_loss_is_on_the_completion_and_its_end_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    [row] = distillation.encode(tokenizer, [_demonstration()], max_length=100)
    learnt = row["labels"].index(next(label for label in row["labels"] if label != -100))
    assert tokenizer.decode(row["input_ids"][:learnt]).endswith(
        "<|im_start|>user\nSummarize.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert row["labels"][:learnt] == [-100] * learnt
    # The words one by one, then the turn's end; nothing after it.
    assert [tokenizer.decode(label) for label in row["labels"][learnt:]] == [
        "L",
        "ikes",
        " no",
        "ir",
        ".",
        "<|im_end|>",
    ]
    assert row["input_ids"][learnt:] == row["labels"][learnt:]


def test_the_prompt_is_what_the_generator_is_sampled_with(tokenizer: PreTrainedTokenizerFast) -> None:
    [row] = distillation.encode(tokenizer, [_demonstration()], max_length=100)
    prompt = encode_chat(tokenizer, "Summarize.")
    assert row["input_ids"][: len(prompt)] == prompt


def test_a_recot_cut_off_at_its_limit_does_not_teach_to_stop_there(tokenizer: PreTrainedTokenizerFast) -> None:
    [row] = distillation.encode(tokenizer, [_demonstration(finished=False)], max_length=100)
    assert tokenizer.decode(row["labels"][-1]) == "."


def test_chat_markup_inside_a_recot_is_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    [row] = distillation.encode(tokenizer, [_demonstration("<|im_end|> more")], max_length=100)
    assert row["labels"].count(tokenizer.eos_token_id) == 1
    assert row["labels"][-1] == tokenizer.eos_token_id


def test_what_is_too_long_is_refused_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    [row] = distillation.encode(tokenizer, [_demonstration()], max_length=100)
    length = len(row["input_ids"])
    distillation.encode(tokenizer, [_demonstration()], max_length=length)
    with pytest.raises(TooLongError, match=f"context c0 has {length} tokens, more than max_length {length - 1}"):
        distillation.encode(tokenizer, [_demonstration()], max_length=length - 1)


def test_nothing_to_learn_from_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(EmptyTrainingError, match=r"raise `distill_data.share`"):
        distillation.distil(SftSettings(), [], tiny_model, tmp_path / "out", tmp_path / "work", seed=0)


def _negative_log_likelihood(model: Path, base: Path, rows: list[dict[str, list[int]]]) -> float:
    """Mean over the completions' tokens, row by row, with plain cross-entropy."""
    network = load_model(base, model, dtype="float32")
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = network(torch.tensor([row["input_ids"]])).logits[0, :-1]
        losses.append(
            torch.nn.functional.cross_entropy(
                logits, torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="none"
            )
        )
    tokens = sum(label != -100 for row in rows for label in row["labels"])
    return torch.cat(losses).sum().item() / tokens


@pytest.mark.parametrize("lora", [LoraSettings(r=4), None], ids=["lora", "full"])
def test_training_lowers_the_loss_it_reports(
    lora: LoraSettings | None, tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    # Lengths differ, so that a mean over rows would not be the mean over tokens.
    texts = ["Likes noir and little else.", "Heist films.", "Prefers slow dramas of the seventies, above all."]
    data = [_demonstration(text, prompt=f"Summarize user {number}.") for number, text in enumerate(texts)]
    settings = SftSettings(
        lora=lora, learning_rate=1e-2, batch_size=4, micro_batch_size=2, epochs=5, lr_schedule="constant"
    )
    facts = distillation.distil(settings, data, tiny_model, tmp_path / "out", tmp_path / "work", seed=0)
    rows = distillation.encode(tokenizer, data, 100)
    assert facts["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert facts["loss"][0] == pytest.approx(_negative_log_likelihood(tiny_model, tiny_model, rows), rel=1e-4)
    assert _negative_log_likelihood(tmp_path / "out", tiny_model, rows) < 0.8 * facts["loss"][0]
