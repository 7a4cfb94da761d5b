"""No context may hold its example's target or anything later, whatever the log looks like."""

import tempfile
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ibis.expr.types import Table

from trackrec.config import ContextsSettings
from trackrec.data import contexts, recipe
from trackrec.data.engine import open_engine
from trackrec.data_config import DataSettings

DAY = 86_400
# user, item, moment: each user of a log is a case of its own. A few moments around midnights, so that ties and the
# borders of periods are common.
MOMENTS = st.sampled_from([0, 1, DAY - 1, DAY, DAY + 1, 2 * DAY - 1, 2 * DAY, 3 * DAY, 7 * DAY])
LOGS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), MOMENTS), min_size=20, max_size=80)


@pytest.mark.parametrize(("kind", "days"), [("rolling", 1), ("snapshot", 1), ("snapshot", 2)])
@given(log=LOGS, length=st.integers(2, 4), min_history=st.integers(0, 2))
@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_no_context_holds_its_target_or_anything_later(
    kind: str, days: int, log: list[tuple[int, int, int]], length: int, min_history: int
) -> None:
    # The rating is the row's line: it tells which rows a history holds.
    raw = pa.table(
        {
            "line": pa.array(range(len(log)), pa.int64()),
            "user_id": pa.array([row[0] for row in log], pa.int64()),
            "item_id": pa.array([row[1] for row in log], pa.int64()),
            "rating": pa.array(range(len(log)), pa.float64()),
            "timestamp": pa.array([row[2] for row in log], pa.int64()),
        }
    )
    given_settings = ContextsSettings.model_validate(
        {"domain": "movies", "kind": kind, "snapshot_days": days, "history_length": length, "min_history": min_history}
    )
    with tempfile.TemporaryDirectory() as folder, open_engine(DataSettings(), Path(folder)) as engine:

        def stored(name: str, table: pa.Table) -> Table:
            pq.write_table(table, Path(folder) / name)
            return engine.parquet(Path(folder) / name)

        ratings = stored("ratings", raw)
        items = stored("items", pa.table({"item_id": ["1", "2", "3"], "title": ["One", "Two", None]}))
        table = stored(
            "table", recipe.interactions(recipe.movielens_100k(ratings), recipe.FILE_ORDER, 1000).to_pyarrow()
        )
        rows = stored("rows", contexts.histories(table, items, given_settings).to_pyarrow())
        kept = stored("kept", contexts.contexts(rows, given_settings, seed=0).to_pyarrow())
        interactions = table.to_pyarrow().to_pylist()
        known = {row["context_id"]: row for row in kept.to_pyarrow().to_pylist()}
        examples = contexts.examples(rows, kept, given_settings, seed=0).to_pyarrow().to_pylist()

    of_user = defaultdict(list)
    expected = {}
    for row in interactions:
        if kind == "rolling":
            before = list(of_user[row["user_id"]])
        else:
            start = row["timestamp"] - row["timestamp"] % (days * DAY)
            before = [other for other in of_user[row["user_id"]] if other["timestamp"] < start]
        of_user[row["user_id"]].append(row)
        if len(before[-length:]) >= min_history:
            expected[row["row_id"]] = [other["rating"] for other in before[-length:]]
    found = {row["row_id"]: [item["rating"] for item in known[row["context_id"]]["history"]] for row in examples}
    assert found == expected
    by_line = {float(line): row for line, row in enumerate(log)}
    for example in examples:
        target = next(row for row in interactions if row["row_id"] == example["row_id"])
        context = known[example["context_id"]]
        for item in context["history"]:
            user, item_id, moment = by_line[item["rating"]]
            assert item["rating"] != target["rating"]
            assert moment <= target["timestamp"] and str(user) == target["user_id"]
            assert kind == "rolling" or moment < context["as_of"] <= target["timestamp"]
            # Items 3 (no title) and 4 (unknown) go by their ids.
            assert item["title"] == {1: "One", 2: "Two"}.get(item_id, str(item_id))
