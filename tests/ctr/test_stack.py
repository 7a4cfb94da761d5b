"""Models trained together are the models trained alone, and both are torch's Adam on plain modules."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from trackrec.config import Backbone
from trackrec.ctr import stack
from trackrec.ctr.backbones import BACKBONES
from trackrec.ctr.embedding import Batch
from trackrec.ctr.features import Dataset, dataset
from trackrec.ctr.ranker import build
from trackrec.ctr.stack import Hyper, Stack
from trackrec.ctr.training import train

HYPERS = [Hyper(3, 0.01, 0.0, 0.0), Hyper(4, 0.02, 0.3, 1e-3), Hyper(5, 0.005, 0.1, 1e-4)]
SHAPE: dict[str, Any] = {"size": 4, "hidden": (8, 6)}
TRAINING: dict[str, Any] = SHAPE | {"batch_size": 64, "epochs": 3, "patience": 3}


def data_of(log: dict[str, pa.Table], width: int = 5) -> Dataset:
    """The log with a RecCoT vector for two users of three: the user's genre, and noise."""
    users = log["interactions"]["user_id"].to_pylist()
    numbers = [int(user[1:]) for user in users]
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(31, 5)).astype(np.float32)
    vectors[1:, 0] = [k % 2 for k in range(30)]
    recot = np.array([number + 1 if number % 3 else 0 for number in numbers])
    return dataset(
        log["interactions"],
        log["items"],
        history_length=5,
        min_rows=1,
        recot=recot if width else recot * 0,
        vectors=torch.from_numpy(vectors[:, :width]),
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_together_is_alone(backbone: str, log: dict[str, pa.Table]) -> None:
    """Every backbone, with its own seed, order of rows, rate, decay and dropout."""
    data = data_of(log)
    test = data.of_split("test")
    together = train(data, backbone, HYPERS, **TRAINING, score=test)
    for number, hyper in enumerate(HYPERS):
        [alone] = train(data, backbone, [hyper], **TRAINING, score=test)
        assert (alone.epoch, alone.hyper) == (together[number].epoch, hyper)
        for name, weight in alone.weights.items():
            torch.testing.assert_close(together[number].weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)
        np.testing.assert_allclose(together[number].scores, alone.scores, rtol=1e-3, atol=1e-4)
    assert np.abs(together[0].scores - together[1].scores).max() > 0.01


@pytest.mark.parametrize("backbone", BACKBONES)
def test_compiled_steps_are_the_plain_ones(
    backbone: Backbone, log: dict[str, pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout's masks move on in both; the last batch of an epoch has another shape, and stays plain."""
    data = data_of(log)
    found = []
    for often in (2, 10**9):
        monkeypatch.setattr(stack, "_OFTEN", often)
        found.append(train(data, backbone, HYPERS, **TRAINING, score=data.of_split("test")))
    for compiled, plain in zip(*found, strict=True):
        assert compiled.epoch == plain.epoch
        np.testing.assert_allclose(compiled.scores, plain.scores, rtol=1e-4, atol=1e-5)


def test_a_step_is_torchs_adam(log: dict[str, pa.Table]) -> None:
    data = data_of(log)
    hyper = Hyper(3, 0.01, 0.0, 1e-2)
    models = Stack([build("deepfm", data.vocabulary, **SHAPE, seed=3)], [hyper], steps=0)
    plain = build("deepfm", data.vocabulary, **SHAPE, seed=3)
    adam = torch.optim.Adam(plain.parameters(), lr=0.01, weight_decay=1e-2)
    for start in range(0, 256, 64):
        rows = torch.arange(start, start + 64)
        batch = Batch(*(part[rows] for part in data.rows))
        [loss] = models.step(Batch(*(part[None] for part in batch)), data.tables, data.labels[rows][None])
        expected = F.binary_cross_entropy_with_logits(plain(batch, data.tables), data.labels[rows])
        adam.zero_grad()
        expected.backward()
        adam.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, weight in plain.named_parameters():
        # A step moves a weight by .01; where the gradient is near Adam's epsilon, rounding moves it by a little more.
        torch.testing.assert_close(models.weights[name][0], weight.detach(), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_weight_of_a_backbone_learns(backbone: str, log: dict[str, pa.Table]) -> None:
    """A field or layer left out of the answer would keep its first weights."""
    data = data_of(log)
    # FiBiNET's squeeze has one unit for five fields, and under some seeds its ReLU starts dead.
    before = build(backbone, data.vocabulary, **SHAPE, seed=5)
    models = Stack([build(backbone, data.vocabulary, **SHAPE, seed=5)], HYPERS[:1], steps=0)
    rows = data.of_split("train")
    for _ in range(3):
        batch = Batch(*(part[rows][None] for part in data.rows))
        models.step(batch, data.tables, data.labels[rows][None])
    stayed = {name for name, weight in before.named_parameters() if torch.equal(models.weights[name][0], weight)}
    linear = {f"embedding.{kind}_weight.weight" for kind in ("user", "item", "attribute")}
    assert stayed == (set() if backbone in ("deepfm", "fibinet") else linear)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_recot_tells_what_the_ids_do_not(backbone: str, log: dict[str, pa.Table]) -> None:
    """Users are all unknown here, without a history: the genre a user likes stands in its vector alone."""
    interactions = log["interactions"]
    empty = pa.array([[]] * len(interactions), type=interactions["history"].type)
    hidden = interactions.set_column(interactions.column_names.index("history"), "history", empty)
    names = pa.array([f"{user}-{row}" for row, user in enumerate(interactions["user_id"].to_pylist())])
    hidden = hidden.set_column(hidden.column_names.index("user_id"), "user_id", names)
    numbers = np.array([int(user[1:]) for user in interactions["user_id"].to_pylist()])
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    aucs = []
    for width in (2, 0):
        data = dataset(
            hidden, log["items"], history_length=5, min_rows=2, recot=(numbers % 2 + 1) * (width > 0),
            vectors=vectors[:, :width],
        )  # fmt: skip
        test = data.of_split("test")
        [model] = train(
            data, backbone, [Hyper(0, 0.02, 0.0, 0.0)], size=4, hidden=(16, 16), batch_size=64, epochs=30, patience=30,
            score=test,
        )  # fmt: skip
        aucs.append(roc_auc_score(data.labels[test].numpy(), model.scores))
    assert aucs[0] > 0.85 and aucs[0] > aucs[1] + 0.2, aucs


def test_the_best_epoch_is_chosen_on_valid_alone(log: dict[str, pa.Table]) -> None:
    """Other test labels change nothing but the measure."""
    data = data_of(log)
    labels = data.labels.clone()
    test = data.of_split("test")
    labels[test] = 1 - labels[test]
    other = replace(data, labels=labels)
    [one], [turned] = (train(d, "dcn", HYPERS[:1], **TRAINING, score=test) for d in (data, other))
    assert one.epoch == turned.epoch
    np.testing.assert_array_equal(one.scores, turned.scores)


def test_a_model_goes_back_to_its_best_epoch(log: dict[str, pa.Table]) -> None:
    """Trained on past it, each model ends as if training had stopped there."""
    data = data_of(log)
    valid = data.of_split("valid")
    shape = TRAINING | {"epochs": 12, "patience": 12}
    for number, long in enumerate(train(data, "deepfm", HYPERS, **shape, score=valid)):
        assert roc_auc_score(data.labels[valid].numpy(), long.scores) == pytest.approx(long.valid_auc, abs=1e-9)
        [short] = train(data, "deepfm", [HYPERS[number]], **shape | {"epochs": long.epoch}, score=valid)
        assert short.epoch == long.epoch
        np.testing.assert_allclose(long.scores, short.scores, atol=1e-3)


def test_patience_is_each_models_own(log: dict[str, pa.Table]) -> None:
    """A model that has not got better stops, whatever its neighbours do, and ends as it would have alone."""
    data = data_of(log)
    epochs: list[int] = []
    shape = TRAINING | {"epochs": 40, "patience": 1}
    together = train(data, "deepfm", HYPERS, **shape, progress=epochs.append)
    assert len(epochs) < 40
    for number, hyper in enumerate(HYPERS):
        own: list[int] = []
        [alone] = train(data, "deepfm", [hyper], **shape, progress=own.append)
        assert together[number].epoch == alone.epoch
        assert together[number].valid_auc == pytest.approx(alone.valid_auc, abs=1e-3)
        # One epoch without a gain after the best ends it.
        assert own[-1] == alone.epoch + 1
    assert epochs[-1] == max(model.epoch for model in together) + 1


def test_patience_counts_from_min_steps_on(log: dict[str, pa.Table]) -> None:
    """Six steps an epoch: with 60, no model stops before its tenth."""
    epochs: list[int] = []
    shape = TRAINING | {"epochs": 40, "patience": 1, "min_steps": 60}
    train(data_of(log), "deepfm", HYPERS[:1], **shape, progress=epochs.append)
    assert 10 <= epochs[-1] < 40


def test_valid_with_one_class_is_an_error(log: dict[str, pa.Table]) -> None:
    data = data_of(log)
    labels = data.labels.clone()
    labels[data.of_split("valid")] = 1
    with pytest.raises(ValueError, match="valid split must have liked and disliked rows"):
        train(replace(data, labels=labels), "dcn", HYPERS[:1], **TRAINING)
