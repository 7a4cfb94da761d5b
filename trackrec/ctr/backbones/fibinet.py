"""FiBiNET (Huang et al., 2019): fields weighed by what they hold, then bilinear interactions of each two."""

import torch
from torch import Tensor, nn

from trackrec.ctr.embedding import Embedded
from trackrec.ctr.layers import MLP, BilinearInteraction, SqueezeExcitation


class FiBiNET(nn.Module):
    """Bilinear interactions of the fields and of the SENET-weighed fields, a deep network over both, and a linear part
    (figure 1, eq. 8).

    Args:
        fields: F, and `size` D, of the fields [B, F, D].
        hidden: the deep network's layers.
    """

    def __init__(self, fields: int, size: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.senet = SqueezeExcitation(fields)
        self.plain = BilinearInteraction(fields, size)
        self.weighed = BilinearInteraction(fields, size)
        self.deep = MLP(fields * (fields - 1) * size, hidden)
        self.out = nn.Linear(hidden[-1], 1)

    def forward(self, x: Embedded) -> Tensor:
        """[B] logits."""
        pairs = torch.cat([self.plain(x.fields), self.weighed(self.senet(x.fields))], dim=1)
        return x.first_order + self.out(self.deep(pairs.flatten(1)))[:, 0]
