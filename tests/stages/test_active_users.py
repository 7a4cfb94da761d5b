"""Active users and their histories: what a daily job at the same moment would show G, and nothing later."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests import tables
from trackrec import storage
from trackrec.config import ContextsSettings, IngestSettings
from trackrec.data import schema
from trackrec.data import users as build
from trackrec.fetch import fetch
from trackrec.prompts.render import cot_prompt
from trackrec.serving_config import ActiveUsersSettings
from trackrec.stages import active_users, contexts, ingest

DAY = 86_400
LENGTH = 6


def run(out: Path, source: Path, *, length: int = LENGTH, seed: int = 0, **settings: Any) -> Path:
    active_users.run(
        ActiveUsersSettings.model_validate(settings),
        interactions=source,
        items=source,
        users=out,
        domain="movies",
        history_length=length,
        seed=seed,
    )
    return out


def facts(out: Path) -> dict[str, Any]:
    return storage.read_manifest(out).facts


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """a is active on days 0 to 9, b on day 3 alone, c from day 9 on; item Z has no title."""
    seen = [("a", day, "XYZ"[day % 3], day * DAY + 60) for day in range(10)]
    seen += [("b", 0, "X", 3 * DAY), ("c", 0, "Y", 9 * DAY - 1), ("c", 1, "X", 9 * DAY), ("c", 2, "Z", 9 * DAY)]
    interactions = [
        {
            "row_id": row_id,
            "split": "train",
            "user_id": user,
            "item_id": item,
            "label": number % 2,
            "rating": 1.0 + number,
            "timestamp": timestamp,
            "history": [],
        }
        for row_id, (user, number, item, timestamp) in enumerate(seen)
    ]
    items = [{"item_id": item, "title": f"Title {item}", "attributes": []} for item in "XY"]
    return tables.publish(tmp_path / "log", interactions=interactions, items=items)


def test_the_last_items_before_the_moment_oldest_first(tmp_path: Path, log: Path) -> None:
    out = run(tmp_path / "out", log, length=2, as_of="1970-01-10", active_days=1)
    at_nine = {"as_of": 9 * DAY, "domain": "movies"}
    a = [
        {"item_id": "Y", "title": "Title Y", "rating": 8.0, "label": 1},
        # Under its id where no title is known.
        {"item_id": "Z", "title": "Z", "rating": 9.0, "label": 0},
    ]
    c = [{"item_id": "Y", "title": "Title Y", "rating": 1.0, "label": 0}]
    assert schema.rows(out, "users") == [
        {"user_id": "a", **at_nine, "history": a},
        {"user_id": "c", **at_nine, "history": c},
    ]
    assert facts(out) == {"as_of": 9 * DAY, "users": 2, "dropped_inactive": 1, "dropped_by_sampling": 0}
    assert build.partition(out) == "1970-01-10"


def test_without_a_moment_it_is_the_midnight_after_the_last_interaction(tmp_path: Path, log: Path) -> None:
    out = run(tmp_path / "out", log)
    assert facts(out)["as_of"] == 10 * DAY and build.partition(out) == "1970-01-11"
    # Items of one moment in the log's order.
    assert [item["rating"] for item in schema.rows(out, "users")[2]["history"]] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("days", "users"), [(6, "ac"), (7, "abc")])
def test_the_first_active_moment_counts(tmp_path: Path, log: Path, days: int, users: str) -> None:
    out = run(tmp_path / "out", log, active_days=days)
    assert [row["user_id"] for row in schema.rows(out, "users")] == list(users)


def test_without_an_active_user_nothing_is_written(tmp_path: Path, log: Path) -> None:
    with pytest.raises(ValueError, match="no user has an interaction in the 30 days before 1970-01-01; bring the log"):
        run(tmp_path / "published" / "out", log, as_of="1970-01-01")
    empty = tables.publish(tmp_path / "empty", interactions=[], items=[])
    with pytest.raises(ValueError, match="has no interaction; is this the right log"):
        run(tmp_path / "published" / "out", empty)
    assert list((tmp_path / "published").iterdir()) == []


def test_another_stages_output_has_no_moment(log: Path) -> None:
    with pytest.raises(LookupError, match="give what the stage `active_users` wrote"):
        build.partition(log)


@pytest.fixture(scope="module")
def ml_100k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ml_100k") / "tables"
    ingest.run(IngestSettings(dataset="ml-100k", max_history=20), raw=fetch("ml-100k"), interactions=out, items=out)
    return out


def test_prompts_are_those_of_the_daily_contexts(tmp_path: Path, ml_100k: Path) -> None:
    """`contexts` knows a user's history at the start of each day with a row: as good as all users of that day."""
    snapshots = ContextsSettings(domain="movies", kind="snapshot", history_length=LENGTH)
    judged = tmp_path / "judged"
    contexts.run(snapshots, interactions=ml_100k, items=ml_100k, contexts=judged, examples=judged)
    shown = {row["context_id"]: row for row in schema.rows(judged, "contexts")}
    context_of = {row["row_id"]: row["context_id"] for row in schema.rows(judged, "examples")}
    interactions = schema.read(ml_100k, "interactions", ["row_id", "user_id", "timestamp"]).to_pylist()
    by_day: dict[int, dict[str, str]] = defaultdict(dict)
    for row in interactions:
        by_day[row["timestamp"] // DAY][row["user_id"]] = context_of[row["row_id"]]
    compared = 0
    for day in sorted(by_day)[100:200:25]:
        moment = pa.scalar(day * DAY, pa.timestamp("s")).as_py().isoformat()
        out = run(tmp_path / str(day), ml_100k, as_of=moment, active_days=10_000)
        found = {row["user_id"]: row["history"] for row in schema.rows(out, "users")}
        for user, context in by_day[day].items():
            expected = shown[context]["history"]
            if expected:
                compared += 1
                assert cot_prompt("movies", found[user]) == cot_prompt("movies", expected)
            else:
                assert user not in found
    assert compared > 20


def test_a_sample_follows_the_seed_and_nests(tmp_path: Path, ml_100k: Path) -> None:
    def drawn(name: str, **settings: Any) -> list[str]:
        return [row["user_id"] for row in schema.rows(run(tmp_path / name, ml_100k, **settings), "users")]

    everyone = drawn("everyone")
    some, again, fewer = drawn("a", max_users=50), drawn("b", max_users=50), drawn("c", max_users=10)
    assert len(some) == 50 and some == again == sorted(some)
    assert set(fewer) < set(some) < set(everyone)
    assert drawn("d", max_users=50, seed=1) != some
    assert facts(tmp_path / "a")["dropped_by_sampling"] == len(everyone) - 50
    # A user who is drawn and still active the day before is drawn then, too, unless others were.
    day_before = set(drawn("before", as_of="1998-04-22", max_users=50))
    assert len(day_before & set(some)) > 40
