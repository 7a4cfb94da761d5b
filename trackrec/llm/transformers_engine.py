"""The embedded engine: a transformers model, one prompt encoded once for all rows that follow it.

Results do not depend on how prompts are batched, up to rounding: every sample draws from its own seed.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trackrec.llm import shared_prefix
from trackrec.llm.engine import Completion, Group, PromptTooLongError
from trackrec.llm.sampling import nucleus, penalise_repetition
from trackrec.llm.shared_prefix import PrefixRecorder, SharedPrefixCache
from trackrec.llm.tokens import yes_no_ids

# (logits [R, V], the rows' numbers [R] in the batch, step) → the rows' next tokens [R]
Choose = Callable[[Tensor, Tensor, int], Tensor]
# Finished rows are cut out of a batch once at most this share of it stays: doing so copies the cache.
_COMPACT_AT = 0.75


class Float32Head(nn.Module):
    """The language-model head in float32: bfloat16 logits lie 0.125 apart around 20, too coarse to rank RecCoTs by."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        # A copy, since it may share its weights with the input embeddings.
        self.head = copy.deepcopy(head).float()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden.float())


class TransformersEngine:
    """`trackrec.llm.engine.Engine` over transformers.

    Args:
        model: in eval mode, on the device to run on.
        batch_tokens: bounds the tokens whose keys and values one batch holds, padding included; a single prompt with
            its rows always makes a batch.

    Raises:
        UnsupportedModelError: the model's attention is not plain causal attention.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel | PeftModel, batch_tokens: int
    ) -> None:
        self.tokenizer = tokenizer
        self.model: Any = model
        self.batch_tokens = batch_tokens
        shared_prefix.enable(model)
        if self.model.dtype != torch.float32:
            self.model.set_output_embeddings(Float32Head(self.model.get_output_embeddings()))
        self.device = self.model.device
        stops = self.model.generation_config.eos_token_id
        stops = {*(stops if isinstance(stops, list) else [stops]), self.tokenizer.eos_token_id} - {None}
        self._stops = torch.tensor(sorted(stops), dtype=torch.long, device=self.device)

    def sample(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[Sequence[int]],
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See `Engine.sample`."""
        costs = [(len(seed), len(prompt), max_tokens) for prompt, seed in zip(prompts, seeds, strict=True)]
        for batch in self._batches(costs):
            own = torch.tensor([seed for i in batch for seed in seeds[i]], device=self.device)

            def choose(logits: Tensor, rows: Tensor, step: int, own: Tensor = own) -> Tensor:
                return nucleus(logits / temperature, top_p, own[rows], step)

            rows = self._decode([prompts[i] for i in batch], len(seeds[batch[0]]), max_tokens, choose)
            yield from zip(batch, rows, strict=True)

    def greedy(
        self, prompts: Sequence[list[int]], *, max_tokens: int, repetition_penalty: float
    ) -> Iterator[tuple[int, Completion]]:
        """See `Engine.greedy`."""
        for batch in self._batches([(1, len(prompt), max_tokens) for prompt in prompts]):
            seen = torch.zeros(len(batch), self.model.config.vocab_size, dtype=torch.bool, device=self.device)
            for row, i in enumerate(batch):
                seen[row, prompts[i]] = True

            def choose(logits: Tensor, rows: Tensor, step: int, seen: Tensor = seen) -> Tensor:
                tokens = penalise_repetition(logits, seen[rows], repetition_penalty).argmax(-1)
                seen[rows, tokens] = True
                return tokens

            rows = self._decode([prompts[i] for i in batch], 1, max_tokens, choose)
            yield from ((i, completion) for i, [completion] in zip(batch, rows, strict=True))

    @torch.inference_mode()
    def score(self, groups: Sequence[Group]) -> Iterator[tuple[int, np.ndarray]]:
        """See `Engine.score`."""
        answers = list(yes_no_ids(self.tokenizer))
        costs = [(len(suffixes), len(prefix), max(map(len, suffixes))) for prefix, suffixes in groups]
        for batch in self._batches(costs):
            rows, longest = costs[batch[0]][0], max(costs[i][2] for i in batch)
            prefixes = [groups[i][0] for i in batch]
            cache = self._encode(prefixes, rows, longest)
            suffixes = [suffix for i in batch for suffix in groups[i][1]]
            # Padded on the left, so that the answer's logits are the last position's in every row.
            pads = torch.tensor([longest - len(suffix) for suffix in suffixes], device=self.device)
            tokens = self._ids([[self.tokenizer.pad_token_id] * (longest - len(s)) + s for s in suffixes])
            starts = torch.tensor([len(p) for p in prefixes], device=self.device).repeat_interleave(rows)
            place = torch.arange(longest, device=self.device)
            causal = place[:, None] >= place
            logits = self._forward(
                tokens,
                (starts - pads)[:, None] + place,
                cache,
                mask=(causal & (place >= pads[:, None, None]))[:, None],
            )
            p = logits[:, answers].double().softmax(-1).cpu().numpy().reshape(len(batch), rows, 2)
            yield from zip(batch, p, strict=True)

    def _batches(self, costs: Sequence[tuple[int, int, int]]) -> Iterator[list[int]]:
        """Cuts prompts, given as (rows, prompt length, tokens a row adds), into batches of alike ones: equal numbers of
        rows, neighbours in length, within `batch_tokens`. The longest first: what does not fit in memory fails at once.
        """
        batch: list[int] = []
        most, added = 0, 0
        for i in sorted(range(len(costs)), key=lambda i: costs[i], reverse=True):
            rows, length, suffix = costs[i]
            most, added = max(most, length), max(added, suffix)
            if batch and (rows != costs[batch[0]][0] or (len(batch) + 1) * (most + rows * added) > self.batch_tokens):
                yield batch
                batch, most, added = [], length, suffix
            batch.append(i)
        if batch:
            yield batch

    @torch.inference_mode()
    def _decode(
        self, prompts: Sequence[list[int]], rows: int, max_tokens: int, choose: Choose
    ) -> list[list[Completion]]:
        """Writes `rows` completions of each prompt, token by token, all rows in step."""
        # A prompt's last token is the first one its rows take in, so that no row needs the prefix's logits.
        cache = self._encode([prompt[:-1] for prompt in prompts], rows, max_tokens)
        tokens = self._ids([[prompt[-1]] for prompt in prompts for _ in range(rows)])
        positions = torch.tensor([[len(prompt) - 1] for prompt in prompts for _ in range(rows)], device=self.device)
        written = torch.full((len(tokens), max_tokens), -1, device=self.device)
        numbers = torch.arange(len(tokens), device=self.device)
        alive = torch.ones_like(numbers, dtype=torch.bool)
        for step in range(max_tokens):
            tokens = choose(self._forward(tokens, positions, cache), numbers, step)[:, None]
            written[numbers[alive], step] = tokens[alive, 0]
            alive &= ~torch.isin(tokens[:, 0], self._stops)
            positions = positions + 1
            if not alive.any():
                break
            grid = alive.view(cache.shape)
            prefixes, width = grid.any(1).nonzero()[:, 0], int(grid.sum(1).max())
            if len(prefixes) * width <= _COMPACT_AT * len(alive):
                # The rows still alive first, finished ones to fill up where a prefix has fewer than `width`.
                order = (~grid[prefixes]).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
                kept = prefixes[:, None] * grid.shape[1] + order
                cache.keep(prefixes, kept)
                kept = kept.flatten()
                tokens, positions, numbers, alive = tokens[kept], positions[kept], numbers[kept], alive[kept]
        completions = [self._completion(row) for row in written.tolist()]
        return [completions[start : start + rows] for start in range(0, len(completions), rows)]

    def _completion(self, row: list[int]) -> Completion:
        tokens = [token for token in row if token >= 0]
        stopped = tokens[-1] in self._stops.tolist()
        text = str(self.tokenizer.decode(tokens[:-1] if stopped else tokens, skip_special_tokens=True))
        return Completion(text, len(tokens), "stop" if stopped else "length")

    def _encode(self, prefixes: Sequence[list[int]], rows: int, capacity: int) -> SharedPrefixCache:
        """The prefixes' keys and values, for `rows` rows each of at most `capacity` more tokens."""
        if not all(prefixes):
            raise ValueError("a prompt must have at least two tokens, and a group's prefix one")
        longest, limit = max(map(len, prefixes)), self.model.config.max_position_embeddings
        if longest + capacity > limit:
            raise PromptTooLongError(longest, capacity, limit)
        # Padded on the right, where causal attention needs no mask: no token sees what comes after it.
        tokens = self._ids([p + [self.tokenizer.pad_token_id] * (longest - len(p)) for p in prefixes])
        recorded = PrefixRecorder()
        positions = torch.arange(longest, device=self.device)[None]
        self.model(input_ids=tokens, position_ids=positions, past_key_values=recorded, use_cache=True, logits_to_keep=1)
        lengths = torch.tensor([len(p) for p in prefixes], device=self.device)
        return SharedPrefixCache(recorded, lengths, rows, capacity)

    def _forward(
        self, tokens: Tensor, positions: Tensor, cache: SharedPrefixCache, mask: Tensor | None = None
    ) -> Tensor:
        """The logits after the last of the rows' new tokens, float32 [R, V]."""
        return (
            self.model(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                shared_prefix=cache,
            )
            .logits[:, 0]
            .float()
        )

    def _ids(self, rows: Sequence[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self.device)
