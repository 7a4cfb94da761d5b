"""Prompts as token ids: the model's own chat template around Figure 4's text.

The template's text is tokenised with its special tokens, what it wraps without them: whatever a title or a RecCoT
says, it cannot become `<|im_end|>`.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from trackrec.config import Domain
from trackrec.llm.engine import Group
from trackrec.prompts.render import ShownItem, rec_pieces

_CONTENT = "\0"


def encode_chat(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """`text` as the user's message, up to where the assistant's answer starts."""
    opening, closing = _wrapping(tokenizer)
    return opening + encode_text(tokenizer, text) + closing


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """`text` alone, with no special token in the result."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_rec(
    tokenizer: PreTrainedTokenizerFast,
    domain: Domain,
    history: Sequence[ShownItem],
    title: str,
    recots: Sequence[str | None],
) -> Group:
    """One (context, item) with each of `recots`: all that comes before a RecCoT, then from there up to the answer.

    prefix + suffix is the same ids however RecCoTs are grouped; `None` asks without one.
    """
    # Without a RecCoT the text goes on otherwise right after the target.
    cut = 1 if None in recots else 2
    return _group(tokenizer, [rec_pieces(domain, history, title, recot) for recot in recots], cut)


def encode_targets(
    tokenizer: PreTrainedTokenizerFast,
    domain: Domain,
    history: Sequence[ShownItem],
    targets: Sequence[tuple[str, str | None]],
) -> Group:
    """One context with many target items (title, RecCoT): the history, and from there up to the answer.

    prefix + suffix is the same ids as `encode_rec`'s for the same history, title and RecCoT.
    """
    return _group(tokenizer, [rec_pieces(domain, history, title, recot) for title, recot in targets], 1)


def _group(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[list[str]], cut: int) -> Group:
    """The prompts' first `cut` pieces, which all of them share, and what follows in each."""
    opening, closing = _wrapping(tokenizer)
    prefix = opening + [token for piece in prompts[0][:cut] for token in encode_text(tokenizer, piece)]
    suffixes = [
        [token for piece in pieces[cut:] for token in encode_text(tokenizer, piece)] + closing for pieces in prompts
    ]
    return prefix, suffixes


def template_texts(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """The chat template's text before and after the user's."""
    chat = [{"role": "user", "content": _CONTENT}]
    text = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    opening, closing = text.split(_CONTENT)
    return opening, closing


def _wrapping(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """The chat template's ids before and after the user's text."""
    opening, closing = template_texts(tokenizer)
    return tokenizer.encode(opening, add_special_tokens=False), tokenizer.encode(closing, add_special_tokens=False)
