"""Attention of many rows that share prefixes: each prefix's keys and values lie in memory once, not once a row.

Sampling N RecCoTs of one context, or scoring them, repeats one prompt N times. A plain cache holds, and at each step
reads, N copies of its keys and values. Here the N rows' queries are multiplied with the one copy in a single matrix
product, and one softmax runs over the prefix and the row's own tokens: a plain cache's numbers, up to rounding.
"""

from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trackrec.llm.attention import require_plain_causal

NAME = "trackrec_shared_prefix"


def enable(model: PreTrainedModel | PeftModel) -> None:
    """Makes `model` attend through `attend`; without a `SharedPrefixCache` it still computes plain causal attention.

    Raises:
        UnsupportedModelError: some layers use a sliding window, linear attention or soft-capped logits.
    """
    require_plain_causal(model, instead="run it with `engine.kind: vllm`")
    # With no mask function of that name, transformers builds no mask and hands a 4-D one through.
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)


class PrefixRecorder:
    """Stands for the cache while prefixes are encoded: each layer's keys and values, [B, kv heads, P, head size]."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.append(key)
        self.values.append(value)
        return key, value


class SharedPrefixCache:
    """Keys and values of B prefixes, and of the n rows that follow each: R = B·n rows, a prefix's rows side by side.

    Args:
        prefixes: the prefixes' keys and values, padded on the right.
        lengths: [B], the prefixes' lengths.
        rows: n.
        capacity: the most tokens a row will add.
    """

    def __init__(self, prefixes: PrefixRecorder, lengths: Tensor, rows: int, capacity: int) -> None:
        self.prefix_keys, self.prefix_values = prefixes.keys, prefixes.values
        self.prefix_padding = _padding(lengths, self.prefix_keys[0].shape[2])
        batch, heads, _, size = self.prefix_keys[0].shape
        self.shape = (batch, rows)
        self.length = 0
        self.keys = [k.new_empty(batch * rows, heads, capacity, size) for k in self.prefix_keys]
        self.values = [v.new_empty(batch * rows, heads, capacity, size) for v in self.prefix_values]

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds the rows' new tokens and returns all of the rows' own tokens of that layer, without the prefix."""
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        if layer == len(self.keys) - 1:
            self.length = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def keep(self, prefixes: Tensor, rows: Tensor) -> None:
        """Keeps `prefixes` [B'] and of the rows `rows` [B', n'], which belong to these prefixes, in this order."""
        whole = len(prefixes) == self.shape[0]
        self.shape = (len(prefixes), rows.shape[1])
        flat = rows.flatten()
        for layer in range(len(self.keys)):
            self.keys[layer] = self._select(self.keys[layer], flat)
            self.values[layer] = self._select(self.values[layer], flat)
            if not whole:
                self.prefix_keys[layer] = self.prefix_keys[layer][prefixes]
                self.prefix_values[layer] = self.prefix_values[layer][prefixes]
        if self.prefix_padding is not None:
            self.prefix_padding = self.prefix_padding[prefixes]

    def _select(self, states: Tensor, rows: Tensor) -> Tensor:
        kept = states.new_empty(len(rows), *states.shape[1:])
        kept[:, :, : self.length] = states[rows, :, : self.length]
        return kept


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    shared_prefix: SharedPrefixCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [R, heads, L, size], key and value [R, kv heads, T, size] to
    [R, L, heads, size].

    Args:
        attention_mask: bool [R, 1, L, T] over the rows' own tokens, True where a query sees a key; None: all (L = 1).
        shared_prefix: where the prefixes are; None: plain causal attention.
    """
    if shared_prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    layer = cast(int, module.layer_idx)
    prefix_key, prefix_value = shared_prefix.prefix_keys[layer], shared_prefix.prefix_values[layer]
    total, heads, length, size = query.shape
    kv_heads, own, shared = key.shape[1], key.shape[2], prefix_key.shape[2]
    batch, rows = shared_prefix.shape
    # One key/value head serves heads / kv_heads query heads: m queries a row and key/value head.
    m = heads // kv_heads * length
    query = (query * scaling).reshape(total, kv_heads, m, size)

    by_prefix = query.view(batch, rows, kv_heads, m, size).transpose(1, 2).reshape(batch, kv_heads, rows * m, size)
    prefix_scores = by_prefix @ prefix_key.transpose(2, 3)
    if shared_prefix.prefix_padding is not None:
        prefix_scores = prefix_scores.masked_fill(shared_prefix.prefix_padding, float("-inf"))
    own_scores = query @ key.transpose(2, 3)
    if attention_mask is not None:
        own_scores = own_scores.view(total, heads, length, own).masked_fill(~attention_mask, float("-inf"))

    # [B, kv heads, n, m, P + T]
    prefix_scores = prefix_scores.view(batch, kv_heads, rows, m, shared)
    own_scores = own_scores.view(batch, rows, kv_heads, m, own).transpose(1, 2)
    weights = torch.cat([prefix_scores, own_scores], dim=-1).softmax(-1, dtype=torch.float32).to(query.dtype)

    from_prefix = weights[..., :shared].reshape(batch, kv_heads, rows * m, shared) @ prefix_value
    from_prefix = from_prefix.view(batch, kv_heads, rows, m, size).transpose(1, 2)
    from_own = weights[..., shared:].transpose(1, 2).reshape(total, kv_heads, m, own) @ value
    attended = from_prefix.reshape(total, heads, length, size) + from_own.view(total, heads, length, size)
    return attended.transpose(1, 2).contiguous(), None


def _padding(lengths: Tensor, longest: int) -> Tensor | None:
    """bool [B, 1, 1, P], True at padding; None where there is none."""
    padding = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    return padding[:, None, None, :] if padding.any() else None
