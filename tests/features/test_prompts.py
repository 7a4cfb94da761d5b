"""Users' rows as prompts."""

from typing import Any

import pyarrow as pa

from tests.features import made
from trackrec.data import schema
from trackrec.features.prompts import Prompt, prompts
from trackrec.serving.contract import GeneratorContract

CONTRACT = GeneratorContract(
    model_version="g",
    domain="movies",
    history_length=2,
    opening="<",
    closing=">",
    special_tokens=(),
    max_tokens=8,
    repetition_penalty=1.0,
    max_prompt_tokens=99,
)


def of(users: list[dict[str, Any]]) -> list[Prompt]:
    return list(prompts(pa.Table.from_pylist(users, schema=schema.TABLES["users"]), CONTRACT))


def test_a_prompt_shows_as_many_items_as_g_was_aligned_on() -> None:
    """The table's histories are those that a ranking model reads, and may be longer."""
    user = made.user(1, "Alien (1979)", "Brazil (1985)", "Casablanca (1942)", "Dune (1984)")
    shorter = user | {"history": user["history"][-2:]}
    longer, newest = of([user, shorter | {"user_id": "u2"}])
    assert longer.text == newest.text and longer.hash == newest.hash
    assert longer.text is not None and "Casablanca" in longer.text and "Brazil" not in longer.text
