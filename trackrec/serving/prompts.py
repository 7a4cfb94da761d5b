"""The generator's `text_input`: the chat template's text around a prompt whose own text cannot write its tokens.

The server tokenises `text_input` as one string, special tokens included, so what is untrusted in it must not spell one.
Clients know the template from the model's own config (`GeneratorContract`), and need no tokenizer.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Chat(NamedTuple):
    """The chat template's text before and after the user's message, and the tokens that no message may spell."""

    opening: str
    closing: str
    special_tokens: tuple[str, ...]


class HasChat(Protocol):
    """`Chat`, or `GeneratorContract`, which has its fields."""

    @property
    def opening(self) -> str: ...
    @property
    def closing(self) -> str: ...
    @property
    def special_tokens(self) -> tuple[str, ...]: ...


def wrap(chat: HasChat, text: str) -> str:
    """`text` as the user's message, up to where the assistant's answer starts.

    A special token's text inside `text` is broken up by a space, in whatever case it is written.
    """
    return chat.opening + broken_up(text, chat.special_tokens) + chat.closing


def broken_up(text: str, special_tokens: Sequence[str]) -> str:
    """`text` with a space in each of `special_tokens`; one of a single character becomes the space."""
    # The longest first, since one may begin with another.
    ordered = sorted((token for token in special_tokens if token.strip()), key=len, reverse=True)
    if not ordered:
        return text
    pattern = re.compile("|".join(map(re.escape, ordered)), re.IGNORECASE)
    while True:
        # The spaces themselves may complete a token that has one inside: until none is left.
        clean = pattern.sub(lambda found: (found[0][0] if len(found[0]) > 1 else "") + " " + found[0][1:], text)
        if clean == text:
            return clean
        text = clean
