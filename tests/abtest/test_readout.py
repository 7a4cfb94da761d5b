from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trackrec.abtest import log as logs
from trackrec.abtest.bucketing import Experiment
from trackrec.abtest.log import Reading, summed
from trackrec.abtest.moments import Lift, Ratio, estimate, lift
from trackrec.abtest.readout import Analysis, Readout, Row, read_out

from .logs import impressions, moments, write

SALTED = Experiment(salt="exp-1", shares={"control": 0.3, "treatment": 0.3})
ANALYSIS = Analysis("control", "treatment", (0.5, 0.5), resamples=50, halvings=20)


def read(log: Path, analysis: Analysis = ANALYSIS, **reading: Any) -> Readout:
    with summed(log, Reading(analysis.control, analysis.treatment, covariates=analysis.covariates, **reading)) as users:
        return read_out(users, analysis)


def row(found: Readout, metric: str, where: str = "all") -> Row:
    return next(one for one in found.results if (one.metric, one.slice) == (metric, where))


def by_hand(columns: dict[str, Any], tail_items: int | None = None) -> dict[str, dict[str, list[float]]]:
    """Each bucket's users and their sums, row by row: clicks, conversions, revenue, then the same of the long tail."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    seen: dict[Any, int] = defaultdict(int)
    for one in rows:
        seen[one["item_id"]] += 1
    buckets: dict[str, set[str]] = defaultdict(set)
    found: dict[str, list[float]] = defaultdict(lambda: [0.0] * 6)
    for one in rows:
        buckets[one["user_id"]].add(one["bucket"])
        for number, name in enumerate(("clicks", "conversions", "revenue")):
            found[one["user_id"]][number] += one[name]
            found[one["user_id"]][number + 3] += one[name] * (
                tail_items is not None and seen[one["item_id"]] <= tail_items
            )
    made: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for user, own in buckets.items():
        if len(own) == 1:
            made[own.pop()][user] = found[user]
    return made


def test_the_numbers_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    columns = impressions(np.random.default_rng(1), 300)
    # Three users in two buckets, and one of another test.
    for user in ("user-5", "user-6", "user-7"):
        columns["bucket"][columns["user_id"].index(user)] = "other"
        columns["user_id"].append(user), columns["bucket"].append("treatment")
        for name in ("clicks", "conversions", "revenue", "before"):
            columns[name] = np.append(columns[name], 0)
        columns["item_id"].append("item-0")
    columns["bucket"] = [
        "other" if user == "user-9" else b for user, b in zip(columns["user_id"], columns["bucket"], strict=True)
    ]
    expected = by_hand(columns, tail_items=20)
    found = read(write(tmp_path / "log.parquet", columns), long_tail_items=20)
    assert (found.rows, found.dropped_in_two_buckets, found.cvr_per) == (len(columns["user_id"]), 3, "click")
    assert found.users == {name: len(users) for name, users in expected.items()}
    sides = [np.array(list(expected[name].values())) for name in ("control", "treatment")]
    for where, first in (("all", 0), ("long-tail", 3)):
        clicks, conversions, revenue = (tuple(side[:, first + k] for side in sides) for k in range(3))
        for metric, over, under in (
            ("cvr", conversions, clicks),
            ("revenue", revenue, tuple(map(np.ones_like, revenue))),
        ):
            one = row(found, metric, where)
            assert one.control == pytest.approx(over[0].sum() / under[0].sum())
            assert one.treatment == pytest.approx(over[1].sum() / under[1].sum())
            pairs = [moments(np.column_stack([u, o])) for o, u in zip(over, under, strict=True)]
            lifted = lift(estimate(Ratio(1, 0), pairs[0]), estimate(Ratio(1, 0), pairs[1]), 0.95)
            assert isinstance(lifted, Lift)
            assert (one.lift, one.low, one.high, one.p_value) == pytest.approx(
                (lifted.value, lifted.low, lifted.high, lifted.p_value)
            )


def test_one_log_in_any_shape_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in another order, in several files, or summed by user before; and users in smaller batches."""
    columns = impressions(np.random.default_rng(2), 500)
    table = pa.table(columns)
    analysis = Analysis("control", "treatment", (0.5, 0.5), covariates=("before",), resamples=50, halvings=20)
    whole = read(write(tmp_path / "log.parquet", columns), analysis)
    order = np.random.default_rng(3).permutation(len(table))
    for number, part in enumerate(np.array_split(order, 3)):
        (tmp_path / "parts" / f"dt={number}").mkdir(parents=True)
        pq.write_table(table.take(part), tmp_path / "parts" / f"dt={number}" / "part.parquet")
    assert read(tmp_path / "parts", analysis) == whole
    names = ["clicks", "conversions", "revenue"]
    days = table.group_by(["user_id", "bucket", "before"]).aggregate(
        [*((n, "sum") for n in names), ("item_id", "count")]
    )
    renamed = days.rename_columns({**{f"{n}_sum": n for n in names}, "item_id_count": "impressions"})
    pq.write_table(renamed, tmp_path / "users.parquet")
    by_user = read(tmp_path / "users.parquet", analysis)
    assert by_user.model_copy(update={"rows": whole.rows}) == whole
    monkeypatch.setattr(logs, "BATCH", 37)
    small = read(tmp_path / "parts", Analysis("control", "treatment", (0.5, 0.5), covariates=("before",)))
    for one, other in zip(small.results, whole.results, strict=True):
        assert (one.lift, one.low, one.variance_removed) == pytest.approx(
            (other.lift, other.low, other.variance_removed)
        )


def test_the_seed_repeats_and_matters(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", impressions(np.random.default_rng(4), 200))
    first, again, other = (read(log, Analysis("control", "treatment", (1, 1), resamples=50, seed=s)) for s in (1, 1, 2))
    assert first == again
    assert row(first, "cvr").bootstrap_low != row(other, "cvr").bootstrap_low
    assert row(first, "cvr").low == row(other, "cvr").low


def test_the_salt_gives_the_buckets_that_serving_gave(tmp_path: Path) -> None:
    columns = impressions(np.random.default_rng(5), 400)
    served = [SALTED.bucket(user) for user in columns["user_id"]]
    inside = [bucket is not None for bucket in served]
    logged = {
        name: [value for value, keep in zip(values, inside, strict=True) if keep]
        for name, values in (columns | {"bucket": served}).items()
    }
    by_log = read(write(tmp_path / "logged.parquet", logged))
    # As the model `ranker` says it: "" of a user outside the experiment.
    everybody = write(tmp_path / "arms.parquet", columns | {"bucket": [bucket or "" for bucket in served]})
    del columns["bucket"]
    by_salt = read(write(tmp_path / "log.parquet", columns), experiment=SALTED)
    assert by_salt.in_no_bucket == len({u for u, keep in zip(columns["user_id"], inside, strict=True) if not keep}) > 0
    assert by_salt.model_copy(update={"in_no_bucket": 0, "rows": by_log.rows}) == by_log
    assert read(tmp_path / "logged.parquet", experiment=SALTED) == by_log
    assert read(everybody, experiment=SALTED) == by_salt
    with pytest.raises(logs.LogError, match="another bucket than salt 'exp-2'"):
        read(tmp_path / "logged.parquet", experiment=SALTED.model_copy(update={"salt": "exp-2"}))


def test_without_clicks_cvr_is_per_impression(tmp_path: Path) -> None:
    columns = impressions(np.random.default_rng(6), 100)
    del columns["clicks"]
    found = read(write(tmp_path / "log.parquet", columns), Analysis("control", "treatment", (1, 1), per_click=False))
    control = [b == "control" for b in columns["bucket"]]
    assert row(found, "cvr").control == pytest.approx(columns["conversions"][control].sum() / sum(control))
    assert found.cvr_per == "impression"
    assert [one.slice for one in found.results] == ["all", "all"]


def test_a_long_tail_column(tmp_path: Path) -> None:
    columns = impressions(np.random.default_rng(7), 200)
    tail = np.array([item == "item-0" for item in columns["item_id"]])
    found = read(write(tmp_path / "log.parquet", columns | {"long_tail": tail}))
    control = np.array([b == "control" for b in columns["bucket"]])
    users = len({u for u, own in zip(columns["user_id"], control, strict=True) if own})
    assert row(found, "revenue", "long-tail").control == pytest.approx(columns["revenue"][tail & control].sum() / users)


def test_a_user_without_a_value_has_the_mean(tmp_path: Path) -> None:
    columns = impressions(np.random.default_rng(8), 200)
    users = columns["user_id"]
    known = {user: value for user, value in zip(users, columns["before"], strict=True) if int(user[5:]) % 5}
    mean = np.mean(list(known.values()))
    analysis = Analysis("control", "treatment", (1, 1), covariates=("before",), resamples=0, halvings=0)
    absent = read(write(tmp_path / "a.parquet", columns | {"before": [known.get(user) for user in users]}), analysis)
    filled = read(
        write(tmp_path / "b.parquet", columns | {"before": [known.get(user, mean) for user in users]}), analysis
    )
    assert absent.without_value == {"before": 40}
    for one, other in zip(absent.results, filled.results, strict=True):
        assert (one.lift, one.variance_removed) == pytest.approx((other.lift, other.variance_removed))


def test_halvings_reject_as_often_as_they_may(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", impressions(np.random.default_rng(9), 2000))
    found = read(log, Analysis("control", "treatment", (1, 1), resamples=0, halvings=2000))
    for one in found.results:
        assert one.bootstrap_low is None
        assert one.halvings_rejected == pytest.approx(0.05, abs=0.018)


def test_a_bucket_where_nothing_is_sold_has_no_lift(tmp_path: Path) -> None:
    columns = impressions(np.random.default_rng(10), 100)
    for name in ("clicks", "conversions", "revenue"):
        columns[name] = np.where(np.array(columns["bucket"]) == "control", 0, columns[name])
    found = read(write(tmp_path / "log.parquet", columns))
    assert "cannot be told from zero" in row(found, "revenue").reason and row(found, "revenue").lift is None
    assert "nothing to divide by" in row(found, "cvr").reason


def bad(**columns: Any) -> dict[str, Any]:
    """Four users, with these columns instead."""
    made = {
        "user_id": ["a", "b", "c", "d"],
        "bucket": ["control", "control", "treatment", "treatment"],
        "conversions": [1, 0, 1, 1],
        "revenue": [1.0, 0.0, 2.0, 1.5],
        "item_id": [1, 2, 3, 3],
    } | columns
    return {name: values for name, values in made.items() if values is not None}


@pytest.mark.parametrize(
    ("columns", "reading", "message"),
    [
        ({"revenue": None}, {}, "lacks the column revenue. It has: user_id"),
        ({"bucket": None}, {}, "or give the salt"),
        ({"item_id": None}, {"long_tail_items": 3}, "lacks the column item_id"),
        ({"conversions": [1, -1, 1, 1]}, {}, "conversions is null or not finite, or negative in 1 of 4 rows"),
        ({"clicks": [1, None, 1, 1]}, {}, "clicks is null"),
        ({"impressions": [1, 1, 1, -5]}, {}, "impressions is null or not finite, or negative"),
        ({"revenue": [1.0, float("nan"), 2.0, 1.5]}, {}, "revenue is null or not finite in 1"),
        ({"revenue": ["1", "2", "3", "4"]}, {}, "revenue .* is VARCHAR; make it a number"),
        ({"revenue": [[1], [2], [3], [4]]}, {}, r"revenue .* is BIGINT\[\]; make it a number"),
        ({"user_id": [["a"], ["b"], ["c"], ["d"]]}, {}, r"user_id .* is VARCHAR\[\]"),
        ({"user_id": [1.0, 2.0, 3.0, 4.0]}, {}, "user_id .* is DOUBLE"),
        ({"user_id": ["a", None, "c", "d"]}, {}, "user_id is null in 1 of 4"),
        ({"bucket": ["control", None, "treatment", "treatment"]}, {}, "bucket is null"),
        ({"item_id": [1, None, 3, 3]}, {"long_tail_items": 3}, "item_id is null"),
        ({"long_tail": [1, 0, 0, 1]}, {}, "long_tail .* make it true or false"),
        ({"bucket": ["control"] * 4}, {}, "no user in bucket 'treatment'; it has: 'control' .4 users"),
        ({"bucket": ["a", "a", "b", "b"]}, {}, "'control' nor in 'treatment'"),
    ],
)  # fmt: skip
def test_a_bad_log_is_refused(tmp_path: Path, columns: dict[str, Any], reading: dict[str, Any], message: str) -> None:
    with pytest.raises(logs.LogError, match=message):
        read(write(tmp_path / "log.parquet", bad(**columns)), **reading)


def test_an_empty_log_is_refused(tmp_path: Path) -> None:
    table = pa.table(bad()).slice(0, 0)
    pq.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(logs.LogError, match="has no rows"):
        read(tmp_path / "log.parquet")


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], "before has several values for 1 users"),
        ([1.0, 2.0, 3.0, 4.0, None], "before has several values for 1 users"),
        ([None] * 5, "no user of the two buckets has a value in before"),
        ([float("inf"), 2.0, 3.0, 4.0, 4.0], "before is not finite"),
    ],
)
def test_a_bad_covariate_is_refused(tmp_path: Path, before: list[float | None], message: str) -> None:
    columns = {name: [*values, values[-1]] for name, values in bad().items()} | {
        "before": pa.array(before, pa.float64())
    }
    analysis = Analysis("control", "treatment", (1, 1), covariates=("before",))
    with pytest.raises(logs.LogError, match=message):
        read(write(tmp_path / "log.parquet", columns), analysis)


def test_a_covariate_that_all_share_is_refused(tmp_path: Path) -> None:
    analysis = Analysis("control", "treatment", (1, 1), covariates=("before",))
    with pytest.raises(ValueError, match="same for all users"):
        read(write(tmp_path / "log.parquet", bad(before=[1.0] * 4)), analysis)


def test_names_are_no_sql(tmp_path: Path) -> None:
    """A bucket's and a column's name are the log's, and stay text."""
    hostile = """x'"; DROP TABLE users; --"""
    columns = impressions(np.random.default_rng(11), 100)
    columns["bucket"] = [hostile if b == "control" else b for b in columns["bucket"]]
    columns[hostile] = columns.pop("before")
    log = write(tmp_path / "it's [one]?*.parquet", columns)
    analysis = Analysis(hostile, "treatment", (1, 1), covariates=(hostile,), resamples=0, halvings=0)
    found = read(log, analysis)
    assert found.users[hostile] == 50 and row(found, "cvr").lift is not None
