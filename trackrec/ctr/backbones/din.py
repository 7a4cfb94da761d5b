"""DIN (Zhou et al., 2018): the history weighed by what it says about the target."""

import torch
from torch import Tensor, nn

from trackrec.ctr.embedding import Embedded
from trackrec.ctr.layers import MLP, TargetAttention


class DIN(nn.Module):
    """Interest = Σ_j a(e_j, target) e_j (eq. 3), not normalised, then a deep network beside the fields.

    ReLU stands for the paper's Dice; the history's mean stays a field, as every backbone has it.

    Args:
        fields: F, and `size` D, of the fields [B, F, D]; L earlier items [B, L, D].
        hidden: the deep network's layers.
    """

    def __init__(self, fields: int, size: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.attention = TargetAttention(size)
        self.deep = MLP((fields + 1) * size, hidden)
        self.out = nn.Linear(hidden[-1], 1)

    def forward(self, x: Embedded) -> Tensor:
        """[B] logits."""
        weights = self.attention(x.target, x.history) * x.mask
        interest = (weights[..., None] * x.history).sum(1)
        return self.out(self.deep(torch.cat([x.fields.flatten(1), interest], dim=1)))[:, 0]
