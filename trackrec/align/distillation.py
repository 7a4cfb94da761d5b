"""Distillation: supervised fine-tuning of the generator G on the teacher's RecCoTs (paper 3.5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from trackrec.align import training
from trackrec.config import SftSettings
from trackrec.llm.chat import encode_chat, encode_text
from trackrec.llm.models import load_tokenizer

_IGNORED = -100


@dataclass(frozen=True)
class Demonstration:
    """What the teacher answered to a context's prompt^CoT."""

    context_id: str
    prompt: str
    recot: str
    # False: the teacher was cut off at its token limit, so that G must not learn to stop there.
    finished: bool


def encode(
    tokenizer: PreTrainedTokenizerFast, demonstrations: Sequence[Demonstration], max_length: int
) -> list[dict[str, list[int]]]:
    """Token ids as G sees and writes them at sampling, and labels that leave the prompt out of the loss.

    For a prompt of ids [1, 5, 6, 2] and a finished RecCoT of [7, 8], with end-of-sequence 3:

        {"input_ids": [1, 5, 6, 2, 7, 8, 3], "labels": [-100, -100, -100, -100, 7, 8, 3]}

    Raises:
        TooLongError: a demonstration has more than `max_length` tokens.
    """
    rows = []
    for demonstration in demonstrations:
        prompt = encode_chat(tokenizer, demonstration.prompt)
        completion = encode_text(tokenizer, demonstration.recot)
        if demonstration.finished:
            completion.append(tokenizer.eos_token_id)
        training.check_length(len(prompt) + len(completion), max_length, f"context {demonstration.context_id}")
        rows.append({"input_ids": prompt + completion, "labels": [_IGNORED] * len(prompt) + completion})
    return rows


def distil(
    settings: SftSettings,
    demonstrations: Sequence[Demonstration],
    base_model: Path,
    out: Path,
    work: Path,
    seed: int,
) -> dict[str, Any]:
    """Trains G, from the base model, on the mean log-likelihood of the RecCoTs' tokens; returns the training's facts.

    Args:
        out: where G goes. work: survives a kill; holds the checkpoints.
    Raises:
        EmptyTrainingError: no demonstration.
        TooLongError: a demonstration has more than `settings.max_length` tokens.
    """
    if not demonstrations:
        raise training.EmptyTrainingError("no RecCoT to learn from; raise `distill_data.share`, or skip distillation")
    tokenizer = load_tokenizer(base_model)
    rows = encode(tokenizer, demonstrations, settings.max_length)
    # No max_length here: trl would cut silently, and `encode` has refused what is too long.
    args = SFTConfig(**training.arguments(settings, work, seed), max_length=None)
    trainer = SFTTrainer(
        model=training.load_trainable(settings, base_model, base_model, seed),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    facts = training.train(trainer, tokens=sum(len(row["input_ids"]) for row in rows))
    training.save(trainer, tokenizer, base_model, out)
    return facts
