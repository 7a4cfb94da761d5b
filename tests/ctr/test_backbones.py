"""Whole models against forward passes worked out by hand: those without a peer to copy weights into, and the fields."""

import math

import torch
from torch import nn

from tests.ctr.test_layers import close, fill, fill_gru, gru_step, sigmoid
from trackrec.ctr.backbones import DIEN, FiGNN
from trackrec.ctr.embedding import Batch, Embedded, FieldEmbedding, Tables, Vocabulary


def test_dien() -> None:
    """Two earlier items and a padded place: interests by GRU, a softmax over the two, AUGRU, which stops at the end."""
    model = DIEN(fields=1, size=1, hidden=(1,))
    fill_gru(model.extract)
    fill_gru(model.evolve)
    fill(model.relevance.weight, [[2.0]])
    fill(model.deep.linear[0].weight, [[1.0, 10.0]])
    fill(model.deep.linear[0].bias, [5.0])
    fill(model.out.weight, [[3.0]])
    fill(model.out.bias, [-1.0])
    first, second = 0.5, -0.3
    batch = Embedded(
        fields=torch.tensor([[[0.7]]]),
        first_order=torch.zeros(1),
        target=torch.tensor([[0.4]]),
        history=torch.tensor([[[first], [second], [9.0]]]),
        mask=torch.tensor([[True, True, False]]),
    )
    one = gru_step(first, 0.0)
    two = gru_step(second, one)
    of_two = sigmoid(2 * 0.4 * two - 2 * 0.4 * one)
    evolved = gru_step(two, gru_step(one, 0.0, 1 - of_two), of_two)
    close(model(batch), [3 * (5 + 0.7 + 10 * evolved) - 1])


def test_dien_without_a_history() -> None:
    model = DIEN(fields=1, size=1, hidden=(1,))
    batch = Embedded(
        torch.ones(1, 1, 1), torch.zeros(1), torch.ones(1, 1), torch.ones(1, 2, 1), torch.zeros(1, 2, dtype=torch.bool)
    )
    deep = model.out(model.deep(torch.tensor([[1.0, 0.0]])))[:, 0]
    torch.testing.assert_close(model(batch), deep)


def test_fignn() -> None:
    """Two fields, one step: attention of equal weights, the graph of `test_layers`, each node's weight and answer."""
    model = FiGNN(fields=2, size=1, hidden=(1,), heads=1, steps=1)
    for linear in (model.attention.query, model.attention.key):
        fill(linear.weight, [[0.0]])
    fill(model.attention.value.weight, [[1.0]])
    fill(model.attention.residual.weight, [[1.0]])
    for part, values in (("outgoing", [[[2.0]], [[3.0]]]), ("incoming", [[[1.0]], [[-1.0]]]), ("bias", [0.1])):
        fill(getattr(model.graph, part), values)
    fill_gru(model.graph.update)
    fill(model.answer.weight, [[2.0]])
    fill(model.answer.bias, [0.5])
    fill(model.weight.weight, [[-1.0]])
    fill(model.weight.bias, [0.3])
    fields = [0.6, 0.2]
    attended = [sum(fields) / 2 + field for field in fields]
    received = [attended[1] * 3 * 1 + 0.1, attended[0] * 2 * -1 + 0.1]
    states = [gru_step(x, h) + h for x, h in zip(received, attended, strict=True)]
    expected = sum(sigmoid(0.3 - state) * (2 * state + 0.5) for state in states)
    batch = Embedded(
        torch.tensor([[[fields[0]], [fields[1]]]]), torch.zeros(1), torch.zeros(1, 1), torch.zeros(1, 1, 1),
        torch.zeros(1, 1, dtype=torch.bool),
    )  # fmt: skip
    close(model(batch), [expected])


def test_fields() -> None:
    """D = 1. The second row has no RecCoT and no history."""
    embedding = FieldEmbedding(Vocabulary(users=3, items=5, attributes=4, ratings=4, vector_width=2), 1, hidden=(1,))
    fill(embedding.user.weight, [[0.0], [0], [1]])
    fill(embedding.user_weight.weight, [[0.0], [0], [100]])
    fill(embedding.item.weight, [[0.0], [7], [2], [3], [4]])
    fill(embedding.item_weight.weight, [[0.0], [700], [200], [300], [400]])
    fill(embedding.attribute.weight, [[9.0], [9], [10], [20]])
    fill(embedding.attribute_weight.weight, [[9.0], [9], [1000], [3000]])
    fill(embedding.rating.weight, [[9.0], [9], [0.5], [0.25]])
    connector = embedding.connector
    assert connector is not None
    fill(connector.mlp.linear[0].weight, [[1.0, 1]])
    fill(connector.mlp.linear[0].bias, [0.0])
    fill(connector.out.weight, [[2.0], [5]])
    fill(connector.out.bias, [1.0, 0])
    fill(connector.missing, [-3.0, -30])
    # Catalogue rows 2 and 3 are items 2 and 3, row 4 is unknown (its number is 1) and has attribute 3 alone.
    tables = Tables(
        item=torch.tensor([0, 1, 2, 3, 1]),
        item_attributes=torch.tensor([[0, 0], [0, 0], [2, 3], [0, 0], [3, 0]]),
        vectors=torch.tensor([[0.0, 0], [4, 1]]),
    )
    batch = Batch(
        user=torch.tensor([2, 2]),
        item=torch.tensor([2, 4]),
        history=torch.tensor([[3, 4, 0], [0, 0, 0]]),
        history_rating=torch.tensor([[2, 3, 0], [0, 0, 0]]),
        recot=torch.tensor([1, 0]),
    )
    found = embedding(batch, tables)
    # user, item, attributes (mean of 10 and 20; 20), RecCoT (2 (4 + 1) + 1; missing), history (mean of 3.5 and 7.25; 0)
    close(found.fields[..., 0], [[1.0, 2, 15, 11, 5.375], [1, 7, 20, -3, 0]])
    close(found.first_order, [100.0 + 200 + 2000 + 25, 100 + 700 + 3000 - 30])
    close(found.target, [[2.0], [7]])
    close(found.history[0, :2, 0], [3.5, 7.25])
    assert found.mask.tolist() == [[True, True, False], [False] * 3]
    assert math.isfinite(found.history.sum().item())


def test_without_recots_there_is_no_such_field() -> None:
    embedding = FieldEmbedding(Vocabulary(users=3, items=3, attributes=3, ratings=3, vector_width=0), 2)
    numbers = torch.full((1,), 2)
    lists = torch.full((1, 2), 2)
    tables = Tables(torch.arange(3), torch.full((3, 1), 2), torch.zeros(1, 0))
    found = embedding(Batch(numbers, numbers, lists, lists, numbers * 0), tables)
    assert found.fields.shape == (1, 4, 2) and embedding.connector is None
    assert not any(isinstance(module, nn.Linear) for module in embedding.modules())
