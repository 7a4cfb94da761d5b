from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from trackrec.align import training
from trackrec.align.sdpo_trainer import PreferenceSet, encode, hold_out
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
    sets = [replace(SET, context_id=f"c{number}") for number in range(400)]
    trained, held = hold_out(sets, 0.25)
    assert sorted(trained + held, key=sets.index) == sets
    # A quarter, within four standard deviations of a binomial draw.
    assert len(held) == pytest.approx(100, abs=35)
    # A context is on its side whatever comes with it, and a larger share takes more.
    assert hold_out(sets[::-3], 0.25)[1] == [one for one in sets[::-3] if one in held]
    assert set(map(id, held)) < set(map(id, hold_out(sets, 0.5)[1]))
    assert hold_out(sets, 0) == (sets, [])
