"""Prefix sharing: one row holds a prompt once and all its continuations.

A row is [prefix, s_1, …, s_N]. Position ids start again after the prefix in each suffix, and a suffix's tokens attend
to the prefix and to their own suffix alone (`attend`), so every token has the hidden state it would have in a row of
its own, at the price of one prefix instead of N.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel

from trackrec.llm.attention import require_plain_causal

ATTENTION = "trackrec_packed"
# Segment of a prefix token; suffix j (from 0) has j + 1.
PREFIX = 0
PADDING = -1


@dataclass(frozen=True)
class Layout:
    """Where a row's tokens are: the prefix in the first `prefix` places, then N suffixes, the longest of L tokens."""

    prefix: int
    # [N, L]: the places of each suffix's tokens; past its end, some other token's place.
    places: Tensor
    # [number of suffix tokens]: of the N · L, those before their suffix's end, in the row's order.
    real: Tensor


@dataclass(frozen=True)
class Packed:
    """Groups packed into rows, padded on the right to the longest row, S.

    For the two groups ([5, 6], [[7], [8, 9]]) and ([5], [[3, 4]]) with pad id 0:

        input_ids     [[5, 6, 7, 8, 9],    position_ids  [[0, 1, 2, 2, 3],    segment_ids  [[0, 0, 1,  2,  2],
                       [5, 3, 4, 0, 0]]                   [0, 1, 2, 0, 0]]                  [0, 1, 1, -1, -1]]
    """

    input_ids: Tensor  # [B, S]
    position_ids: Tensor  # [B, S]
    segment_ids: Tensor  # [B, S]: 0 in the prefix, j + 1 in suffix j, -1 in the padding

    @cached_property
    def layouts(self) -> list[Layout]:
        """One a row."""
        layouts = []
        for row in self.segment_ids.cpu():
            lengths = torch.bincount(row[row >= PREFIX])
            prefix, lengths = int(lengths[0]), lengths[1:]
            starts = prefix + lengths.cumsum(0) - lengths
            steps = torch.arange(int(lengths.max()))
            places = (starts[:, None] + steps).clamp(max=prefix + int(lengths.sum()) - 1)
            real = (steps < lengths[:, None]).flatten().nonzero()[:, 0]
            device = self.segment_ids.device
            layouts.append(Layout(prefix, places.to(device), real.to(device)))
        return layouts

    @property
    def model_inputs(self) -> dict[str, Any]:
        """What a decoder that has been through `enable` takes."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "layouts": self.layouts}


def pack(
    groups: Sequence[tuple[list[int], Sequence[list[int]]]], pad_id: int, device: torch.device | str = "cpu"
) -> Packed:
    """One row a group of a prefix and its suffixes, all as token ids.

    Raises:
        ValueError: an empty prefix (nothing would predict a suffix's first token), an empty suffix, or no suffix.
    """
    ids, positions, segments = [], [], []
    for row, (prefix, suffixes) in enumerate(groups):
        if not prefix or not suffixes or not all(suffixes):
            raise ValueError(
                f"group {row}: the prefix, the list of suffixes and every suffix must have something in them"
            )
        tokens, places, owners = list(prefix), list(range(len(prefix))), [PREFIX] * len(prefix)
        for number, suffix in enumerate(suffixes, start=1):
            tokens += suffix
            places += range(len(prefix), len(prefix) + len(suffix))
            owners += [number] * len(suffix)
        ids.append(torch.tensor(tokens, device=device))
        positions.append(torch.tensor(places, device=device))
        segments.append(torch.tensor(owners, device=device))
    return Packed(
        input_ids=pad_sequence(ids, batch_first=True, padding_value=pad_id),
        position_ids=pad_sequence(positions, batch_first=True),
        segment_ids=pad_sequence(segments, batch_first=True, padding_value=PADDING),
    )


def enable(model: PreTrainedModel | PeftModel) -> None:
    """Makes `model` attend through `attend`; from then on it takes packed rows and nothing else.

    Raises:
        UnsupportedModelError: some layers use a sliding window, linear attention or soft-capped logits.
    """
    require_plain_causal(
        model, instead="packed rows need a model with full attention in every layer, such as Qwen2.5 or Llama"
    )
    # cuDNN's attention plans anew for every shape, and nearly every row has one of its own; flash attention does not.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # transformers builds no mask for an attention that has no mask function of the same name.
    AttentionInterface.register(ATTENTION, attend)
    model.set_attn_implementation(ATTENTION)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    layouts: list[Layout],
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: from query [B, heads, S, size], key and value [B, kv heads, S, size] to
    [B, S, heads, size].

    A mask over the whole row would score each suffix with all others and throw that away. Here the prefix attends to
    itself, and the suffixes, as a batch of N, each to [prefix, itself]. Padding gets 0.
    """
    by_place = [states.transpose(1, 2) for states in (query, key, value)]
    rows = [_attend_row(q, k, v, layout, dropout, scaling) for q, k, v, layout in zip(*by_place, layouts, strict=True)]
    return pad_sequence(rows, batch_first=True), None


def _attend_row(query: Tensor, key: Tensor, value: Tensor, layout: Layout, dropout: float, scaling: float) -> Tensor:
    """One row without its padding: [S, heads, size] from query [S, heads, size], key and value [S, kv heads, size]."""
    shared, (suffixes, longest) = layout.prefix, layout.places.shape

    def by_suffix(states: Tensor) -> Tensor:
        return states.index_select(0, layout.places.flatten()).unflatten(0, (suffixes, longest))

    def with_prefix(states: Tensor) -> Tensor:
        return torch.cat([states[:shared].expand(suffixes, -1, -1, -1), by_suffix(states)], dim=1)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Causal attention of [batch, places, heads, size]."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        causal = mask is None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=True
        ).transpose(1, 2)

    in_prefix = sdpa(query[None, :shared], key[None, :shared], value[None, :shared], mask=None)[0]
    mask = _causal_after_prefix(longest, shared, query.device)
    in_suffixes = sdpa(by_suffix(query), with_prefix(key), with_prefix(value), mask)
    return torch.cat([in_prefix, in_suffixes.flatten(0, 1).index_select(0, layout.real)])


def _causal_after_prefix(longest: int, shared: int, device: torch.device) -> Tensor:
    """[L, P + L]: suffix token t sees the prefix and the suffix's tokens up to t."""
    if device.type == "cuda":
        return causal_lower_right(longest, shared + longest)  # flash attention's own, so no mask is read
    return torch.ones(longest, shared + longest, dtype=torch.bool, device=device).tril(shared)
