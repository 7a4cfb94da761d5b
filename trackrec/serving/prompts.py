"""The generator's `text_input`: the chat template's text around a prompt whose own text cannot write its tokens.

The server tokenises `text_input` as one string, special tokens included, so what is untrusted in it must not spell one.
Clients know the template from the model's own config (`GeneratorContract`), and need no tokenizer.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from trackrec.llm.tokens import TokenizerError

if TYPE_CHECKING:  # clients have no transformers
    from transformers import PreTrainedTokenizerFast


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


def chat_of(tokenizer: "PreTrainedTokenizerFast") -> Chat:
    """The chat template's text, as `trackrec.llm.chat` encodes it, for a server that tokenises the whole as a text.

    Raises:
        TokenizerError: the tokenizer adds tokens to a text that the chat template does not have.
    """
    from trackrec.llm.chat import encode_chat, template_texts

    opening, closing = template_texts(tokenizer)
    added = tokenizer.added_tokens_decoder.values()
    # Those that no attribute of the tokenizer names, too (`all_special_tokens`): a text writes them as well.
    special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    # Some templates use tokens that the tokenizer does not call special.
    special |= {str(token) for token in added if str(token).strip() and str(token) in opening + closing}
    bos = tokenizer.bos_token
    if bos and opening.startswith(bos) and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:
        # The server's tokenizer writes it, and would write it twice.
        opening = opening.removeprefix(bos)
    chat = Chat(opening=opening, closing=closing, special_tokens=tuple(sorted(special)))
    ids = {tokenizer.convert_tokens_to_ids(token) for token in chat.special_tokens}
    served, trained = tokenizer(wrap(chat, "x"))["input_ids"], encode_chat(tokenizer, "x")
    if [i for i in served if i in ids] != [i for i in trained if i in ids]:
        raise TokenizerError(
            f"the tokenizer of {tokenizer.name_or_path!r} reads the chat template's text as "
            f"{tokenizer.convert_ids_to_tokens(served)}, but G was trained on "
            f"{tokenizer.convert_ids_to_tokens(trained)}: a server would give it other prompts; choose a base model "
            "whose chat template has the tokens that its tokenizer adds"
        )
    return chat
