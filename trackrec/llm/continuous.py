"""Continuous batching over transformers: rows join and leave the batch at every step.

`TransformersEngine` runs a batch until its last row ends; here a row that ends makes room for the next prompt at once,
which is what a server needs, whose requests come one by one. A row's tokens do not depend on what runs beside it, up
to rounding: greedy rows write what `TransformersEngine.greedy` writes, sampled ones draw from their own seed.
"""

import secrets
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trackrec.llm import slot_cache
from trackrec.llm.engine import Completion, PromptTooLongError
from trackrec.llm.sampling import keep_top, nucleus, penalise_repetition
from trackrec.llm.shared_prefix import PrefixRecorder
from trackrec.llm.slot_cache import SlotCache
from trackrec.llm.text_stream import TextStream
from trackrec.llm.transformers_engine import Float32Head

FinishReason = Literal["stop", "length"]
# Prompts are prefilled together where padding adds at most this share to the longest one.
_PADDING = 0.125
# As vLLM has it: below the one a temperature counts as 0, below the other as that one, or logits would overflow.
_GREEDY_BELOW, _COLDEST = 1e-5, 0.01
# peft's name for a row without an adapter.
_BASE = "__base__"


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen; names and defaults are those of vLLM's `SamplingParams`.

    `temperature` 0 is greedy. `top_k` 0 or -1 keeps all. `max_tokens` None writes until the model's length is full.
    `stop`: strings that end the text and do not belong to it. `lora`: the adapter's name, None for the weights alone.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    repetition_penalty: float = 1.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    lora: str | None = None


@dataclass(frozen=True)
class Progress:
    """What a request has newly got: text, and how many tokens; `finish_reason` comes with the last one."""

    id: Hashable
    text: str
    num_tokens: int
    finish_reason: FinishReason | None


@dataclass(eq=False)
class _Row:
    id: Hashable
    prompt: list[int]
    sampling: Sampling
    # Whether progress is wanted before the end.
    stream: bool
    # The tokens that its slot may have to hold, and those that it holds.
    need: int
    held: int = 0
    seed: int = 0
    tokens: list[int] = field(default_factory=list)
    reported: int = 0
    text: TextStream | None = None
    # bool [V], for the repetition penalty.
    seen: Tensor | None = None

    def last(self) -> int:
        """The token whose successor the next step chooses."""
        return self.tokens[-1] if self.tokens else self.prompt[-1]


class ContinuousEngine:
    """Not thread-safe: one thread adds requests, cancels them and takes steps.

    Args:
        model: in eval mode, on the device to run on; a `PeftModel` with `adapters`' values as its adapters' names.
        adapters: names that requests ask for, to names in the model.
        max_rows: the most requests that are decoded at once.
        cache_tokens: bounds the tokens whose keys and values are held: rows times the longest row's prompt and
            `max_tokens`. A single row always runs.
        prefill_tokens: bounds the prompts' tokens that join in one step; a single prompt always does.
        max_length: the most tokens of a prompt with its completion; by default, and at most, the model's positions.

    Raises:
        UnsupportedModelError: the model's attention is not plain causal attention.
        ValueError: `max_length` is more than the model has positions for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        model: PreTrainedModel | PeftModel,
        *,
        adapters: Mapping[str, str] | None = None,
        max_rows: int = 64,
        cache_tokens: int = 65536,
        prefill_tokens: int = 2048,
        max_length: int | None = None,
    ) -> None:
        positions = int(model.config.max_position_embeddings)
        if max_length is not None and max_length > positions:
            raise ValueError(f"a length of {max_length} tokens exceeds the model's {positions} positions; lower it")
        slot_cache.enable(model)
        self.tokenizer = tokenizer
        self.model: Any = model
        self.adapters = dict(adapters or {})
        self.max_rows, self.cache_tokens, self.prefill_tokens = max_rows, cache_tokens, prefill_tokens
        self.max_length = max_length or positions
        if self.model.dtype != torch.float32:
            self.model.set_output_embeddings(Float32Head(self.model.get_output_embeddings()))
        self.device = self.model.device
        stops = self.model.generation_config.eos_token_id
        self._stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
        self._cache = SlotCache()
        # By slot; None where a row has left and no other has taken its place yet.
        self._slots: list[_Row | None] = []
        self._waiting: deque[_Row] = deque()
        # What was computed so far: prompts' tokens, tokens written, and the decoding steps that wrote them.
        self.prompt_tokens = self.written_tokens = self.decoding_steps = 0

    @property
    def running(self) -> int:
        return sum(row is not None for row in self._slots)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, id: Hashable, prompt: list[int], sampling: Sampling, *, stream: bool = False) -> None:
        """Queues a request.

        Args:
            id: unique among the requests under way.
            stream: report each step's text, not the whole one at the end.

        Raises:
            PromptTooLongError: the prompt leaves no room for `min_tokens`, or for a single one.
            ValueError: the prompt is empty, or there is no such adapter.
        """
        if not prompt:
            raise ValueError("the prompt has no token; give some text")
        if len(prompt) + max(1, sampling.min_tokens) > self.max_length:
            raise PromptTooLongError(len(prompt), max(1, sampling.min_tokens), self.max_length)
        if sampling.lora is not None and sampling.lora not in self.adapters:
            raise ValueError(f"there is no LoRA {sampling.lora!r}; there are: {', '.join(self.adapters) or 'none'}")
        room = self.max_length - len(prompt)
        row = _Row(id, prompt, sampling, stream, len(prompt) + min(sampling.max_tokens or room, room))
        row.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        if stream or sampling.stop:
            row.text = TextStream(self.tokenizer.backend_tokenizer, sampling.stop)
        self._waiting.append(row)

    def cancel(self, id: Hashable) -> bool:
        """Drops a request: its place is free for the next step. Whether it was under way."""
        for row in self._waiting:
            if row.id == id:
                self._waiting.remove(row)
                return True
        for slot, running in enumerate(self._slots):
            if running is not None and running.id == id:
                self._slots[slot] = None
                return True
        return False

    def step(self) -> list[Progress]:
        """Lets waiting requests in, if there is room for some, or else writes each running row's next token."""
        if joining := self._next_rows():
            self._join(joining)
            return []
        return self._decode()

    def generate(self, prompts: Iterable[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Completions of texts, tokenised as they are; as they are finished, each with its prompt's index.

        Raises:
            PromptTooLongError: as `add`.
        """
        if self.running or self.waiting:
            raise RuntimeError("the engine is busy; `generate` runs alone")
        queue = enumerate(prompts)
        try:
            while True:
                # As many again as run at once wait: no slot stays empty, and memory stays bounded.
                while self.waiting < self.max_rows and (entry := next(queue, None)):
                    self.add(entry[0], self.tokenizer(entry[1])["input_ids"], sampling)
                if not self.running and not self.waiting:
                    return
                for done in self.step():
                    assert isinstance(done.id, int) and done.finish_reason is not None
                    yield done.id, Completion(done.text, done.num_tokens, done.finish_reason)
        finally:
            self._waiting.clear()
            self._slots.clear()

    def _next_rows(self) -> list[_Row]:
        """Takes those from the queue that there is room for, first come, first served."""
        need = max((row.need for row in self._slots if row is not None), default=0)
        count, tokens, chosen = self.running, 0, list[_Row]()
        while self._waiting and count < self.max_rows:
            row = self._waiting[0]
            need, count, tokens = max(need, row.need), count + 1, tokens + len(row.prompt)
            if (count > 1 and count * need > self.cache_tokens) or (chosen and tokens > self.prefill_tokens):
                break
            chosen.append(self._waiting.popleft())
        return chosen

    @torch.inference_mode()
    def _join(self, rows: list[_Row]) -> None:
        self._make_room(rows)
        for row in rows:
            if row.sampling.repetition_penalty != 1:
                row.seen = torch.zeros(self.model.config.vocab_size, dtype=torch.bool, device=self.device)
                row.seen[row.prompt] = True
            # Its last token is the first one that a step takes in, so prompts need no logits.
            row.held = len(row.prompt) - 1
            self.prompt_tokens += len(row.prompt)
        rows = sorted(rows, key=lambda row: row.held, reverse=True)
        start = 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or rows[end].held < (1 - _PADDING) * rows[start].held:
                self._prefill(rows[start:end])
                start = end

    def _make_room(self, rows: list[_Row]) -> None:
        """Gives `rows` slots: those that others have left first."""
        live = [*(row for row in self._slots if row is not None), *rows]
        need = max(row.need for row in live)
        if need > self._cache.capacity or len(live) > self._cache.slots:
            self._close_gaps()
            # Twice as many slots as before: few requests take little memory, and many soon have theirs.
            slots = max(len(live), min(2 * self._cache.slots, self.max_rows, self.cache_tokens // need))
            self._cache.fit(slots, need, len(self._slots))
        free = (slot for slot, row in enumerate(self._slots) if row is None)
        for row in rows:
            slot = next(free, None)
            if slot is None:
                self._slots.append(row)
            else:
                self._slots[slot] = row

    def _prefill(self, rows: list[_Row]) -> None:
        longest = rows[0].held
        if longest == 0:
            return
        # Padded on the right, where causal attention needs no mask: no token sees what comes after it.
        pad = self._pad()
        tokens = self._tensor([row.prompt[:-1] + [pad] * (longest - row.held) for row in rows])
        recorded = PrefixRecorder()
        self._forward(rows, tokens, torch.arange(longest, device=self.device)[None], past_key_values=recorded)
        self._cache.write(recorded, self._tensor([self._slots.index(row) for row in rows]))

    @torch.inference_mode()
    def _decode(self) -> list[Progress]:
        rows = self._close_gaps()
        if not rows:
            return []
        lengths = self._tensor([row.held for row in rows])
        self._cache.begin(lengths)
        last = self._tensor([[row.last()] for row in rows])
        logits = self._forward(rows, last, lengths[:, None], past_key_values=self._cache, slots=self._cache)
        progress = []
        for slot, (row, token) in enumerate(zip(rows, self._choose(rows, logits[:, 0].float()), strict=True)):
            if row.seen is not None:
                row.seen[token] = True
            row.held += 1
            row.tokens.append(token)
            reason = self._finish_reason(row)
            if reason is not None:
                self._slots[slot] = None
            if reason is not None or row.stream:
                progress += self._progress(row, reason)
        self.written_tokens += len(rows)
        self.decoding_steps += 1
        return progress

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> list[int]:
        """The rows' next tokens from `logits` [R, V]."""
        penalised = [i for i, row in enumerate(rows) if row.seen is not None]
        if penalised:
            seen = torch.stack([rows[i].seen for i in penalised])  # type: ignore[misc]
            penalties = self._tensor([[rows[i].sampling.repetition_penalty] for i in penalised]).float()
            if len(penalised) == len(rows):
                # The usual case, without copies of the rows.
                logits = penalise_repetition(logits, seen, penalties)
            else:
                logits[penalised] = penalise_repetition(logits[penalised], seen, penalties)
        for i, row in enumerate(rows):
            if len(row.tokens) < row.sampling.min_tokens and not row.sampling.ignore_eos:
                logits[i, list(self._stops)] = float("-inf")
        tokens = logits.argmax(-1)
        drawn = [i for i, row in enumerate(rows) if row.sampling.temperature >= _GREEDY_BELOW]
        if drawn:
            own = [rows[i].sampling for i in drawn]
            scaled = logits[drawn] / self._tensor([[max(sampling.temperature, _COLDEST)] for sampling in own])
            scaled = keep_top(scaled, [sampling.top_k for sampling in own])
            top_p = self._tensor([sampling.top_p for sampling in own])
            seeds = self._tensor([rows[i].seed for i in drawn])
            tokens[drawn] = nucleus(scaled, top_p, seeds, self._tensor([len(rows[i].tokens) for i in drawn]))
        return tokens.tolist()

    def _finish_reason(self, row: _Row) -> FinishReason | None:
        token = row.tokens[-1]
        if token in self._stops and not row.sampling.ignore_eos:
            return "stop"
        if row.text is not None:
            row.text.add(token)
            if len(row.tokens) >= row.sampling.min_tokens and row.text.cut():
                return "stop"
        return "length" if len(row.prompt) + len(row.tokens) >= row.need else None

    def _progress(self, row: _Row, reason: FinishReason | None) -> list[Progress]:
        if reason is None:
            text = row.text.take(finished=False) if row.text is not None else ""
            if not text:
                # A character, or what may be a stop string, is not whole yet: its tokens are reported with it.
                return []
        elif row.text is not None:
            if not row.text.was_cut:
                row.text.finish(self._text(row))
            text = row.text.take(finished=True)
        else:
            text = self._text(row)
        new, row.reported = len(row.tokens) - row.reported, len(row.tokens)
        return [Progress(row.id, text, new, reason)]

    def _text(self, row: _Row) -> str:
        tokens = row.tokens
        if tokens[-1] in self._stops and not row.sampling.ignore_eos:
            tokens = tokens[:-1]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _close_gaps(self) -> list[_Row]:
        """Moves the last rows into slots that others have left: a step runs over the first ones, without a gap."""
        for slot, row in enumerate(self._slots):
            while self._slots and self._slots[-1] is None:
                self._slots.pop()
            if row is None and slot < len(self._slots):
                moved = self._slots.pop()
                assert moved is not None
                self._cache.move(len(self._slots), slot, moved.held)
                self._slots[slot] = moved
        return [row for row in self._slots if row is not None]

    def _forward(self, rows: Sequence[_Row], tokens: Tensor, positions: Tensor, **cache: Any) -> Tensor:
        """The logits after the last of `tokens`, [R, 1, V]."""
        if self.adapters:
            names = [_BASE if row.sampling.lora is None else self.adapters[row.sampling.lora] for row in rows]
            cache["adapter_names"] = names
        return self.model(input_ids=tokens, position_ids=positions, use_cache=True, logits_to_keep=1, **cache).logits

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else pad

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, device=self.device)
