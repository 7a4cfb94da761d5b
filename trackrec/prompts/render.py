"""Figure 4's two prompts, for movies, books and a generic domain: the user message's text.

The templates are the files `templates/{movies,books,generic}_{cot,rec}.jinja`. One rendering serves scoring, Rec-tuning
and evaluation. Needs no torch.
"""

import json
from collections.abc import Sequence
from functools import cache
from typing import TypedDict

from jinja2 import PackageLoader, StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trackrec.config import Domain
from trackrec.prompts.neutralise import neutralise_recot, neutralise_title

# Marks in a template where one piece ends; no untrusted text can hold it, since control characters are dropped.
_CUT = "\0"


class ShownItem(TypedDict):
    """One entry of a context's history, oldest first; `label` 1 is liked."""

    title: str
    rating: float | None
    label: int


class PromptError(ValueError):
    """A history that the domain's template cannot show."""


def cot_prompt(domain: Domain, history: Sequence[ShownItem]) -> str:
    """prompt^CoT: asks G for a RecCoT, a summary of the user's preference."""
    return _template(f"{domain}_cot").render(history=shown_history(domain, history))


def rec_prompt(domain: Domain, history: Sequence[ShownItem], title: str, recot: str | None) -> str:
    """prompt^Rec: asks V whether the user will like `title`; without the summary's sentence where `recot` is None."""
    return "".join(rec_pieces(domain, history, title, recot))


def rec_pieces(domain: Domain, history: Sequence[ShownItem], title: str, recot: str | None) -> list[str]:
    """`rec_prompt` cut where prompts begin to differ: [history, target item, RecCoT, rest], or without a RecCoT
    [history, target item and rest]. Tokenised piece by piece, prompts with equal first pieces share a prefix exactly.
    """
    text = _template(f"{domain}_rec").render(
        history=shown_history(domain, history),
        title=json.dumps(neutralise_title(title), ensure_ascii=False),
        recot=None if recot is None else neutralise_recot(recot),
        cut=_CUT,
    )
    return text.split(_CUT)


def shown_history(domain: Domain, history: Sequence[ShownItem]) -> str:
    """A history as Figure 4 shows it: [title, feedback], ..."""
    shown = (f"[{_quoted(neutralise_title(item['title']))}, {_feedback(domain, item)}]" for item in history)
    return ", ".join(shown) or "none yet"


def _quoted(title: str) -> str:
    """As Python writes a string, so that no quote inside a title ends it; its `repr` would also escape joiners."""
    quote = '"' if "'" in title and '"' not in title else "'"
    return quote + title.replace("\\", "\\\\").replace(quote, "\\" + quote) + quote


def _feedback(domain: Domain, item: ShownItem) -> str:
    if domain == "generic":
        return "like" if item["label"] else "dislike"
    if item["rating"] is None:
        raise PromptError(
            f"domain {domain!r} shows ratings, and {item['title']!r} has none; set `contexts.domain: generic`, which "
            "shows like or dislike"
        )
    return f"{item['rating']:g}"


@cache
def _template(name: str) -> Template:
    return _environment().get_template(f"{name}.jinja")


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        loader=PackageLoader("trackrec.prompts"), autoescape=False, undefined=StrictUndefined, trim_blocks=True
    )
