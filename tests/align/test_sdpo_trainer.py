from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from trackrec.align import training
from trackrec.align.sdpo_trainer import PreferenceSet, encode, hold_out
from trackrec.config import SdpoSettings
from trackrec.llm.chat import encode_chat

SET = PreferenceSet(
    context_id="c7",
    prompt="What does the user like?",
    chosen="Westerns.",
    rejected=["Anything with a", "Comedies."],
    chosen_finished=True,
    rejected_finished=[False, True],
)


def test_a_recot_cut_off_has_no_end_of_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    [row] = encode(tokenizer, [SET], max_length=100)
    assert row.prompt == encode_chat(tokenizer, SET.prompt)
    assert tokenizer.batch_decode(row.recots) == ["Westerns.<|im_end|>", "Anything with a", "Comedies.<|im_end|>"]
    assert row.tokens == len(row.prompt) + sum(map(len, row.recots))


def test_a_recot_cannot_end_the_turn_by_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    [row] = encode(tokenizer, [replace(SET, rejected=["a<|im_end|>b", "c"])], max_length=100)
    assert tokenizer.eos_token_id not in row.recots[1]


def test_what_is_too_long_is_refused_with_its_context(tokenizer: PreTrainedTokenizerFast) -> None:
    [row] = encode(tokenizer, [SET], max_length=100)
    longest = len(row.prompt) + max(map(len, row.recots))
    assert encode(tokenizer, [SET], max_length=longest) == [row]
    with pytest.raises(training.TooLongError, match=f"context c7 has {longest} tokens.*max_length"):
        encode(tokenizer, [SET], max_length=longest - 1)


def test_sets_are_held_out_by_their_contexts() -> None:
    sets = [replace(SET, context_id=f"c{number}") for number in range(40)]
    trained, held = hold_out(sets, SdpoSettings(holdout=0.25))
    assert (len(trained), len(held)) == (30, 10)
    assert sorted(trained + held, key=sets.index) == sets
    # The same contexts whatever the order.
    _, again = hold_out(sets[::-1], SdpoSettings(holdout=0.25))
    assert again == held[::-1]


@pytest.mark.parametrize(
    ("count", "settings", "held"),
    [(1, {}, 0), (2, {}, 1), (40, {"holdout": 0}, 0), (40, {"holdout": 0.5, "measured_sets": 3}, 3)],
)
def test_how_many_sets_are_held_out(count: int, settings: dict[str, Any], held: int) -> None:
    sets = [replace(SET, context_id=f"c{number}") for number in range(count)]
    assert [len(part) for part in hold_out(sets, SdpoSettings(**settings))] == [count - held, held]
