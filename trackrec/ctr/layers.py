"""What the backbones are built of. B is the batch, F the number of fields, D a field's size, L the history's length.

Every layer works on one model's tensors; `trackrec.ctr.stack` trains many models at once by mapping over them, so a
layer draws no random numbers of its own but for its initial weights.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """Inverted dropout whose mask is a hash of `key`, `rate` and the place: a model's masks are its own.

    `trackrec.ctr.stack` sets `key` (one a model and layer, moved on at every step) and `rate` (so that models of other
    rates train together); with the rate at 0, as at first and in evaluation, nothing is dropped.
    """

    key: Tensor
    rate: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("key", torch.tensor(0, dtype=torch.int32), persistent=False)
        self.register_buffer("rate", torch.tensor(0.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[...] to [...]."""
        if not self.training:
            return x
        # Murmur3's finaliser in wrapping int32: far cheaper than a generator a model, and the same on any device.
        h = torch.arange(x.numel(), dtype=torch.int32, device=x.device) * -1640531535 + self.key
        h = (h ^ (h >> 16)) * -2048144789
        h = (h ^ (h >> 13)) * -1028477387
        uniform = ((h ^ (h >> 16)) & 0x7FFFFFFF).float() / 2**31
        return x * (uniform.view(x.shape) >= self.rate) / (1 - self.rate)


class _Rows(torch.autograd.Function):
    """weight[ids]; for many models at once, from their tables laid end to end.

    `nn.Embedding`'s gradient on a CPU takes twice as long as `index_select`'s, and more under vmap.
    """

    @staticmethod
    def forward(weight: Tensor, ids: Tensor) -> Tensor:
        return weight.index_select(0, ids.flatten()).view(*ids.shape, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        weight, ids = inputs
        ctx.rows = len(weight)
        ctx.save_for_backward(ids)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        [ids] = ctx.saved_tensors
        zeros = gradient.new_zeros(ctx.rows, gradient.shape[-1])
        return zeros.index_add(0, ids.flatten(), gradient.flatten(0, -2)), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, int | None], weight: Tensor, ids: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        starts = torch.arange(0, weight.shape[0] * weight.shape[1], weight.shape[1], device=ids.device)
        each = ids if in_dims[1] == 0 else ids[None]
        return _Rows.apply(weight.flatten(0, 1), each + starts.view(-1, *[1] * (each.dim() - 1))), 0


class Lookup(nn.Embedding):
    """A table of vectors, all small at first: ids [...] to [..., size]."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = _Rows.apply(self.weight, ids)
        return found


class MLP(nn.Module):
    """Linear layers with ReLU and dropout after each: [..., inputs] to [..., sizes[-1]]."""

    def __init__(self, inputs: int, sizes: Sequence[int]) -> None:
        super().__init__()
        widths = [inputs, *sizes]
        self.linear = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.dropout = nn.ModuleList(Dropout() for _ in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for linear, dropout in zip(self.linear, self.dropout, strict=True):
            x = dropout(F.relu(linear(x)))
        return x


class FactorizationMachine(nn.Module):
    """Σ_{i<j} <v_i, v_j> over the fields (DeepFM eq. 2): [B, F, D] to [B]."""

    def forward(self, fields: Tensor) -> Tensor:
        return 0.5 * (fields.sum(1).square() - fields.square().sum(1)).sum(1)


class CrossNetwork(nn.Module):
    """x_{l+1} = x_0 x_lᵀ w_l + b_l + x_l (DCN eq. 3): [B, size] to [B, size]."""

    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        self.weight = nn.ParameterList(nn.Parameter(torch.randn(size) * size**-0.5) for _ in range(layers))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(size)) for _ in range(layers))

    def forward(self, x0: Tensor) -> Tensor:
        x = x0
        for weight, bias in zip(self.weight, self.bias, strict=True):
            x = x0 * (x @ weight)[:, None] + bias + x
        return x


class FieldAttention(nn.Module):
    """Multi-head self-attention between the fields, with a residual (AutoInt eq. 5-8): [B, F, inputs] to [B, F, size].

    Args:
        size: of all heads together.
    """

    def __init__(self, inputs: int, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(inputs, size, bias=False) for _ in range(3))
        self.residual = nn.Linear(inputs, size, bias=False)

    def forward(self, fields: Tensor) -> Tensor:
        # [B, heads, F, size / heads]
        q, k, v = (
            part(fields).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        attended = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return F.relu(attended.transpose(1, 2).flatten(2) + self.residual(fields))


class SqueezeExcitation(nn.Module):
    """SENET: weighs whole fields by what all fields hold (FiBiNET eq. 2-4): [B, F, D] to [B, F, D]."""

    def __init__(self, fields: int, reduction: int = 3) -> None:
        super().__init__()
        reduced = max(1, fields // reduction)
        self.squeeze = nn.Linear(fields, reduced, bias=False)
        self.excite = nn.Linear(reduced, fields, bias=False)

    def forward(self, fields: Tensor) -> Tensor:
        weights = F.relu(self.excite(F.relu(self.squeeze(fields.mean(2)))))
        return fields * weights[:, :, None]


class BilinearInteraction(nn.Module):
    """p_ij = v_i W_i ⊙ v_j for all i < j (FiBiNET eq. 6, field-each): [B, F, D] to [B, F(F-1)/2, D]."""

    left: Tensor
    right: Tensor

    def __init__(self, fields: int, size: int) -> None:
        super().__init__()
        left, right = torch.triu_indices(fields, fields, offset=1)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.weight = nn.Parameter(torch.randn(fields, size, size) * size**-0.5)

    def forward(self, fields: Tensor) -> Tensor:
        turned = torch.einsum("bfd,fde->bfe", fields, self.weight)
        return turned[:, self.left] * fields[:, self.right]


class TargetAttention(nn.Module):
    """How much each earlier item says about the target: DIN's activation unit (figure 2).

    One hidden layer over [target, earlier, target - earlier, target ⊙ earlier].
    """

    def __init__(self, size: int, hidden: int = 36) -> None:
        super().__init__()
        self.hidden = nn.Linear(4 * size, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, target: Tensor, history: Tensor) -> Tensor:
        """Scores [B, L] from target [B, size] and history [B, L, size]; they are no softmax."""
        # W [t, e, t - e, t ⊙ e] = (W1 + W3) t + (W2 - W3) e + W4 (t ⊙ e): the target's part once a row.
        of_target, of_earlier, of_difference, of_product = self.hidden.weight.chunk(4, dim=1)
        alone = F.linear(target, of_target + of_difference, self.hidden.bias)
        each = torch.cat([history, target[:, None] * history], dim=-1)
        weight = torch.cat([of_earlier - of_difference, of_product], dim=1)
        # In place: the batch's largest tensor, of which a copy costs as much as the product.
        hidden = F.linear(each, weight).add_(alone[:, None]).relu_()
        return self.score(hidden)[..., 0]


class GRUCell(nn.Module):
    """One step of a GRU (DIEN eq. 8-11); with `attention`, of AUGRU (eq. 14-16): the update gate is scaled by it."""

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.gates = nn.Linear(inputs + size, 2 * size)
        self.candidate = nn.Linear(inputs, size)
        self.earlier = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, hidden: Tensor, attention: Tensor | None = None) -> Tensor:
        """The next hidden state [B, size] from x [B, inputs], hidden [B, size] and attention [B]."""
        update, reset = self.gates(torch.cat([x, hidden], dim=-1)).sigmoid().chunk(2, dim=-1)
        if attention is not None:
            update = attention[:, None] * update
        candidate = (self.candidate(x) + reset * self.earlier(hidden)).tanh()
        return (1 - update) * hidden + update * candidate


class FieldGraph(nn.Module):
    """Fields as nodes of a complete directed graph, which exchange states (FiGNN eq. 5-11): [B, F, D] to [B, F, D].

    Args:
        steps: of message passing; each is a GRU step with a residual to the initial states.
    """

    def __init__(self, fields: int, size: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        # The two halves of W_w: for the node that takes, and for the one that gives.
        self.taker = nn.Linear(size, 1, bias=False)
        self.giver = nn.Linear(size, 1, bias=False)
        self.outgoing = nn.Parameter(torch.randn(fields, size, size) * size**-0.5)
        self.incoming = nn.Parameter(torch.randn(fields, size, size) * size**-0.5)
        self.bias = nn.Parameter(torch.zeros(size))
        self.update = GRUCell(size, size)

    def forward(self, fields: Tensor) -> Tensor:
        weights = self.edge_weights(fields)
        states = fields
        for _ in range(self.steps):
            sent = torch.einsum("bfd,fde->bfe", states, self.outgoing)
            received = torch.einsum("bfd,fde->bfe", weights @ sent, self.incoming) + self.bias
            states = self.update(received.flatten(0, 1), states.flatten(0, 1)).view_as(states) + fields
        return states

    def edge_weights(self, fields: Tensor) -> Tensor:
        """[B, F, F]: how much node i takes from each other node j; a row sums to 1, and a node takes nothing of its own
        (eq. 5-6)."""
        scores = F.leaky_relu(self.taker(fields) + self.giver(fields).transpose(1, 2))
        own = torch.eye(fields.shape[1], dtype=torch.bool, device=fields.device)
        return scores.masked_fill(own, -torch.inf).softmax(-1)
