"""Text of a completion while it is written: whole characters only, and cut at a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Decodes tokens one by one, without special tokens.

    Args:
        stop: strings that end the text; neither they nor what follows belongs to it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        # The end of the text that could be the beginning of a stop string is not given away yet.
        self._held = max(map(len, stop), default=1) - 1
        self._given = 0
        self.text = ""
        self.was_cut = False

    def add(self, token: int) -> None:
        """Takes in the next token; a token may end inside a character, which then waits for the next one."""
        try:
            self.text += self._stream.step(self._tokenizer, token) or ""
        except Exception:
            # What it raises where bytes that make no character change the text before them: begin anew, as vLLM does.
            self._stream = DecodeStream(skip_special_tokens=True)
            self.text += self._stream.step(self._tokenizer, token) or ""

    def cut(self) -> bool:
        """Whether a stop string is in the text; it then ends before the first one."""
        found = [at for at in (self.text.find(stop, self._given) for stop in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.was_cut = True
        return self.was_cut

    def finish(self, whole: str) -> None:
        """The text's end: `whole` is all tokens decoded at once, with what is left of an unfinished character."""
        if whole.startswith(self.text):
            self.text = whole

    def take(self, *, finished: bool) -> str:
        """What was not given yet."""
        end = len(self.text) if finished else max(self._given, len(self.text) - self._held)
        given, self._given = self.text[self._given : end], end
        return given
