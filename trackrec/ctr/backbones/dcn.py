"""DCN (Wang et al., 2017): bounded-degree feature crosses beside a deep network."""

import torch
from torch import Tensor, nn

from trackrec.ctr.embedding import Embedded
from trackrec.ctr.layers import MLP, CrossNetwork


class DCN(nn.Module):
    """The cross network and the deep one side by side, then one linear layer over both (figure 1, eq. 6).

    Args:
        fields: F, and `size` D, of the fields [B, F, D].
        hidden: the deep network's layers.
        crosses: layers of the cross network; degree crosses + 1.
    """

    def __init__(self, fields: int, size: int, hidden: tuple[int, ...], crosses: int = 3) -> None:
        super().__init__()
        self.cross = CrossNetwork(fields * size, crosses)
        self.deep = MLP(fields * size, hidden)
        self.out = nn.Linear(fields * size + hidden[-1], 1)

    def forward(self, x: Embedded) -> Tensor:
        """[B] logits."""
        stacked = x.fields.flatten(1)
        return self.out(torch.cat([self.cross(stacked), self.deep(stacked)], dim=1))[:, 0]
