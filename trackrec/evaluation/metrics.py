"""Metrics of a click model's probabilities (paper 4.1.5: AUC, ACC, LogLoss; besides them UAUC and calibration).

AUC      P(score of a liked row > score of a disliked row), ties counting half.
UAUC     unweighted mean of the AUC within each user, over the users who have both classes (CoLLM's rule).
ACC      share of rows where (score >= 0.5) is the label.
LogLoss  mean of -ln(probability given to the label); scores are clipped to float64's epsilon from 0 and 1.
ECE      expected calibration error over equal-width bins: sum over bins of share of rows x |mean label - mean score|.
"""

import numpy as np
import numpy.typing as npt
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from trackrec.config import EvaluateSettings, TrainCtrSettings
from trackrec.evaluation.results import Measures, SliceName

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

RESAMPLES = 1000
# Resamples worked on at once, times rows: bounds the bootstrap's memory (8 bytes each, a few arrays).
_CELLS = 4_000_000


def slices(
    user_train_rows: npt.ArrayLike, item_train_rows: npt.ArrayLike, settings: EvaluateSettings | TrainCtrSettings
) -> dict[SliceName, Mask]:
    """Which rows belong to which slice, by the train rows of each row's user and item.

    warm: both have more than `warm_rows`; cold: the rest; long_tail: either has at most `long_tail_rows`.
    """
    users, items = np.asarray(user_train_rows), np.asarray(item_train_rows)
    warm = (users > settings.warm_rows) & (items > settings.warm_rows)
    return {
        "overall": np.ones(len(users), dtype=bool),
        "warm": warm,
        "cold": ~warm,
        "long_tail": (users <= settings.long_tail_rows) | (items <= settings.long_tail_rows),
    }


def measure(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    users: npt.ArrayLike,
    *,
    bins: int,
    interval: bool = True,
    seed: int = 0,
) -> Measures:
    """All metrics of one slice.

    Args:
        labels: 1 liked, 0 not, one a row.
        scores: P(liked), in [0, 1].
        users: the user of each row.
        bins: of the calibration error.
        interval: whether to bootstrap AUC's interval; it takes far longer than all else.
        seed: of the bootstrap.

    Raises:
        ValueError: the lengths differ, a label is not 0 or 1, or a score is no probability.
    """
    y, p, u = np.asarray(labels, dtype=np.int64), np.asarray(scores, dtype=np.float64), np.asarray(users, dtype=str)
    if not len(y) == len(p) == len(u):
        raise ValueError(f"{len(y)} labels, {len(p)} scores and {len(u)} users: they must be as many")
    if not np.isin(y, (0, 1)).all():
        raise ValueError("a label is neither 0 nor 1")
    # Written so that NaN fails too.
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("a score is no probability in [0, 1]")
    found = Measures(rows=len(y), positives=int(y.sum()), users=len(np.unique(u)))
    if not len(y):
        found.absent = dict.fromkeys(("auc", "uauc", "acc", "log_loss", "ece"), "the slice has no rows")
        return found
    found.acc = float(accuracy_score(y, p >= 0.5))
    found.log_loss = float(log_loss(y, p, labels=[0, 1]))
    found.ece = expected_calibration_error(y, p, bins)
    if not 0 < found.positives < found.rows:
        found.absent = dict.fromkeys(("auc", "uauc"), f"all rows have label {y[0]}")
        return found
    found.auc = float(roc_auc_score(y, p))
    limits = auc_interval(y, p, u, seed=seed) if interval else None
    if limits is not None:
        found.auc_low, found.auc_high = limits
    else:
        reason = "fewer than two users" if interval else "not bootstrapped: see the spread over the seeds"
        found.absent["auc_low"] = found.absent["auc_high"] = reason
    per_user = user_aucs(y, p, u)
    found.uauc_users = len(per_user)
    if per_user:
        found.uauc = float(np.mean(list(per_user.values())))
    else:
        found.absent["uauc"] = "no user has both classes"
    return found


def user_aucs(labels: npt.ArrayLike, scores: npt.ArrayLike, users: npt.ArrayLike) -> dict[str, float]:
    """AUC within each user who has both classes."""
    y, p, u = np.asarray(labels), np.asarray(scores, dtype=np.float64), np.asarray(users)
    order = np.lexsort((p, u))
    names, starts = np.unique(u[order], return_index=True)
    found = {}
    for name, rows in zip(names, np.split(order, starts[1:]), strict=True):
        if 0 < y[rows].sum() < len(rows):
            # Not scikit-learn's: its checks take a millisecond a call, and there are thousands of users.
            found[str(name)] = float(_weighted_aucs(y[rows], p[rows], np.ones((1, len(rows))))[0])
    return found


def expected_calibration_error(labels: npt.ArrayLike, scores: npt.ArrayLike, bins: int) -> float:
    """ECE over `bins` equal-width bins [k/bins, (k+1)/bins), the last one closed."""
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    which = np.minimum((p * bins).astype(np.int64), bins - 1)
    # A bin's share x |mean label - mean score| = |sum of labels - sum of scores| / rows.
    gaps = np.bincount(which, weights=y - p, minlength=bins)
    return float(np.abs(gaps).sum() / len(y))


def auc_interval(
    labels: npt.ArrayLike, scores: npt.ArrayLike, users: npt.ArrayLike, *, seed: int
) -> tuple[float, float] | None:
    """The 95 % percentile interval of AUC by bootstrap over users (a user's rows are not independent draws).

    Returns None with fewer than two users. A resample in which one class is missing has no AUC and does not count.
    """
    y, p = np.asarray(labels), np.asarray(scores)
    names, user = np.unique(np.asarray(users), return_inverse=True)
    if len(names) < 2:
        return None
    order = np.argsort(p, kind="stable")
    y, p, user = y[order], p[order], user[order]
    rng = np.random.default_rng(seed)
    chunk = max(1, _CELLS // len(y))
    aucs = []
    for start in range(0, RESAMPLES, chunk):
        draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=min(chunk, RESAMPLES - start))
        aucs.append(_weighted_aucs(y, p, draws[:, user].astype(np.float64)))
    low, high = np.nanquantile(np.concatenate(aucs), [0.025, 0.975])
    return float(low), float(high)


def _weighted_aucs(y: npt.NDArray[np.int64], p: Floats, weights: Floats) -> Floats:
    """AUC under each row of `weights` [R, n]; `p` ascends. NaN where a class has no weight."""
    # One column a distinct score: positives beat the negatives before theirs, and half of those beside them.
    starts = np.flatnonzero(np.r_[True, p[1:] != p[:-1]])
    positive = np.add.reduceat(weights * y, starts, axis=1)
    negative = np.add.reduceat(weights * (1 - y), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    wins = (positive * (below + negative / 2)).sum(axis=1)
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    return np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)
