"""DIEN (Zhou et al., 2019): how a user's interests evolve towards the target."""

import torch
from torch import Tensor, nn

from trackrec.ctr.embedding import Embedded
from trackrec.ctr.layers import MLP, GRUCell


class DIEN(nn.Module):
    """A GRU over the history extracts interests, AUGRU follows those the target is about (figure 1, eq. 8-16).

    The auxiliary loss of the paper (interests predict the next click among sampled negatives) is left out: it is a
    second objective, and every backbone here is trained under the same one (eq. 8).

    Args:
        fields: F, and `size` D, of the fields [B, F, D]; L earlier items [B, L, D].
        hidden: the deep network's layers.
    """

    def __init__(self, fields: int, size: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.extract = GRUCell(size, size)
        self.relevance = nn.Linear(size, size, bias=False)
        self.evolve = GRUCell(size, size)
        self.deep = MLP((fields + 1) * size, hidden)
        self.out = nn.Linear(hidden[-1], 1)

    def forward(self, x: Embedded) -> Tensor:
        """[B] logits."""
        interests = torch.stack(self._steps(self.extract, x.history, x.mask, None), dim=1)
        # a_t = softmax(h_t W e_a) over the history (eq. 12).
        scores = (interests @ self.relevance(x.target)[:, :, None])[..., 0]
        attention = scores.masked_fill(~x.mask, -1e9).softmax(-1) * x.mask
        evolved = self._steps(self.evolve, interests, x.mask, attention)[-1]
        return self.out(self.deep(torch.cat([x.fields.flatten(1), evolved], dim=1)))[:, 0]

    @staticmethod
    def _steps(cell: GRUCell, sequence: Tensor, mask: Tensor, attention: Tensor | None) -> list[Tensor]:
        """The hidden state after each step of sequence [B, L, size]; past its end the last one stays."""
        hidden, states = torch.zeros_like(sequence[:, 0]), []
        for step in range(sequence.shape[1]):
            after = cell(sequence[:, step], hidden, None if attention is None else attention[:, step])
            hidden = torch.where(mask[:, step, None], after, hidden)
            states.append(hidden)
        return states
