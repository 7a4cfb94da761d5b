"""Each layer's forward pass against numbers worked out by hand from its paper's equation."""

import math

import pytest
import torch
from torch import Tensor, nn

from trackrec.ctr.layers import (
    MLP,
    BilinearInteraction,
    CrossNetwork,
    Dropout,
    FactorizationMachine,
    FieldAttention,
    FieldGraph,
    GRUCell,
    SqueezeExcitation,
    TargetAttention,
)


def fill(parameter: Tensor, values: object) -> None:
    with torch.no_grad():
        parameter.copy_(torch.tensor(values))


def close(found: Tensor, expected: object) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_factorization_machine() -> None:
    # <(1, 2), (3, 4)> + <(1, 2), (-1, 1)> + <(3, 4), (-1, 1)> = 11 + 1 + 1
    close(FactorizationMachine()(torch.tensor([[[1.0, 2], [3, 4], [-1, 1]]])), [13.0])


def test_mlp() -> None:
    mlp = MLP(2, [2, 1])
    fill(mlp.linear[0].weight, [[1.0, 1], [1, -1]])
    fill(mlp.linear[0].bias, [0.0, 0.5])
    fill(mlp.linear[1].weight, [[2.0, 3]])
    fill(mlp.linear[1].bias, [1.0])
    # (1, 3): (4, -2 + .5 → 0), then 2 · 4 + 1
    close(mlp(torch.tensor([[1.0, 3]])), [[9.0]])


def test_cross_network() -> None:
    cross = CrossNetwork(2, 2)
    for layer, (weight, bias) in enumerate([([1.0, 0], [0.0, 1]), ([0.0, 1], [1.0, 0])]):
        fill(cross.weight[layer], weight)
        fill(cross.bias[layer], bias)
    # x1 = (2, 3) · 2 + (0, 1) + (2, 3) = (6, 10); x2 = (2, 3) · 10 + (1, 0) + (6, 10)
    close(cross(torch.tensor([[2.0, 3]])), [[27.0, 40]])


def test_field_attention() -> None:
    """Two heads of one dimension each: head h scores by the fields' h-th number."""
    attention = FieldAttention(2, 2, heads=2)
    for linear in (attention.query, attention.key, attention.value):
        fill(linear.weight, [[1.0, 0], [0, 1]])
    fill(attention.residual.weight, [[1.0, 0], [0, -10]])
    # Fields (1, 0) and (2, 1). Head 0: field 0 scores (1, 2), field 1 (2, 4); head 1: (0, 0) and (0, 1).
    a, b = sigmoid(1), sigmoid(2)  # weight of field 1
    c, d = 0.5, sigmoid(1)
    assert d != c
    expected = [[[(1 - a) * 1 + a * 2 + 1, c], [(1 - b) * 1 + b * 2 + 2, 0.0]]]  # d - 10 < 0
    close(attention(torch.tensor([[[1.0, 0], [2, 1]]])), expected)


def test_squeeze_excitation() -> None:
    senet = SqueezeExcitation(2)
    fill(senet.squeeze.weight, [[1.0, 2]])
    fill(senet.excite.weight, [[0.5], [-1.0]])
    # The fields' means are 2 and 1: 2 + 2 · 1 = 4, and so the weights 2 and max(-4, 0).
    close(senet(torch.tensor([[[1.0, 3], [0, 2]]])), [[[2.0, 6], [0, 0]]])


def test_bilinear_interaction() -> None:
    bilinear = BilinearInteraction(3, 2)
    fill(bilinear.weight, [[[1.0, 1], [0, 2]], [[0.0, 1], [1, 0]], [[9.0, 9], [9, 9]]])
    # v0 W0 = (1, 1 + 2 · 2) = (1, 5); v1 W1 = (4, 3). Pairs 0-1, 0-2, 1-2.
    close(bilinear(torch.tensor([[[1.0, 2], [3, 4], [5, 6]]])), [[[3.0, 20], [5, 30], [20, 18]]])


def test_target_attention() -> None:
    attention = TargetAttention(1, hidden=1)
    fill(attention.hidden.weight, [[1.0, 10, 100, 1000]])
    fill(attention.hidden.bias, [0.0])
    fill(attention.score.weight, [[2.0]])
    fill(attention.score.bias, [0.5])
    # target 3, earlier 2: 3 + 20 + 100 + 6000; earlier 0: 3 + 0 + 300 + 0
    close(attention(torch.tensor([[3.0]]), torch.tensor([[[2.0], [0.0]]])), [[2 * 6123 + 0.5, 2 * 303 + 0.5]])


def fill_gru(cell: GRUCell) -> None:
    """One number a state: update sees x, reset sees the state, the candidate both."""
    fill(cell.gates.weight, [[1.0, 0], [0, 1]])
    fill(cell.gates.bias, [0.0, 0])
    fill(cell.candidate.weight, [[1.0]])
    fill(cell.candidate.bias, [0.0])
    fill(cell.earlier.weight, [[1.0]])


def gru_step(x: float, h: float, attention: float = 1.0) -> float:
    """`fill_gru`'s by hand."""
    z, r = attention * sigmoid(x), sigmoid(h)
    return (1 - z) * h + z * math.tanh(x + r * h)


def test_gru_and_augru() -> None:
    cell = GRUCell(1, 1)
    fill_gru(cell)
    arguments = torch.tensor([[0.5]]), torch.tensor([[0.8]])
    close(cell(*arguments), [[gru_step(0.5, 0.8)]])
    # AUGRU: a target the item says little about leaves the state as it is.
    close(cell(*arguments, torch.tensor([0.25])), [[gru_step(0.5, 0.8, 0.25)]])
    close(cell(*arguments, torch.tensor([0.0])), [[0.8]])


def test_gru_is_torchs() -> None:
    """torch's update gate keeps what DIEN's takes in: the signs of its rows are turned."""
    torch.manual_seed(0)
    ours, torchs = GRUCell(3, 4), nn.GRUCell(3, 4, bias=False)
    weight, hidden = torchs.weight_ih, torchs.weight_hh  # rows: reset, update, candidate
    with torch.no_grad():
        ours.gates.weight.copy_(
            torch.cat([-torch.cat([weight[4:8], hidden[4:8]], 1), torch.cat([weight[:4], hidden[:4]], 1)])
        )
        ours.candidate.weight.copy_(weight[8:])
        ours.earlier.weight.copy_(hidden[8:])
        for bias in (ours.gates.bias, ours.candidate.bias):
            bias.zero_()
    x, h = torch.randn(5, 3), torch.randn(5, 4)
    torch.testing.assert_close(ours(x, h), torchs(x, h))


def graph(steps: int) -> FieldGraph:
    made = FieldGraph(2, 1, steps)
    fill(made.taker.weight, [[1.0]])
    fill(made.giver.weight, [[2.0]])
    fill(made.outgoing, [[[2.0]], [[3.0]]])
    fill(made.incoming, [[[1.0]], [[-1.0]]])
    fill(made.bias, [0.1])
    fill_gru(made.update)
    return made


def test_field_graph() -> None:
    """FiGNN's step: a_i = Σ_j A_ij h_j W_out^j W_in^i + b, then h_i = GRU(a_i, h_i) + h_i^1."""
    states = [0.4, -0.2]
    # With two nodes each takes all from the other.
    received = [-0.2 * 3 * 1 + 0.1, 0.4 * 2 * -1 + 0.1]
    expected = [gru_step(x, h) + h for x, h in zip(received, states, strict=True)]
    close(graph(1)(torch.tensor([[[0.4], [-0.2]]])), [[[expected[0]], [expected[1]]]])
    close(graph(0)(torch.tensor([[[0.4], [-0.2]]])), [[[0.4], [-0.2]]])


def test_field_graph_sends_along_its_edges() -> None:
    """Three nodes, whose edges weigh unlike in the two directions; eq. 5-11 one number at a time."""
    made = FieldGraph(3, 1, 2)
    fill(made.taker.weight, [[1.0]])
    fill(made.giver.weight, [[2.0]])
    fill(made.outgoing, [[[2.0]], [[3.0]], [[-1.0]]])
    fill(made.incoming, [[[1.0]], [[-1.0]], [[0.5]]])
    fill(made.bias, [0.1])
    fill_gru(made.update)
    first, out, into = [0.4, -0.2, 1.0], [2.0, 3.0, -1.0], [1.0, -1.0, 0.5]
    weights = []
    for i, taker in enumerate(first):
        scores = [taker + 2 * giver for giver in first]
        powers = [0.0 if i == j else math.exp(s if s > 0 else 0.01 * s) for j, s in enumerate(scores)]
        weights.append([power / sum(powers) for power in powers])
    assert abs(weights[0][1] - weights[1][0]) > 0.1
    states = first
    for _ in range(2):
        received = [sum(weights[i][j] * states[j] * out[j] for j in range(3)) * into[i] + 0.1 for i in range(3)]
        states = [gru_step(a, h) + h1 for a, h, h1 in zip(received, states, first, strict=True)]
    close(made(torch.tensor([[[0.4], [-0.2], [1.0]]])), [[[state] for state in states]])


def test_edge_weights() -> None:
    made = FieldGraph(3, 1, 1)
    fill(made.taker.weight, [[1.0]])
    fill(made.giver.weight, [[2.0]])
    found = made.edge_weights(torch.tensor([[[1.0], [0], [-2]]]))
    # Node 0 scores node 1 by 1 + 0 and node 2 by LeakyReLU(1 - 4) = -.03.
    to_1 = sigmoid(1 - -0.03)
    close(found[0, 0], [0.0, to_1, 1 - to_1])
    close(found.sum(-1), [[1.0, 1, 1]])


def test_dropout_drops_its_share_and_only_in_training() -> None:
    dropout = Dropout()
    x = torch.ones(400, 500)
    torch.testing.assert_close(dropout(x), x)  # its rate is 0 until it is given one
    dropout.rate.fill_(0.3)
    dropout.key.fill_(12345)
    dropped = dropout(x)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 1 / 0.7])
    # 200,000 draws: the share lies within .005 in all but one of a million cases.
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert ((dropped == 0).float().mean(0) - 0.3).abs().max() < 0.12, "the mask follows a pattern by column"
    assert torch.equal(dropout(x), dropped)
    dropout.key.fill_(12346)
    agree = ((dropout(x) == 0) & (dropped == 0)).float().mean().item()
    assert agree == pytest.approx(0.09, abs=0.005), "masks of neighbouring keys are not independent"
    assert torch.equal(dropout.eval()(x), x)
