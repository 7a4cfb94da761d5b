"""Untrusted text inside a prompt: titles come from a catalogue anyone may write to, RecCoTs from a model.

What is left after this can be read, but cannot act: no control or bidirectional characters, no tag that opens or
closes (`<summary>`, `<|im_start|>`, `<s>`, …). `trackrec.llm.chat` also encodes it with the tokenizer's special tokens
switched off.
"""

import re
import unicodedata

MAX_TITLE_CHARACTERS = 200

# Joiners that scripts and emoji need; every other format character (zero-width, bidirectional, tags) is dropped.
_JOINERS = "\u200c\u200d"
# Marks without a glyph, which Unicode does not count as format characters: grapheme joiner, variation selectors.
_INVISIBLE_MARKS = re.compile("[\u034f\u180b-\u180d\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_LINE_BREAKS = re.compile("\r\n|[\n\r\v\f\x85\u2028\u2029]")
# "<" and its look-alikes where something that could be a tag's name follows, be it after a space.
_TAG_OPENING = re.compile(rf"[<＜﹤](?=[\s{_JOINERS}]*(?:[^\W\d]|[/|｜!?]))")


def neutralise_title(title: str) -> str:
    """A title on one line, at most `MAX_TITLE_CHARACTERS` long (a longer one ends in "…")."""
    text = " ".join(_safe(_LINE_BREAKS.sub(" ", title)).split())
    return text if len(text) <= MAX_TITLE_CHARACTERS else text[: MAX_TITLE_CHARACTERS - 1].rstrip() + "…"


def neutralise_recot(recot: str) -> str:
    """A RecCoT with its lines kept, without space around it."""
    return _safe(_LINE_BREAKS.sub("\n", recot)).strip()


def _safe(text: str) -> str:
    if text.isascii() and text.isprintable():  # as most titles are; the rest of this drops nothing of such a text
        return _TAG_OPENING.sub("‹", text)
    kept = (c for c in text.replace("\t", " ") if c == "\n" or c in _JOINERS or unicodedata.category(c)[0] != "C")
    return _TAG_OPENING.sub("‹", _INVISIBLE_MARKS.sub("", "".join(kept)))
