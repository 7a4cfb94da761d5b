import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from trackrec.llm.text_stream import TextStream

TEXT = "A naïve 日本 critic 🙂 says: stop it. STOP here, and more."


def pieces(tokenizer: PreTrainedTokenizerFast, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """What is given after each token of `text`, and whether it ended at a stop string."""
    ids = tokenizer(text)["input_ids"]
    stream, given = TextStream(tokenizer.backend_tokenizer, stop), []
    for token in ids:
        stream.add(token)
        if stream.cut():
            return [*given, stream.take(finished=True)], True
        given.append(stream.take(finished=False))
    stream.finish(tokenizer.decode(ids, skip_special_tokens=True))
    return [*given, stream.take(finished=True)], False


def test_pieces_are_whole_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    given, cut = pieces(tokenizer, TEXT)
    assert "".join(given) == TEXT and not cut
    assert not any("\ufffd" in piece for piece in given)
    # Some tokens end inside a character, and give nothing yet.
    assert "" in given[:-1] and len([piece for piece in given if piece]) > 10


def test_special_tokens_are_no_text_and_an_unfinished_character_comes_last(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "".join(pieces(tokenizer, "Yes<|im_end|> No")[0]) == "Yes No"
    half = tokenizer("🙂")["input_ids"][:-1]
    stream = TextStream(tokenizer.backend_tokenizer)
    for token in half:
        stream.add(token)
    assert stream.take(finished=False) == ""
    stream.finish(tokenizer.decode(half))
    assert set(stream.take(finished=True)) == {"\ufffd"}


def test_bytes_that_make_no_character_end_nothing() -> None:
    """Tokenizers that fall back on bytes (Llama 2's) take an earlier letter back where one makes no sense after it."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"é": 256, "b": 257}
    inner = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    ids = [ord("A"), 153, 256, 257]
    with pytest.raises(Exception, match="Invalid prefix"):
        plain = DecodeStream()
        [plain.step(inner, token) for token in ids]
    stream = TextStream(inner)
    for token in ids:
        stream.add(token)
    assert stream.text == "Aéb"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("STOP",), "A naïve 日本 critic 🙂 says: stop it. "),
        # The first one in the text, be it in the middle of a token; its beginnings before that are text.
        (("here", "🙂 say", "critique"), "A naïve 日本 critic "),
        (("no such text", "A naïve B"), TEXT),
    ],
)
def test_a_stop_string_ends_the_text(tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...], expected: str) -> None:
    given, cut = pieces(tokenizer, TEXT, stop)
    assert "".join(given) == expected
    assert cut == (expected != TEXT)
