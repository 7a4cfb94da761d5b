"""The search on valid, and the seeds of what it chose."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.ctr.test_stack import data_of
from trackrec.config import TrainCtrSettings
from trackrec.ctr import protocol
from trackrec.ctr.stack import Hyper

GRID: dict[str, list[Any]] = {
    "embedding_size": [2, 4],
    "batch_size": [64, 128],
    "learning_rate": [1e-4, 2e-2],
    "dropout": [0.0, 0.2],
    "l2": [1e-5],
}
SETTINGS = TrainCtrSettings.model_validate({"grid": GRID, "hidden": [8, 4], "epochs": 3, "seeds": 3, "min_rows": 1})


def test_the_best_point_on_valid_is_what_the_seeds_train(log: dict[str, pa.Table]) -> None:
    data = data_of(log)
    found = protocol.run(data, "dcn", SETTINGS, seed=11)
    order = [
        (point.embedding_size, point.batch_size, point.learning_rate, point.dropout, point.l2)
        for point in found.searched
    ]
    assert order == list(itertools.product(*GRID.values()))
    aucs = [point.valid_auc for point in found.searched]
    assert found.chosen == found.searched[int(np.argmax(aucs))] and max(aucs) > min(aucs) + 0.05
    chosen = found.chosen
    assert [model.hyper for model in found.models] == [
        Hyper(seed, chosen.learning_rate, chosen.dropout, chosen.l2) for seed in (11, 12, 13)
    ]
    assert found.models[0].weights["embedding.user.weight"].shape[1] == chosen.embedding_size
    # The search's model of that point, under the same seed, is the first of them.
    assert found.models[0].valid_auc == pytest.approx(chosen.valid_auc, abs=1e-4)
    assert all(len(model.scores) == len(data.of_split("test")) for model in found.models)


def test_test_labels_choose_nothing(log: dict[str, pa.Table]) -> None:
    data = data_of(log)
    labels = data.labels.clone()
    test = data.of_split("test")
    labels[test] = 1 - labels[test]
    one, turned = (protocol.run(d, "dcn", SETTINGS, seed=11) for d in (data, replace(data, labels=labels)))
    assert one.searched == turned.searched and one.chosen == turned.chosen
    for a, b in zip(one.models, turned.models, strict=True):
        np.testing.assert_array_equal(a.scores, b.scores)


def test_one_point_is_not_searched(log: dict[str, pa.Table], monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []
    plain = protocol.train

    def counted(data: Any, backbone: Any, hypers: list[Hyper], **options: Any) -> Any:
        trained.append(len(hypers))
        return plain(data, backbone, hypers, **options)

    monkeypatch.setattr(protocol, "train", counted)
    one = {name: values[:1] for name, values in GRID.items()}
    found = protocol.run(data_of(log), "dcn", SETTINGS.model_validate(SETTINGS.model_dump() | {"grid": one}), seed=1)
    assert trained == [3]
    assert found.searched == [found.chosen] and found.chosen.valid_auc == found.models[0].valid_auc
    # With the whole grid: a stack of four points a shape, then the seeds. So with and without the feature.
    for width in (5, 0):
        trained.clear()
        protocol.run(data_of(log, width), "dcn", SETTINGS, seed=1)
        assert trained == [4, 4, 4, 4, 3]


def test_a_point_that_diverges_is_not_chosen(log: dict[str, pa.Table]) -> None:
    """Its stack goes on without it; where every point diverges, that is an error."""
    wild = SETTINGS.model_copy(update={"grid": SETTINGS.grid.model_copy(update={"learning_rate": [1e38, 2e-2]})})
    found = protocol.run(data_of(log), "dcn", wild, seed=11)
    assert found.chosen.learning_rate == 2e-2
    assert {point.valid_auc for point in found.searched if point.learning_rate == 1e38} == {-1.0}
    alone = protocol.run(data_of(log), "dcn", SETTINGS, seed=11)
    tame = {p.valid_auc for p in found.searched if p.learning_rate == 2e-2}
    assert sorted(tame) == pytest.approx(
        sorted({p.valid_auc for p in alone.searched if p.learning_rate == 2e-2}), abs=1e-3
    )
    never = SETTINGS.model_copy(update={"grid": SETTINGS.grid.model_copy(update={"learning_rate": [1e38]})})
    with pytest.raises(FloatingPointError, match=r"dcn: the loss is no number at learning rate 1e\+38; lower"):
        protocol.run(data_of(log), "dcn", never, seed=11)
