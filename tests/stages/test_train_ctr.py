"""`train_ctr`: what it writes, what it refuses, and which RecCoTs a row reads."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from tests.stages.ranking_inputs import ROWS, SETTINGS, WIDTH, inputs, trained
from tests.tables import publish
from trackrec import storage
from trackrec.ctr import ranker
from trackrec.ctr.embedding import NONE
from trackrec.ctr.vectors import VectorError, of_table, random_in_place_of, shuffled_between_users
from trackrec.data import schema
from trackrec.evaluation import rankings
from trackrec.stages import train_ctr


def changed(**fields: Any) -> list[dict[str, Any]]:
    return [row | fields for row in ROWS["interactions"]]


def vectors(*rows: tuple[str, list[float]]) -> list[dict[str, Any]]:
    return [{"context_id": name, "vector": vector} for name, vector in rows]


def test_what_is_written(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    out = trained(tmp_path, given)
    found = rankings.read(out / "metrics")
    assert (found.backbone, found.feature, found.split, found.long_tail_rows) == ("deepfm", "recot", "test", 12)
    assert [one.seed for one in found.seeds] == [3, 4]
    test = [row for row in ROWS["interactions"] if row["split"] == "test"]
    assert found.rows == len(test) == 24
    # Test rows lie behind every context; u0 alone has none.
    assert found.covered["test"] == pytest.approx(22 / 24)

    ranked = schema.rows(out / "predictions", "ranked")
    assert [row["row_id"] for row in ranked] == 2 * [row["row_id"] for row in test]
    labels = [row["label"] for row in test]
    for one in found.seeds:
        scores = [row["score"] for row in ranked if row["seed"] == one.seed]
        assert one.slices["overall"].auc == pytest.approx(roc_auc_score(labels, scores))
        assert one.slices["overall"].log_loss == pytest.approx(log_loss(labels, scores))
        # Each user has 12 train rows: all are of the long tail.
        assert one.slices["long_tail"].rows == 24
    mean = np.mean([[row["score"] for row in ranked if row["seed"] == seed] for seed in (3, 4)], axis=0)
    assert sum(one.rows for one in found.calibration) == 24
    assert sum(one.rows * one.mean_score for one in found.calibration) == pytest.approx(mean.sum())
    assert sum(one.rows * one.liked for one in found.calibration) == pytest.approx(sum(labels))
    assert found.roc is not None
    assert (found.roc.false_positive_rate[0], found.roc.true_positive_rate[-1]) == (0, 1)
    facts = storage.numbers(out / "metrics")
    assert facts["auc"] == pytest.approx(np.mean([one.slices["overall"].auc for one in found.seeds]))


def test_a_saved_ranker_gives_the_scores_that_were_measured(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    out = trained(tmp_path, given)
    data = train_ctr._data(SETTINGS, "recot", 3, *(given[name] for name in given))
    rows = data.of_split("test")
    ranked = schema.rows(out / "predictions", "ranked")
    for seed in (3, 4):
        config, model = ranker.load(out / "trained", seed)
        assert config.names == data.names and config.vocabulary == data.vocabulary
        with torch.no_grad():
            scores = model(data.batch(rows), data.tables).sigmoid()
        expected = [row["score"] for row in ranked if row["seed"] == seed]
        np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)
    with pytest.raises(LookupError, match="has no model of seed 9; it has 3, 4"):
        ranker.load(out / "trained", 9)


def test_equal_seeds_equal_results(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    first, second = (trained(tmp_path / name, given, feature="none") for name in ("a", "b"))
    for name in ("trained", "predictions", "metrics"):
        assert storage.content_hash(first / name) == storage.content_hash(second / name)


def test_a_row_reads_no_recot_that_is_not_older_than_itself(tmp_path: Path) -> None:
    """Contexts as of moment 4: rows 0 to 4 of each user come no later, so they read none."""
    given = inputs(tmp_path)
    data = train_ctr._data(SETTINGS, "recot", 3, *(given[name] for name in given))
    for row, read in zip(ROWS["interactions"], data.rows.recot.tolist(), strict=True):
        step = row["timestamp"] % 1000
        assert (read != NONE) == (step > 4 and row["user_id"] != "u0"), row


@pytest.mark.parametrize("feature", ["shuffled", "random", "history"])
def test_controls_train_as_the_recots_do(tmp_path: Path, feature: str) -> None:
    found = rankings.read(trained(tmp_path, inputs(tmp_path), feature=feature) / "metrics")
    assert found.feature == feature
    assert found.covered["test"] == pytest.approx(22 / 24)


def test_shuffled_vectors_are_of_other_users() -> None:
    names = [f"c{k}" for k in range(6)]
    table = torch.arange(7.0)[:, None]
    owners = {name: frozenset({f"u{k // 2}"}) for k, name in enumerate(names)}
    found = shuffled_between_users(names, table, owners, seed=1)[:, 0].tolist()
    assert found[0] == 0 and sorted(found) == list(range(7))
    for receiver, giver in enumerate(found[1:]):
        assert receiver // 2 != (giver - 1) // 2


def test_random_vectors_have_each_columns_mean_and_spread() -> None:
    means, spreads = torch.linspace(-3, 3, 50), torch.linspace(0.1, 2, 50)
    real = torch.cat([torch.zeros(1, 50), torch.randn(2000, 50) * spreads + means])
    found = random_in_place_of(real, seed=1)
    assert torch.equal(found, random_in_place_of(real, seed=1)) and torch.equal(found[0], torch.zeros(50))
    torch.testing.assert_close(found[1:].mean(0), means, atol=0.2, rtol=0)
    torch.testing.assert_close(found[1:].std(0), spreads, atol=0.01, rtol=0.1)
    own = (found[1:] - found[1:].mean(0)) * (real[1:] - real[1:].mean(0))
    assert own.mean().abs() < 0.02


def test_controls_reach_the_model(tmp_path: Path) -> None:
    """Same rows, same contexts; what stands there is another user's, or random."""
    given = inputs(tmp_path)
    own, shuffled, randomly = (
        train_ctr._data(SETTINGS, feature, 3, *(given[name] for name in given))
        for feature in ("recot", "shuffled", "random")
    )
    for control in (shuffled, randomly):
        assert torch.equal(control.rows.recot, own.rows.recot)
        assert not (control.tables.vectors[1:] == own.tables.vectors[1:]).all(1).any()
    # A permutation: every vector is somebody's.
    rows = {tuple(vector) for vector in own.tables.vectors[1:].tolist()}
    assert {tuple(vector) for vector in shuffled.tables.vectors[1:].tolist()} == rows
    assert not {tuple(vector) for vector in randomly.tables.vectors[1:].tolist()} & rows


def test_no_vector_goes_to_a_user_who_shares_its_history(tmp_path: Path) -> None:
    """Through an example, c1 is u2's too: its vector may go to neither u1 nor u2, for any seed."""
    given = inputs(tmp_path)
    shared = {"row_id": 10**6, "split": "train", "context_id": "c1", "user_id": "u2", "item_id": "i", "title": "T"}
    examples = publish(
        tmp_path / "shared", examples=[shared | {"label": 1, "user_train_rows": 1, "item_train_rows": 1}]
    )
    names, own = of_table(schema.read(given["encoded"], "vectors"), WIDTH)
    for seed in range(30):
        paths = given | {"examples": examples}
        table = train_ctr._data(SETTINGS, "shuffled", seed, *(paths[name] for name in paths)).tables.vectors
        for receiver in ("c1", "c2"):
            got = table[1 + names.index(receiver)]
            assert not any(torch.equal(got, own[1 + names.index(giver)]) for giver in ("c1", "c2"))


def test_slices_and_calibration(tmp_path: Path) -> None:
    """Thresholds that split the rows, by hand from the train rows; the seeds' mean score in bins of a half."""
    settings = SETTINGS.model_copy(update={"warm_rows": 7, "long_tail_rows": 8, "calibration_bins": 2})
    out = trained(tmp_path, inputs(tmp_path), settings=settings)
    found = rankings.read(out / "metrics")
    train = [row for row in ROWS["interactions"] if row["split"] == "train"]
    test = [row for row in ROWS["interactions"] if row["split"] == "test"]
    users, items = (Counter(row[name] for row in train) for name in ("user_id", "item_id"))
    tail = [users[row["user_id"]] <= 8 or items[row["item_id"]] <= 8 for row in test]
    warm = [users[row["user_id"]] > 7 and items[row["item_id"]] > 7 for row in test]
    slices = found.seeds[0].slices
    assert 0 < sum(tail) < 24 and 0 < sum(warm) < 24
    assert (slices["long_tail"].rows, slices["warm"].rows, slices["cold"].rows) == (
        sum(tail),
        sum(warm),
        24 - sum(warm),
    )
    ranked = schema.rows(out / "predictions", "ranked")
    scores = np.mean([[row["score"] for row in ranked if row["seed"] == seed] for seed in (3, 4)], axis=0)
    of_tail = [row["score"] for row, inside in zip(ranked[:24], tail, strict=True) if inside]
    labels = np.array([row["label"] for row in test])
    assert slices["long_tail"].auc == pytest.approx(roc_auc_score(labels[np.array(tail)], of_tail))
    for one in found.calibration:
        inside = (scores >= 0.5) == (one.mean_score >= 0.5)
        assert (one.rows, one.liked) == (inside.sum(), pytest.approx(labels[inside].mean()))
        assert one.mean_score == pytest.approx(scores[inside].mean())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (vectors(("c1", [1.0, 2.0])), r"context c1 has 2 numbers, `train_ctr.vector_width` is 4"),
        (
            vectors(("c1", [1.0, float("nan"), 0, 0])),
            r"1 of 1 vectors hold a number that is not finite \(.* c1",
        ),
        (vectors(("c1", [1.0, float("inf"), 0, 0])), "not finite"),
        (vectors(("c1", [0.0] * 4), ("c1", [1.0] * 4)), "several vectors"),
        (vectors(), "is empty"),
        (vectors(("elsewhere", [0.0] * 4)), r"1 of 1 vectors are of contexts that .* lacks \(first: elsewhere\)"),
    ],
)
def test_vectors_that_are_refused(tmp_path: Path, given: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(VectorError, match=message):
        trained(tmp_path, inputs(tmp_path, vectors=given))
    assert not (tmp_path / "deepfm-recot-3" / "metrics").exists()


def test_a_ragged_table_names_the_first_that_differs(tmp_path: Path) -> None:
    given = inputs(tmp_path, vectors=vectors(("c1", [0.0] * 4), ("c2", [0.0] * 3)))
    with pytest.raises(VectorError, match="context c2 has 3 numbers"):
        of_table(schema.read(given["encoded"], "vectors"), WIDTH)


def test_users_without_a_vector_read_the_learned_one(tmp_path: Path) -> None:
    """Missing users are no error; how many rows have a RecCoT stands in the metrics."""
    given = inputs(tmp_path, vectors=vectors(("c1", [0.5] * 4), ("c2", [0.1] * 4)))
    assert rankings.read(trained(tmp_path, given) / "metrics").covered["test"] == pytest.approx(4 / 24)


def test_an_item_that_training_never_saw(tmp_path: Path) -> None:
    rows = [row | ({"item_id": "i99"} if row["split"] == "test" else {}) for row in ROWS["interactions"]]
    items = [*ROWS["items"], {"item_id": "i99", "title": "New", "attributes": ["drama"]}]
    out = trained(tmp_path, inputs(tmp_path, interactions=rows, items=items))
    assert rankings.read(out / "metrics").seeds[0].slices["overall"].rows == 24
    # All unseen items are one to the model: others of the same attributes are answered alike.
    items.append({"item_id": "i98", "title": "Newer", "attributes": ["drama"]})
    mixed = [
        row | ({"item_id": "i98"} if row["item_id"] == "i99" and int(row["user_id"][1:]) % 2 else {}) for row in rows
    ]
    assert {row["item_id"] for row in mixed if row["split"] == "test"} == {"i98", "i99"}
    again = trained(tmp_path / "again", inputs(tmp_path / "again", interactions=mixed, items=items))
    scores = [schema.read(folder / "predictions", "ranked")["score"].to_pylist() for folder in (out, again)]
    assert scores[0] == scores[1]


def test_a_slice_with_one_class_has_no_auc_and_says_why(tmp_path: Path) -> None:
    rows = [row | ({"label": 1} if row["split"] == "test" else {}) for row in ROWS["interactions"]]
    out = trained(tmp_path, inputs(tmp_path, interactions=rows))
    found = rankings.read(out / "metrics")
    overall = found.seeds[0].slices["overall"]
    assert overall.auc is None and overall.absent["auc"] == "all rows have label 1"
    assert overall.log_loss is not None and found.roc is None
    assert "auc" not in storage.numbers(out / "metrics") and "log_loss" in storage.numbers(out / "metrics")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row | {"split": "test"} for row in ROWS["interactions"]], "nothing to train on"),
        ([row for row in ROWS["interactions"] if row["split"] != "test"], "no row in split 'test'"),
        ([row for row in ROWS["interactions"] if row["split"] != "valid"], "valid split must have liked and disliked"),
    ],
)
def test_a_split_without_rows_is_an_error(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, inputs(tmp_path, interactions=rows))


@pytest.mark.parametrize(("backbone", "feature"), [("xdeepfm", "recot"), ("din", "titles")])
def test_unknown_names_are_refused(tmp_path: Path, backbone: str, feature: str) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        trained(tmp_path, inputs(tmp_path), backbone=backbone, feature=feature)
