"""Why an item is recommended to a user: the RecCoT of each iteration, and what it does to V's probability."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trackrec.config import EngineSettings
from trackrec.data import schema
from trackrec.llm.chat import encode_targets
from trackrec.llm.engine import open_engine

Row = dict[str, Any]
# Names offered where a user or an item is not found.
_OFFERED = 5


@dataclass(frozen=True)
class Turn:
    """What one iteration left: G's RecCoTs, and V."""

    iteration: int
    recots: Path
    validator: Path


@dataclass(frozen=True)
class Target:
    """An item, and what the user did with it where an example tells."""

    item_id: str
    title: str
    label: int | None


@dataclass(frozen=True)
class Answer:
    """P(Yes) of one iteration's V for each target, in their order, with the RecCoT and without one."""

    iteration: int
    recot: str
    with_recot: list[float]
    without: list[float]


@dataclass(frozen=True)
class Explanation:
    """The user's newest context that has RecCoTs, or the one in which the item was judged."""

    user_id: str
    context: Row
    targets: list[Target]
    answers: list[Answer]


def explain(
    turns: Sequence[Turn],
    *,
    engine: EngineSettings,
    contexts: Path,
    examples: Path,
    items: Path,
    base_model: Path,
    user: str,
    item: str | None = None,
) -> Explanation:
    """
    Args:
        turns: in the order of the iterations.
        item: what to ask V about; the user's own examples in that context, if none is given.

    Raises:
        LookupError: no such user or item, or no RecCoT was written for the user; says which there are.
    """
    texts = {turn.iteration: _texts(turn.recots) for turn in turns}
    written = set.intersection(*(set(found) for found in texts.values()))
    of_all = list(schema.rows(examples, "examples"))
    judged = [row for row in of_all if row["context_id"] in written]
    context_id, own = _context_of(judged, user, item)
    context = next(row for row in schema.rows(contexts, "contexts") if row["context_id"] == context_id)
    labels = {row["item_id"]: row["label"] for row in of_all if row["user_id"] == user}
    targets = _targets(own, labels, items, item)
    return Explanation(
        user, context, targets, [_answer(turn, texts[turn.iteration][context_id], context, targets, engine, base_model)
        for turn in turns],
    )  # fmt: skip


def _texts(recots: Path) -> dict[str, str]:
    return {row["context_id"]: row["text"] for row in schema.rows(recots, "recots", ["context_id", "text"])}


def _context_of(judged: list[Row], user: str, item: str | None) -> tuple[str, list[Row]]:
    """The context that is explained, and the user's examples in it."""
    own = [row for row in judged if row["user_id"] == user]
    if not own:
        users = sorted({row["user_id"] for row in judged})
        raise LookupError(
            f"no RecCoT was written for user {user!r}; there are some for {len(users)} users, among them "
            f"{', '.join(users[:_OFFERED])}"
        )
    # Held-out rows come later than train rows, and a user's later rows have larger numbers.
    about = [row for row in own if row["item_id"] == item] or own
    newest = max(about, key=lambda row: row["row_id"])["context_id"]
    return newest, [row for row in own if row["context_id"] == newest]


def _targets(own: list[Row], labels: dict[str, int], items: Path, item: str | None) -> list[Target]:
    known = [Target(row["item_id"], row["title"], row["label"]) for row in own if item in (None, row["item_id"])]
    if known:
        return known
    titles = {row["item_id"]: row["title"] for row in schema.rows(items, "items", ["item_id", "title"])}
    if item is None or item not in titles:
        raise LookupError(f"no item {item!r} in {items}; its ids are such as {', '.join(sorted(titles)[:_OFFERED])}")
    return [Target(item, titles[item], labels.get(item))]


def _answer(
    turn: Turn, recot: str, context: Row, targets: list[Target], engine: EngineSettings, base_model: Path
) -> Answer:
    opened = open_engine(engine, base_model, turn.validator)
    groups = [
        encode_targets(
            opened.tokenizer, context["domain"], context["history"], [(target.title, text) for target in targets]
        )
        for text in (recot, None)
    ]
    scores = dict(opened.score(groups))
    with_recot, without = ([float(p) for p in scores[number][:, 0]] for number in (0, 1))
    return Answer(turn.iteration, recot, with_recot, without)
