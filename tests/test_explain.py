"""`explain`'s choices and numbers, with an engine whose answer follows from the prompt."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tables import publish
from trackrec import explain
from trackrec.config import EngineSettings
from trackrec.explain import Explanation, Turn


class FakeEngine:
    """Groups are the targets themselves: P(Yes) is .9 with a RecCoT and .2 without, and .01 more for item B."""

    tokenizer = None

    def score(self, groups: Sequence[list[tuple[str, str | None]]]) -> Iterator[tuple[int, np.ndarray]]:
        for number in reversed(range(len(groups))):
            yes = [(0.9 if recot else 0.2) + (0.01 if title == "B" else 0) for title, recot in groups[number]]
            yield number, np.array([[p, 1 - p] for p in yes])


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setattr(explain, "open_engine", lambda engine, base_model, model: FakeEngine())
    monkeypatch.setattr(explain, "encode_targets", lambda tokenizer, domain, history, targets: targets)
    history = [{"title": "Old", "rating": 4.0, "label": 1}]
    contexts = [
        {"context_id": name, "user_id": "u", "as_of": k, "split": "test", "domain": "movies", "history": history[:k]}
        for k, name in enumerate(("early", "late", "unwritten"))
    ]
    examples = [
        {"row_id": 1, "split": "test", "context_id": "early", "user_id": "u", "item_id": "a", "title": "A", "label": 1},
        {"row_id": 2, "split": "test", "context_id": "late", "user_id": "u", "item_id": "b", "title": "B", "label": 0},
        {
            "row_id": 3,
            "split": "test",
            "context_id": "unwritten",
            "user_id": "u",
            "item_id": "c",
            "title": "C",
            "label": 0,
        },
    ]
    recots = [{"context_id": name, "sample": 0, "text": f"{name} text"} for name in ("early", "late")]
    return {
        "contexts": publish(tmp_path / "contexts", contexts=contexts),
        "examples": publish(tmp_path / "examples", examples=examples),
        "items": publish(
            tmp_path / "items", items=[{"item_id": name, "title": name.upper(), "attributes": []} for name in "cz"]
        ),
        "recots": publish(tmp_path / "recots", recots=recots),
    }


def explained(tables: dict[str, Path], user: str = "u", item: str | None = None) -> Explanation:
    given: dict[str, Any] = {name: tables[name] for name in ("contexts", "examples", "items")}
    turns = [Turn(t, tables["recots"], Path(f"validator-{t}")) for t in (0, 1)]
    return explain.explain(turns, engine=EngineSettings(), **given, base_model=Path("base"), user=user, item=item)


def test_the_newest_context_with_recots(tables: dict[str, Path]) -> None:
    found = explained(tables)
    assert found.context["context_id"] == "late"
    assert [(target.item_id, target.label) for target in found.targets] == [("b", 0)]
    assert [(answer.iteration, answer.recot) for answer in found.answers] == [(0, "late text"), (1, "late text")]
    assert found.answers[0].with_recot == pytest.approx([0.91]) and found.answers[0].without == pytest.approx([0.21])


def test_the_context_in_which_the_item_was_judged(tables: dict[str, Path]) -> None:
    found = explained(tables, item="a")
    assert found.context["context_id"] == "early" and found.targets[0].label == 1
    assert found.answers[1].with_recot == pytest.approx([0.9]) and found.answers[1].without == pytest.approx([0.2])


def test_an_item_judged_in_a_context_without_recots(tables: dict[str, Path]) -> None:
    found = explained(tables, item="c")
    assert found.context["context_id"] == "late" and found.targets[0].label == 0


def test_an_item_that_was_never_judged(tables: dict[str, Path]) -> None:
    found = explained(tables, item="z")
    assert found.context["context_id"] == "late"
    assert [(target.title, target.label) for target in found.targets] == [("Z", None)]


def test_who_and_what_is_unknown(tables: dict[str, Path]) -> None:
    with pytest.raises(LookupError, match="for user 'v'; there are some for 1 users, among them u"):
        explained(tables, user="v")
    with pytest.raises(LookupError, match=r"no item 'y' in .*; its ids are such as c, z"):
        explained(tables, item="y")
