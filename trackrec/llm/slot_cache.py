"""Keys and values of rows that join and leave a batch at any step: one slot a row, each filled to its own length.

The rows that run sit in the first slots, so that a step's attention reads slices of the cache and copies none of it.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trackrec.llm.attention import require_plain_causal
from trackrec.llm.shared_prefix import PrefixRecorder

NAME = "trackrec_slots"
# A slot's length is rounded up to this many tokens, so that a little longer row does not move the whole cache.
_ROUND = 64


def enable(model: PreTrainedModel | PeftModel) -> None:
    """Makes `model` attend through `attend`; without a `SlotCache` it still computes plain causal attention.

    Raises:
        UnsupportedModelError: some layers use a sliding window, linear attention or soft-capped logits.
    """
    require_plain_causal(model, instead="serve it with vLLM on a GPU")
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)


class SlotCache:
    """The slots: per layer keys and values [2, slots, kv heads, capacity, head size].

    `take` them for new rows, `write` what their prompts give, `begin` a step for the first rows, `move` a row down
    where one has left.
    """

    def __init__(self) -> None:
        self.layers: list[Tensor] = []
        self.slots = 0
        self.capacity = 0
        # Of the step that runs: where each row's new token goes [R], and which tokens it sees [R, 1, 1, T].
        self._places = torch.empty(0, dtype=torch.long)
        self._longest = 0
        self.mask: Tensor | None = None

    def fit(self, slots: int, capacity: int, filled: int) -> None:
        """Makes room for `slots` rows of `capacity` tokens; the first `filled` slots keep what they hold."""
        capacity = -(-capacity // _ROUND) * _ROUND
        if slots == self.slots and capacity == self.capacity:
            return
        for layer, old in enumerate(self.layers):
            kept = min(capacity, self.capacity)
            # Zeros: what lies beyond a row's length has no weight, but 0 times NaN would be NaN.
            new = old.new_zeros(2, slots, old.shape[2], capacity, old.shape[4])
            new[:, :filled, :, :kept] = old[:, :filled, :, :kept]
            # One layer after the other, so that never two whole caches are held.
            self.layers[layer] = new
        self.slots, self.capacity = slots, capacity

    def write(self, prompts: PrefixRecorder, slots: Tensor) -> None:
        """The prompts' keys and values [B, kv heads, P, head size], padded on the right, into `slots` [B]."""
        length = prompts.keys[0].shape[2]
        for number, (key, value) in enumerate(zip(prompts.keys, prompts.values, strict=True)):
            layer = self._layer(number, key)
            layer[0, slots, :, :length] = key
            layer[1, slots, :, :length] = value

    def move(self, source: int, target: int, length: int) -> None:
        """Slot `source`'s first `length` tokens to slot `target`."""
        for layer in self.layers:
            layer[:, target, :, :length] = layer[:, source, :, :length]

    def begin(self, lengths: Tensor) -> None:
        """A step of the first R slots, which hold `lengths` [R] tokens each: every row adds one."""
        self._places, self._longest = lengths, int(lengths.max()) + 1
        place = torch.arange(self._longest, device=lengths.device)
        self.mask = (place <= lengths[:, None])[:, None, None]

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds the rows' new tokens [R, kv heads, 1, head size]; returns all their tokens of that layer, padded."""
        rows = len(key)
        number = torch.arange(rows, device=key.device)
        states = self._layer(layer, key)
        states[0, number, :, self._places] = key[:, :, 0]
        states[1, number, :, self._places] = value[:, :, 0]
        return states[0, :rows, :, : self._longest], states[1, :rows, :, : self._longest]

    def _layer(self, number: int, key: Tensor) -> Tensor:
        """A layer's part of the cache, made where its first `key` [B, kv heads, L, head size] comes."""
        if number == len(self.layers):
            self.layers.append(key.new_zeros(2, self.slots, key.shape[1], self.capacity, key.shape[3]))
        return self.layers[number]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    slots: SlotCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [R, heads, L, size], key and value [R, kv heads, T, size] to
    [R, L, heads, size].

    Args:
        slots: the cache that key and value are from, L = 1; None: plain causal attention.
    """
    if slots is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    rows, heads, _, size = query.shape
    # One key/value head serves heads / kv_heads query heads: as that many queries of one head, nothing is repeated.
    query = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=cast(Tensor, slots.mask), scale=scaling)
    return attended.reshape(rows, 1, heads, size), None
