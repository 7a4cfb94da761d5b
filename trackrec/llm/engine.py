"""What sampling, greedy decoding and scoring need of a model server, and the one place that opens it.

All methods take token ids (`trackrec.llm.chat` renders them) and yield results as they are finished, in no fixed order,
each with the index of its prompt or group: a stage saves them as they come.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast

from trackrec.config import EngineSettings

# A prefix and the suffixes that follow it: here one (context, item) and its N RecCoTs, each up to the answer.
Group = tuple[list[int], Sequence[list[int]]]


class PromptTooLongError(ValueError):
    """A prompt that leaves no room for the tokens that are to follow it."""

    def __init__(self, prompt: int, new: int, limit: int) -> None:
        self.prompt, self.new, self.limit = prompt, new, limit
        super().__init__(
            f"a prompt of {prompt} tokens and {new} new ones exceed the model's {limit}; lower "
            "`contexts.history_length` or `max_tokens` (in vLLM, or raise `engine.max_model_len` where it can be)"
        )


@dataclass(frozen=True)
class Completion:
    """`text` without special tokens; `num_tokens` counts the end-of-sequence token if the model wrote one ("stop")."""

    text: str
    num_tokens: int
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    tokenizer: PreTrainedTokenizerFast

    def sample(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[Sequence[int]],
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Algorithm 1's sampling: for each prompt one completion a seed, in the seeds' order."""
        ...

    def greedy(
        self, prompts: Sequence[list[int]], *, max_tokens: int, repetition_penalty: float
    ) -> Iterator[tuple[int, Completion]]:
        """The likeliest token at each step, `repetition_penalty` applied to all of prompt and completion so far."""
        ...

    def score(self, groups: Sequence[Group]) -> Iterator[tuple[int, np.ndarray]]:
        """Algorithm 1's P(Yes) and P(No) as next token after prefix + suffix, normalised over the two.

        Yields:
            a group's index, and float64 [number of suffixes, 2]: p_yes, p_no; each row sums to 1.
        """
        ...


def open_engine(settings: EngineSettings, base_model: Path, model: Path) -> Engine:
    """The engine of `settings.kind`, with `model` (full weights, or an adapter on `base_model`) loaded.

    Raises:
        WrongBaseError: `model` is an adapter on another base.
        CorruptError: `model` is a stage's output and differs from its checksums.
    """
    from trackrec.llm.models import check_whole, load_model, load_tokenizer

    check_whole(base_model, model)
    if settings.kind == "vllm":
        from trackrec.llm.vllm_engine import VllmEngine

        return VllmEngine(settings, base_model, model)
    from trackrec.llm.transformers_engine import TransformersEngine

    loaded = load_model(base_model, model, dtype=settings.dtype)
    return TransformersEngine(load_tokenizer(base_model), loaded, settings.batch_tokens)
