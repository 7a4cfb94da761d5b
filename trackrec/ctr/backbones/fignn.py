"""FiGNN (Li et al., 2019): fields as the nodes of a graph."""

from torch import Tensor, nn

from trackrec.ctr.embedding import Embedded
from trackrec.ctr.layers import Dropout, FieldAttention, FieldGraph


class FiGNN(nn.Module):
    """Self-attention, message passing between the fields, and a sum of each field's answer by its own weight (figure 2,
    eq. 12-14). The MLPs of answer and weight are one layer each; a sigmoid keeps the weight within 0 and 1.

    Args:
        fields: F, and `size` D, of the fields [B, F, D].
        hidden: the last is the size of a node's state.
    """

    def __init__(self, fields: int, size: int, hidden: tuple[int, ...], heads: int = 2, steps: int = 3) -> None:
        super().__init__()
        state = hidden[-1]
        self.attention = FieldAttention(size, state, heads)
        self.graph = FieldGraph(fields, state, steps)
        self.dropout = Dropout()
        self.answer = nn.Linear(state, 1)
        self.weight = nn.Linear(state, 1)

    def forward(self, x: Embedded) -> Tensor:
        """[B] logits."""
        states = self.dropout(self.graph(self.attention(x.fields)))
        answers = self.answer(states)[..., 0]
        weights = self.weight(states)[..., 0].sigmoid()
        return (weights * answers).sum(1)
