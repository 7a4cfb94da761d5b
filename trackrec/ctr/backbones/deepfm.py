"""DeepFM (Guo et al., 2017): a factorization machine and a deep network over the same fields."""

from torch import Tensor, nn

from trackrec.ctr.embedding import Embedded
from trackrec.ctr.layers import MLP, FactorizationMachine


class DeepFM(nn.Module):
    """ŷ = <w, x> + Σ_{i<j} <v_i, v_j> + DNN(v) (eq. 1-4), as a logit.

    Args:
        fields: F, and `size` D, of the fields [B, F, D].
        hidden: the deep network's layers.
    """

    def __init__(self, fields: int, size: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.fm = FactorizationMachine()
        self.deep = MLP(fields * size, hidden)
        self.out = nn.Linear(hidden[-1], 1)

    def forward(self, x: Embedded) -> Tensor:
        """[B] logits."""
        deep = self.out(self.deep(x.fields.flatten(1)))[:, 0]
        return x.first_order + self.fm(x.fields) + deep
