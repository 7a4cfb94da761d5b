import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from trackrec.config import EvaluateSettings
from trackrec.evaluation import metrics

# Pairs (liked, disliked): (.8,.4) (.8,.6) (.3,.4) (.3,.6): two of four are in order.
LABELS = [1, 0, 1, 0]
SCORES = [0.8, 0.4, 0.3, 0.6]
USERS = ["a", "a", "b", "b"]


def test_by_hand() -> None:
    found = metrics.measure(LABELS, SCORES, USERS, bins=2)
    assert found.auc == 0.5
    # User a: .8 > .4, AUC 1; user b: .3 < .6, AUC 0.
    assert found.uauc == 0.5 and found.uauc_users == 2
    # .8 -> Yes (right), .4 -> No (right), .3 -> No (wrong), .6 -> Yes (wrong).
    assert found.acc == 0.5
    assert found.log_loss == pytest.approx(-(math.log(0.8) + math.log(0.6) + math.log(0.3) + math.log(0.4)) / 4)
    # [0, .5): labels 0, 1, scores .4, .3: |.5 - .35| / 2; [.5, 1]: labels 1, 0, scores .8, .6: |.5 - .7| / 2.
    assert found.ece == pytest.approx(0.15 / 2 + 0.2 / 2)
    assert (found.rows, found.positives, found.users, found.absent) == (4, 2, 2, {})


def test_ties_count_half() -> None:
    # Pairs: (.5,.5) half, (.5,.1) whole: 1.5 of 2.
    assert metrics.measure([1, 0, 0], [0.5, 0.5, 0.1], ["a"] * 3, bins=5).auc == 0.75


def test_uauc_leaves_out_users_with_one_class_and_weighs_users_equally() -> None:
    # a: AUC 1 on two rows; b: one class; c: liked .2 below .3 and above .1, AUC .5 on three rows.
    labels, scores = [1, 0, 1, 1, 1, 0, 0], [0.9, 0.1, 0.4, 0.6, 0.2, 0.3, 0.1]
    users = ["a", "a", "b", "b", "c", "c", "c"]
    assert metrics.user_aucs(labels, scores, users) == {"a": 1.0, "c": 0.5}
    found = metrics.measure(labels, scores, users, bins=10)
    assert found.uauc == 0.75 and found.uauc_users == 2 and found.users == 3


def test_a_score_of_one_half_means_yes() -> None:
    assert metrics.measure([1, 0], [0.5, 0.5], ["a", "b"], bins=10).acc == 0.5
    assert metrics.measure([1, 1], [0.5, 0.5], ["a", "b"], bins=10).acc == 1.0


def test_calibration_bins_are_half_open_and_the_last_is_closed() -> None:
    # .5 belongs to [.5, 1], with 1.0: |(1 + 1) - 1.5| / 3; 0 alone: |0 - 0| / 3.
    assert metrics.expected_calibration_error([1, 1, 0], [0.5, 1.0, 0.0], 2) == pytest.approx(0.5 / 3)
    # Perfectly calibrated in one bin, whatever the single rows say.
    assert metrics.expected_calibration_error([1, 0], [0.5, 0.5], 10) == 0


def test_a_certain_and_wrong_score_costs_much_but_not_infinitely() -> None:
    found = metrics.measure([1, 0], [0.0, 0.5], ["a", "b"], bins=10)
    assert found.log_loss == pytest.approx((-math.log(np.finfo(float).eps) + math.log(2)) / 2)


def test_one_class_has_no_auc_but_the_rest() -> None:
    found = metrics.measure([1, 1], [0.75, 0.5], ["a", "b"], bins=10)
    assert found.auc is None and found.uauc is None and found.auc_low is None
    assert found.absent == {"auc": "all rows have label 1", "uauc": "all rows have label 1"}
    assert found.acc == 1 and found.log_loss == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2)


def test_an_empty_slice_has_nothing_and_says_so() -> None:
    found = metrics.measure([], [], [], bins=10)
    assert found.rows == 0 and found.auc is found.acc is found.log_loss is found.ece is None
    assert found.absent["acc"] == "the slice has no rows"


def test_no_user_with_both_classes_has_no_uauc() -> None:
    found = metrics.measure([1, 0], [0.9, 0.1], ["a", "b"], bins=10)
    assert found.auc == 1 and found.uauc is None and found.absent["uauc"] == "no user has both classes"


def test_one_user_has_no_interval() -> None:
    found = metrics.measure([1, 0], [0.9, 0.1], ["a", "a"], bins=10)
    assert found.auc == 1 and found.auc_low is None and found.absent["auc_low"] == "fewer than two users"


@pytest.mark.parametrize("score", [-0.1, 1.1, math.nan, math.inf])
def test_what_is_no_probability_is_refused(score: float) -> None:
    with pytest.raises(ValueError, match="no probability"):
        metrics.measure([1, 0], [0.5, score], ["a", "b"], bins=10)


def test_wrong_labels_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        metrics.measure([1, 2], [0.5, 0.5], ["a", "b"], bins=10)
    with pytest.raises(ValueError, match="as many"):
        metrics.measure([1, 0], [0.5], ["a", "b"], bins=10)


def test_slices_by_train_rows() -> None:
    settings = EvaluateSettings(warm_rows=3, long_tail_rows=10)
    users, items = [0, 4, 4, 11, 11], [9, 3, 4, 11, 10]
    found = {name: mask.tolist() for name, mask in metrics.slices(users, items, settings).items()}
    assert found == {
        "overall": [True] * 5,
        "warm": [False, False, True, True, True],
        "cold": [True, True, False, False, False],
        "long_tail": [True, True, True, False, True],
    }


def test_bootstrap_resamples_are_sklearns_auc_under_weights() -> None:
    rng = np.random.default_rng(3)
    y, p = rng.integers(0, 2, 60), np.sort(rng.integers(0, 12, 60) / 12)
    weights = rng.integers(0, 4, (5, 60)).astype(float)
    expected = [roc_auc_score(y, p, sample_weight=row) for row in weights]
    assert metrics._weighted_aucs(y, p, weights) == pytest.approx(expected, abs=1e-12)


def test_user_aucs_are_sklearns_within_each_user() -> None:
    rng = np.random.default_rng(4)
    y, p, users = rng.integers(0, 2, 300), rng.integers(0, 9, 300) / 9, rng.integers(0, 12, 300).astype(str)
    expected = {user: roc_auc_score(y[users == user], p[users == user]) for user in np.unique(users)}
    assert metrics.user_aucs(y, p, users) == pytest.approx(expected, abs=1e-12)


def test_interval_is_repeatable_and_as_wide_as_theory_says() -> None:
    # One row a user, so users are independent draws; Hanley and McNeil's standard error for normal scores.
    rng = np.random.default_rng(0)
    n = 400
    y = np.repeat([1, 0], n)
    p = 1 / (1 + np.exp(-(rng.normal(size=2 * n) + y)))
    users = [str(i) for i in range(2 * n)]
    auc = roc_auc_score(y, p)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    error = math.sqrt((auc * (1 - auc) + (n - 1) * (q1 - auc**2) + (n - 1) * (q2 - auc**2)) / n**2)
    low, high = metrics.auc_interval(y, p, users, seed=1)
    assert (low, high) == metrics.auc_interval(y, p, users, seed=1)
    assert low < auc < high and (high - low) == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_interval_draws_users_not_rows() -> None:
    # Ten copies of each row of one user add rows but no users: the interval stays as wide.
    rng = np.random.default_rng(5)
    y, p = rng.integers(0, 2, 80), rng.random(80)
    users = np.array([f"u{i}" for i in range(80)])
    once = metrics.auc_interval(y, p, users, seed=0)
    tenfold = metrics.auc_interval(np.tile(y, 10), np.tile(p, 10), np.tile(users, 10), seed=0)
    assert tenfold == pytest.approx(once, abs=1e-12)
