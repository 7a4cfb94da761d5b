"""The validator's two answers as token ids."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the check before a run asks this, too, where there is no transformers
    from transformers import PreTrainedTokenizerBase

ANSWERS = ("Yes", "No")


class TokenizerError(ValueError):
    """A tokenizer this project cannot score with."""


def yes_no_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, int]:
    """The ids of "Yes" and "No", the answers that the recommendation prompt asks for (Figure 4).

    Raises:
        TokenizerError: one of them is not a single token, so the next token's logits cannot give P(Yes) and P(No).
    """
    ids = {word: tokenizer.encode(word, add_special_tokens=False) for word in ANSWERS}
    pieces = {word: tokenizer.convert_ids_to_tokens(own) for word, own in ids.items()}
    return single_ids(tokenizer.name_or_path, ids, pieces, tokenizer.unk_token_id)


def single_ids(
    name: str, ids: Mapping[str, Sequence[int]], pieces: Mapping[str, Sequence[str]], unknown: int | None
) -> tuple[int, int]:
    """`yes_no_ids` from the `ANSWERS` as they are tokenised.

    Args:
        name: whose tokenizer it is. unknown: the id of what has no token.
    Raises:
        TokenizerError: see `yes_no_ids`.
    """
    for word, own in ids.items():
        if len(own) != 1 or own[0] == unknown:
            raise TokenizerError(
                f"the tokenizer of {name!r} writes {word!r} as {list(pieces[word])}, not as one token of its own; "
                "choose a base model whose tokenizer has it (Qwen2.5, Llama 3, SmolLM2 do)"
            )
    return ids["Yes"][0], ids["No"][0]
