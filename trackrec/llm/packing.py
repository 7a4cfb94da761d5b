"""Prefix sharing: one row holds a prompt once and all its continuations.

A row is [prefix, s_1, …, s_N]. Position ids start again after the prefix in each suffix and a 4-D mask lets a
suffix see the prefix and itself alone, so every token has the hidden state it would have in a row of its own, at the
price of one prefix instead of N.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Segment of a prefix token; suffix j (from 0) has j + 1.
PREFIX = 0
PADDING = -1


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

    @property
    def attention_mask(self) -> Tensor:
        """Bool [B, 1, S, S]: whether position q (third axis) sees k (fourth).

        It sees nothing later; of what is earlier, the prefix and its own suffix. Padding sees the prefix too: a softmax
        over nothing would be NaN.
        """
        length = self.segment_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segment_ids.device).tril()
        query, key = self.segment_ids[:, None, :, None], self.segment_ids[:, None, None, :]
        return causal & ((key == PREFIX) | (key == query))

    @property
    def spans(self) -> list[list[tuple[int, int]]]:
        """Where each suffix lies in its row: (start, length), by row and suffix."""
        rows = []
        for segments in self.segment_ids.tolist():
            starts: dict[int, int] = {}
            for position, segment in enumerate(segments):
                starts.setdefault(segment, position)
            rows.append([(starts[s], segments.count(s)) for s in sorted(starts) if s > PREFIX])
        return rows

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        """What a Hugging Face decoder takes. Its attention must be sdpa: eager attention would add the boolean mask."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    def to(self, device: torch.device | str) -> "Packed":
        return Packed(self.input_ids.to(device), self.position_ids.to(device), self.segment_ids.to(device))


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
        ids.append(torch.tensor(tokens))
        positions.append(torch.tensor(places))
        segments.append(torch.tensor(owners))
    return Packed(
        input_ids=pad_sequence(ids, batch_first=True, padding_value=pad_id),
        position_ids=pad_sequence(positions, batch_first=True),
        segment_ids=pad_sequence(segments, batch_first=True, padding_value=PADDING),
    ).to(device)
