"""Rec-tuning: the validator V learns P(y | u, i, G(u)) (paper 3.4, eq. 5-6; Algorithm 2, stage 2).

V(u, i, G(u)) is Algorithm 1's normalised probability, P(Yes) / (P(Yes) + P(No)) of the next token, which is the
logistic function of the difference of the two logits. So eq. 6 (printed without its minus sign) is the binary
cross-entropy of that difference, and V is trained on the very number that scores RecCoTs and is evaluated. A
cross-entropy over the whole vocabulary would add a term for the mass on other tokens, which normalising discards.

Every example is a row of its own. Sharing the history among a context's examples would gain nothing where contexts are
rolling: MovieLens-1M has 33,891 train examples in 32,975 contexts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from trackrec.align import training
from trackrec.config import Domain, RecTuneSettings
from trackrec.llm.chat import encode_rec
from trackrec.llm.models import load_tokenizer
from trackrec.llm.tokens import yes_no_ids
from trackrec.prompts.render import ShownItem


@dataclass(frozen=True)
class Example:
    """(u_i, i_i, y_i) with G(u_i)."""

    row_id: int
    domain: Domain
    history: Sequence[ShownItem]
    title: str
    label: int
    # None: the control without RecCoTs.
    recot: str | None


class RecTuningLoss(nn.Module):
    """Binary cross-entropy of V's normalised P(Yes) (eq. 6 with its minus sign).

    Args:
        yes_id, no_id: the token ids of "Yes" and "No".
    """

    def __init__(self, yes_id: int, no_id: int) -> None:
        super().__init__()
        self.yes_id = yes_id
        self.no_id = no_id

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """
        Args:
            logits: of the token after the prompt, [B, V].
            labels: y, 1 for Yes and 0 for No, [B].
        Returns:
            Losses, float32 [B].
        """
        answers = logits.float()
        difference = answers[:, self.yes_id] - answers[:, self.no_id]
        return F.binary_cross_entropy_with_logits(difference, labels.float(), reduction="none")


def encode(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], max_length: int) -> list[dict[str, Any]]:
    """prompt^Rec up to the answer, by the rendering that scoring and evaluation use: {"input_ids": […], "label": y}.

    Raises:
        TooLongError: a prompt has more than `max_length` tokens.
    """
    rows = []
    for example in examples:
        prefix, [suffix] = encode_rec(tokenizer, example.domain, example.history, example.title, [example.recot])
        training.check_length(len(prefix) + len(suffix), max_length, f"example {example.row_id}")
        rows.append({"input_ids": prefix + suffix, "label": example.label})
    return rows


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows padded on the right, and where each one's answer is predicted.

    [{"input_ids": [5, 6, 7], "label": 1}, {"input_ids": [8], "label": 0}] gives

        {"input_ids": [[5, 6, 7], [8, 0, 0]], "last": [2, 0], "labels": [1, 0]}

    No attention mask: attention is causal, so no token of a prompt sees the padding behind it.
    """
    prompts = [torch.tensor(row["input_ids"]) for row in rows]
    return {
        "input_ids": pad_sequence(prompts, batch_first=True),
        "last": torch.tensor([len(prompt) - 1 for prompt in prompts]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


class RecTuningTrainer(training.MeanLossTrainer):
    """Trains on `RecTuningLoss`; the language-model head runs at the answer position only."""

    # Set once the trainer is made: the answers' ids are the tokenizer's.
    loss: RecTuningLoss

    def example_losses(self, model: PreTrainedModel | PeftModel, batch: dict[str, Any]) -> Tensor:
        causal_lm = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
        hidden = causal_lm.get_decoder()(batch["input_ids"], use_cache=False).last_hidden_state
        answers = hidden[torch.arange(len(hidden), device=hidden.device), batch["last"]]
        return self.loss(causal_lm.get_output_embeddings()(answers), batch["labels"])


def tune(
    settings: RecTuneSettings,
    examples: Sequence[Example],
    base_model: Path,
    validator: Path,
    out: Path,
    work: Path,
    seed: int,
) -> dict[str, Any]:
    """Trains V on from `validator`, which may be the base model itself; returns the training's facts.

    Args:
        out: where the tuned V goes. work: survives a kill; holds the checkpoints.
    Raises:
        EmptyTrainingError: no example.
        TooLongError: a prompt has more than `settings.max_length` tokens.
        TokenizerError: Yes and No are not single tokens.
    """
    if not examples:
        raise training.EmptyTrainingError("no train example to tune the validator on; look at what `contexts` dropped")
    tokenizer = load_tokenizer(base_model)
    rows = encode(tokenizer, examples, settings.max_length)
    args = TrainingArguments(**training.arguments(settings, work, seed))
    trainer = RecTuningTrainer(
        model=training.load_trainable(settings, base_model, validator, seed),
        args=args,
        data_collator=collate,
        train_dataset=rows,  # type: ignore[arg-type]  # a list is a map-style dataset
    )
    trainer.loss = RecTuningLoss(*yes_no_ids(tokenizer))
    facts = training.train(trainer, tokens=sum(len(row["input_ids"]) for row in rows))
    training.save(trainer, tokenizer, base_model, out)
    return facts
