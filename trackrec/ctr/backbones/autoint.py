"""AutoInt (Song et al., 2019): feature interactions by self-attention between the fields."""

import itertools

from torch import Tensor, nn

from trackrec.ctr.embedding import Embedded
from trackrec.ctr.layers import Dropout, FieldAttention


class AutoInt(nn.Module):
    """Interacting layers with residuals, then one linear layer over all fields (figure 2, eq. 9).

    Args:
        fields: F, and `size` D, of the fields [B, F, D].
        hidden: as many interacting layers, each of the last size over its heads.
    """

    def __init__(self, fields: int, size: int, hidden: tuple[int, ...], heads: int = 2) -> None:
        super().__init__()
        widths = (size, *(hidden[-1] for _ in hidden))
        self.attention = nn.ModuleList(FieldAttention(a, b, heads) for a, b in itertools.pairwise(widths))
        self.dropout = nn.ModuleList(Dropout() for _ in hidden)
        self.out = nn.Linear(fields * widths[-1], 1)

    def forward(self, x: Embedded) -> Tensor:
        """[B] logits."""
        fields = x.fields
        for attention, dropout in zip(self.attention, self.dropout, strict=True):
            fields = dropout(attention(fields))
        return self.out(fields.flatten(1))[:, 0]
