import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from trackrec.llm.tokens import TokenizerError, yes_no_ids


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def test_the_ids_come_from_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    assert yes_no_ids(tokenizer) == (10539, 5230)
    assert tokenizer.convert_ids_to_tokens([10539, 5230]) == ["Yes", "No"]
    assert yes_no_ids(tokenizer_of(["[UNK]", "No", "Yes"])) == (2, 1)


def test_an_unknown_answer_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"'No' as .*not as one token.*choose a base model"):
        yes_no_ids(tokenizer_of(["[UNK]", "Yes"]))


def test_an_answer_of_several_tokens_is_refused() -> None:
    from tokenizers.models import BPE

    letters = {letter: i for i, letter in enumerate(["Y", "e", "s", "N", "o", "No"])}
    split = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(letters, [("N", "o")])))
    with pytest.raises(TokenizerError, match=r"'Yes' as \['Y', 'e', 's'\]"):
        yes_no_ids(split)
