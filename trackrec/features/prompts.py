"""Rows of the users' table as what is sent to the generator, or the status of a user for whom nothing can be sent."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from trackrec.config import Domain
from trackrec.features import wire
from trackrec.features.table import HISTORY, Status
from trackrec.prompts.render import PromptError, ShownItem, cot_prompt
from trackrec.serving.contract import GeneratorContract
from trackrec.serving.prompts import wrap


@dataclass(frozen=True)
class Prompt:
    """One user's; without a `text` where `status` says why."""

    row: int
    text: str | None = None
    # SHA-256 of the text and of the sampling parameters (hexadecimal).
    hash: str | None = None
    status: Status | None = None


def prompts(users: pa.Table, contract: GeneratorContract) -> Iterator[Prompt]:
    """One for each row, in their order.

    Args:
        users: the columns of `trackrec.data.schema.TABLES["users"]`.
    """
    sampling = wire.sampling_parameters(contract)
    start = 0
    # In pieces, so that the titles of a large shard are never all Python strings.
    for batch in users.combine_chunks().to_batches(max_chunksize=256):
        for row, history in enumerate(_histories(batch["history"])):
            yield _prompt(start + row, batch["domain"][row], history, contract, sampling)
        start += batch.num_rows


def bare_history(history: pa.ChunkedArray) -> pa.Array:
    """The users' histories without the titles (`table.HISTORY`)."""
    lists = history.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):  # Arrow's answer for no rows depends on its release
        lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], history.type)
    names = [field.name for field in HISTORY.value_type]
    items = pa.StructArray.from_arrays([lists.values.field(name) for name in names], fields=list(HISTORY.value_type))
    return pa.ListArray.from_arrays(lists.offsets, items, type=HISTORY, mask=lists.is_null())


def _prompt(
    row: int, domain: pa.StringScalar, history: list[ShownItem] | None, contract: GeneratorContract, sampling: str
) -> Prompt:
    if history is None:
        return Prompt(row, status="bad_text")
    if not history:
        return Prompt(row, status="empty_history")
    try:
        shown: Domain = domain.as_py()
        if shown != contract.domain:
            # G knows one domain's prompt; this user's table was made for another.
            return Prompt(row, status="bad_text")
        # The table's histories are as long as a ranking model's.
        text = wrap(contract, cot_prompt(shown, history[-contract.history_length :]))
    except (PromptError, UnicodeError):
        return Prompt(row, status="bad_text")
    return Prompt(row, text, hashlib.sha256(f"{text}\0{sampling}".encode()).hexdigest())


def _histories(lists: pa.ListArray) -> Iterator[list[ShownItem] | None]:
    """Each row's history; None where a title is missing or is no UTF-8. The columns are read at once: it is faster."""
    offsets = lists.offsets.to_pylist()
    first, last = offsets[0], offsets[-1]
    items = lists.values.slice(first, last - first)
    ratings, labels = items.field("rating").to_pylist(), items.field("label").to_pylist()
    titles = _strings(items.field("title"))
    valid = lists.is_valid().to_pylist()
    for row, (start, end) in enumerate(itertools.pairwise(offsets)):
        span = slice(start - first, end - first)
        if not valid[row]:
            yield []
            continue
        shown = titles[span]
        if any(title is None for title in shown):
            yield None
            continue
        yield [
            {"title": str(title), "rating": rating, "label": label or 0}
            for title, rating, label in zip(shown, ratings[span], labels[span], strict=True)
        ]


def _strings(column: pa.StringArray) -> list[str | None]:
    """None also for what is no UTF-8: Parquet's readers do not look."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_string(value) for value in column]


def _string(value: pa.StringScalar) -> str | None:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None
