"""From tables to tensors, against rows written by hand."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trackrec.ctr.embedding import NONE, UNKNOWN
from trackrec.ctr.features import Dataset, dataset, recot_of_rows
from trackrec.ctr.ranker import build
from trackrec.data import schema


def row(row_id: int, split: str, user: str, item: str, label: int, *history: tuple[str, float, int]) -> dict[str, Any]:
    earlier = [{"item_id": name, "rating": rating, "label": liked} for name, rating, liked in history]
    moment = {"row_id": row_id, "split": split, "user_id": user, "item_id": item, "timestamp": row_id}
    return moment | {"label": label, "rating": 3.0, "history": earlier}


ROWS = [
    row(0, "train", "u1", "a", 1),
    row(1, "train", "u1", "b", 0, ("a", 5.0, 1)),
    row(2, "train", "u2", "a", 1),
    row(3, "test", "u1", "c", 1, ("a", 5.0, 1), ("b", 2.0, 0), ("x", 5.0, 1)),
    row(4, "valid", "u9", "a", 0),
]
ITEMS = [
    {"item_id": "a", "title": "A", "attributes": ["war", "epic"]},
    {"item_id": "b", "title": "B", "attributes": []},
    {"item_id": "c", "title": "C", "attributes": ["noir", "war"]},
]


def made(rows: list[dict[str, Any]] = ROWS, min_rows: int = 1, max_train_rows: int | None = None) -> Dataset:
    return dataset(
        pa.Table.from_pylist(rows, schema=schema.TABLES["interactions"]),
        pa.Table.from_pylist(ITEMS, schema=schema.TABLES["items"]),
        history_length=2,
        min_rows=min_rows,
        recot=np.zeros(len(rows), dtype=np.int64),
        vectors=torch.zeros(1, 0),
        max_train_rows=max_train_rows,
    )


def test_numbers() -> None:
    data = made()
    # u1 and u2 are numbered from 2; u9 is not in the train split. The catalogue holds a, b, c; x is no item of it.
    assert data.rows.user.tolist() == [2, 2, 3, 2, UNKNOWN]
    assert data.rows.item.tolist() == [2, 3, 2, 4, 2]
    # c has no number of its own: the train split has no row of it.
    assert data.tables.item.tolist() == [NONE, UNKNOWN, 2, 3, UNKNOWN]
    # The newest two, oldest first; 5 is the one rating in a train row's history.
    assert data.rows.history.tolist() == [[NONE] * 2, [2, NONE], [NONE] * 2, [3, UNKNOWN], [NONE] * 2]
    assert data.rows.history_rating.tolist() == [[NONE] * 2, [2, NONE], [NONE] * 2, [UNKNOWN, 2], [NONE] * 2]
    # Sorted by name: epic 2, war 3. c keeps the one that training knows; noir is nobody's that training saw.
    assert data.tables.item_attributes.tolist() == [[0, 0], [0, 0], [3, 2], [0, 0], [3, 0]]
    assert (data.vocabulary.users, data.vocabulary.items) == (4, 4)
    assert (data.vocabulary.attributes, data.vocabulary.ratings) == (4, 3)
    assert data.labels.tolist() == [1, 0, 1, 1, 0]
    assert data.of_split("train").tolist() == [0, 1, 2]
    assert data.user_train_rows.tolist() == [2, 2, 1, 2, 0]
    assert data.item_train_rows.tolist() == [2, 1, 2, 0, 2]


def test_what_is_rare_in_training_is_unknown_there_too() -> None:
    data = made(min_rows=2)
    assert data.rows.user.tolist() == [2, 2, UNKNOWN, 2, UNKNOWN]
    assert data.tables.item.tolist() == [NONE, UNKNOWN, 2, UNKNOWN, UNKNOWN]


def test_a_label_that_stands_for_a_rating_is_none_of_the_ratings() -> None:
    history = [{"item_id": "a", "rating": 1.0, "label": 0}, {"item_id": "b", "rating": None, "label": 1}]
    data = dataset(
        pa.Table.from_pylist([{**ROWS[1], "history": history}], schema=schema.TABLES["interactions"]),
        pa.Table.from_pylist(
            [{"item_id": name, "title": name, "attributes": None} for name in "abc"], schema=schema.TABLES["items"]
        ),
        history_length=2,
        min_rows=1,
        recot=np.zeros(1),
        vectors=torch.zeros(1, 0),
    )
    assert data.rows.history_rating.tolist() == [[2, 3]] and data.vocabulary.ratings == 4
    assert (data.names.ratings, data.names.unrated) == ([1.0], [1])


def test_a_log_without_ratings_and_attributes() -> None:
    """What a generic log may leave out: the label stands for the rating, and no item has an attribute."""
    rows = [
        {**ROWS[1], "history": [{"item_id": "a", "rating": None, "label": 1}]},
        {
            **ROWS[3],
            "history": [{"item_id": "a", "rating": None, "label": 1}, {"item_id": "b", "rating": None, "label": 0}],
        },
    ]
    items = [{"item_id": name, "title": name, "attributes": None} for name in "abc"]
    data = dataset(
        pa.Table.from_pylist(rows, schema=schema.TABLES["interactions"]),
        pa.Table.from_pylist(items, schema=schema.TABLES["items"]),
        history_length=2,
        min_rows=1,
        recot=np.zeros(2),
        vectors=torch.zeros(1, 0),
    )
    # The train row's history knows liked alone.
    assert data.rows.history_rating.tolist() == [[2, NONE], [2, UNKNOWN]]
    assert data.tables.item_attributes.tolist() == [[NONE]] * 5
    assert data.vocabulary.attributes == 2
    model = build("din", data.vocabulary, 4, (4, 2), seed=0)
    assert model(data.batch(torch.arange(2)), data.tables).isfinite().all()


def test_only_the_newest_train_rows() -> None:
    """Those say which ids there are; how often a user or an item was seen is counted on all."""
    data = made(max_train_rows=1)
    assert data.split.tolist() == ["", "", "train", "test", "valid"]
    assert data.names.users == ["u2"] and data.names.items == ["a"]
    assert data.user_train_rows.tolist() == made().user_train_rows.tolist()
    assert made(max_train_rows=3).split.tolist() == made().split.tolist()


def test_no_train_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to train on"):
        made([row(0, "test", "u", "a", 1)])


def found(
    rows: list[tuple[int, str, int]], examples: dict[int, str], contexts: list[tuple[str, str, int]]
) -> list[int]:
    """`recot_of_rows` for rows (row_id, user, timestamp), the context of some rows, contexts (id, user, as_of)."""
    columns = ("row_id", "user_id", "timestamp")
    return recot_of_rows(
        pa.table({name: [r[k] for r in rows] for k, name in enumerate(columns)}),
        pa.table(
            {
                "row_id": pa.array(list(examples), pa.int64()),
                "context_id": pa.array(list(examples.values()), pa.string()),
            }
        ),
        pa.table({name: [c[k] for c in contexts] for k, name in enumerate(("context_id", "user_id", "as_of"))}),
        [context for context, _, _ in contexts],
    ).tolist()


def test_a_row_reads_its_own_context_or_the_newest_older_one() -> None:
    contexts = [("c1", "u", 10), ("c2", "u", 20), ("c3", "v", 5)]
    rows = [(0, "u", 5), (1, "u", 10), (2, "u", 15), (3, "u", 20), (4, "u", 25), (5, "w", 99), (6, "u", 20)]
    # Row 6 is an example of c2; row 3, at the same moment, may be in c2's history and gets c1.
    assert found(rows, {6: "c2"}, contexts) == [NONE, NONE, 1, 1, 2, NONE, 2]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("uv"), st.integers(0, 9)), min_size=1, max_size=12),
    st.lists(st.tuples(st.sampled_from("uv"), st.integers(0, 9)), min_size=1, max_size=6),
)
def test_no_row_reads_a_recot_that_is_not_older(rows: list[tuple[str, int]], contexts: list[tuple[str, int]]) -> None:
    shown = [(f"c{k}", user, as_of) for k, (user, as_of) in enumerate(contexts)]
    given_rows = [(k, user, moment) for k, (user, moment) in enumerate(rows)]
    for (_, user, moment), number in zip(given_rows, found(given_rows, {}, shown), strict=True):
        older = [as_of for _, owner, as_of in shown if owner == user and as_of < moment]
        if number == NONE:
            assert not older
        else:
            _, owner, as_of = shown[number - 1]
            assert owner == user and as_of == max(older)
