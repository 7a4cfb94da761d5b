"""Interactions to contexts (a user's history at a moment, u_i) and examples (u_i, i_i, y_i).

Written in Ibis, as the recipes are: DuckDB and Spark give the same rows.
"""

import ibis
from ibis import _
from ibis.expr.types import Table, Value

from trackrec.config import ContextsSettings
from trackrec.data.recipe import SPLITS, drawn, earlier

_DAY = 86_400


def histories(interactions: Table, items: Table, settings: ContextsSettings) -> Table:
    """Each interaction with the context it is judged in: context_id, as_of and the history as shown.

    rolling: the history is what the user did before the row. snapshot: what the user did before the period of
    `snapshot_days` UTC days that holds the row, so that a period's rows share it, as they share a daily job's output.
    `context_id` is a hash of the domain and the history as shown: equal histories are one context.
    """
    known = items.select("item_id", known_title="title")
    rows = interactions.left_join(known, "item_id")
    rows = rows.select(
        *(column for column in interactions.columns if column != "history"),
        title=ibis.coalesce(rows.known_title, rows.item_id),
        part=_number(rows.split),
    )
    shown = ibis.struct({"title": rows.title, "rating": rows.rating, "label": rows.label})
    # Titles go in as hashes, of one length each: no title can be taken for a separator.
    key = ibis.literal(":").join([rows.title.hexdigest("sha256"), _text(rows.rating), _text(rows.label)])
    rows = rows.mutate(
        history=earlier(shown, "user_id", "row_id", settings.history_length),
        key=earlier(key, "user_id", "row_id", settings.history_length),
    )
    if settings.kind == "snapshot":
        period = settings.snapshot_days * _DAY
        rows = rows.mutate(as_of=rows.timestamp - rows.timestamp % period)
        # A user's rows are ordered by time: what lies before the period's first row lies before the period.
        window = ibis.window(group_by=["user_id", "as_of"], order_by="row_id")
        rows = rows.mutate(history=rows.history.first().over(window), key=rows["key"].first().over(window))
    else:
        rows = rows.mutate(as_of=rows.timestamp)
    rendered = ibis.literal(settings.domain + "\n") + rows["key"].join("\n").fill_null("")
    return rows.mutate(context_id=rendered.hexdigest("sha256")).drop("key")


def contexts(rows: Table, settings: ContextsSettings, seed: int) -> Table:
    """The `contexts` table from `histories`' rows: one row a distinct history, sub-sampled by split."""
    kept = rows.filter(rows.history.length() >= settings.min_history)
    ranked = kept.mutate(
        after=ibis.row_number().over(group_by="context_id", order_by=["as_of", "row_id"]),
        earliest=_.part.min().over(group_by="context_id"),
    )
    first = ranked.filter(ranked.after == 0)
    limits = (settings.max_train_contexts, settings.max_valid_contexts, settings.max_test_contexts)
    if any(limit is not None for limit in limits):
        place = ibis.row_number().over(group_by="earliest", order_by=[drawn(seed, _.context_id), _.context_id])
        limit = ibis.cases(
            *((_.earliest == part, ibis.null("int64") if limit is None else limit) for part, limit in enumerate(limits))
        )
        first = first.mutate(place=place, most=limit)
        first = first.filter(first.most.isnull() | (first.place < first.most))
    return first.order_by("as_of", "context_id").select(
        "context_id",
        "user_id",
        "as_of",
        "history",
        split=_name(first.earliest),
        domain=ibis.literal(settings.domain),
    )


def examples(rows: Table, contexts: Table, settings: ContextsSettings, seed: int) -> Table:
    """The `examples` table: the rows of `histories` whose context is kept, at most so many a context and split.

    Counts and the item mean are over the whole train split, whatever is sub-sampled.
    """
    train = rows.filter(rows.part == 0)
    users = train.group_by("user_id").agg(user_train_rows=_.count())
    items = train.group_by("item_id").agg(item_train_rows=_.count(), item_liked=_.label.sum())
    kept = rows.semi_join(contexts, "context_id")
    if settings.max_examples_per_context is not None:
        order = [drawn(seed, _.row_id.cast("string")), _.row_id]
        kept = kept.mutate(place=ibis.row_number().over(group_by=["context_id", "part"], order_by=order))
        kept = kept.filter(kept.place < settings.max_examples_per_context)
    kept = kept.left_join(users, "user_id").left_join(items, "item_id")
    prior = settings.item_mean_prior
    item_rows = kept.item_train_rows.fill_null(0)
    mean = (kept.item_liked.fill_null(0) + prior * train.label.mean().as_scalar()) / (item_rows + prior)
    return kept.order_by("row_id").select(
        "row_id",
        "split",
        "context_id",
        "user_id",
        "item_id",
        "title",
        "label",
        user_train_rows=kept.user_train_rows.fill_null(0).cast("int32"),
        item_train_rows=item_rows.cast("int32"),
        item_mean=ibis.ifelse(kept.part == 0, ibis.null("float64"), mean),
    )


def _number(split: Value) -> Value:
    return ibis.cases(*((split == name, part) for part, name in enumerate(SPLITS)))


def _name(part: Value) -> Value:
    return ibis.cases(*((part == number, name) for number, name in enumerate(SPLITS)))


def _text(value: Value) -> Value:
    return value.cast("string").fill_null("")
