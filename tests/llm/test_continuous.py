"""Continuous batching against engines and loops that know nothing of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.llm.test_transformers_engine import NEW, PROMPTS, engine_of
from trackrec.llm.continuous import ContinuousEngine, Progress, Sampling
from trackrec.llm.engine import Completion, PromptTooLongError
from trackrec.llm.models import load_model, load_tokenizer, save_model
from trackrec.llm.sampling import nucleus

GREEDY = Sampling(temperature=0, repetition_penalty=0.2, max_tokens=NEW)


def continuous(model: Path, **limits: Any) -> ContinuousEngine:
    return ContinuousEngine(load_tokenizer(model), load_model(model, model, dtype="float32"), **limits)


def finish(engine: ContinuousEngine, steps: int = 10_000) -> dict[Any, Completion]:
    """Takes steps to the end; the requests' whole texts, streamed or not."""
    text: dict[Any, str] = {}
    tokens: dict[Any, int] = {}
    found = {}
    while engine.running or engine.waiting:
        steps -= 1
        assert steps >= 0
        for progress in engine.step():
            text[progress.id] = text.get(progress.id, "") + progress.text
            tokens[progress.id] = tokens.get(progress.id, 0) + progress.num_tokens
            if progress.finish_reason is not None:
                found[progress.id] = Completion(text[progress.id], tokens[progress.id], progress.finish_reason)
    return found


def run(engine: ContinuousEngine, prompts: list[list[int]], sampling: Sampling) -> dict[Any, Completion]:
    for i, prompt in enumerate(prompts):
        engine.add(i, prompt, sampling)
    return finish(engine)


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_rows": 2},
        {"max_rows": 3, "cache_tokens": 110},
        {"cache_tokens": 1},
        {"max_rows": 4, "prefill_tokens": 1},
    ],
)
def test_greedy_is_the_other_engines(tiny_model: Path, stopping_model: Path, limits: dict[str, int]) -> None:
    """However many run at once: rows that end make room for others in the midst of the rest."""
    reasons = set()
    for model in (tiny_model, stopping_model):
        expected = dict(engine_of(model).greedy(PROMPTS, max_tokens=NEW, repetition_penalty=0.2))
        engine = continuous(model, **limits)
        assert run(engine, PROMPTS, GREEDY) == expected
        # A second time, in the cache that the first left behind, the other way round.
        again = run(engine, PROMPTS[::-1], GREEDY)
        assert {len(PROMPTS) - 1 - i: completion for i, completion in again.items()} == expected
        reasons |= {completion.finish_reason for completion in expected.values()}
    assert reasons == {"stop", "length"}


def test_another_architecture(qwen2_model: Path) -> None:
    """Biases, one key/value head for all, and a head tied to the embeddings."""
    expected = dict(engine_of(qwen2_model).greedy(PROMPTS, max_tokens=NEW, repetition_penalty=0.2))
    assert run(continuous(qwen2_model, max_rows=3), PROMPTS, GREEDY) == expected


def test_a_step_writes_a_token_of_each_row(tiny_model: Path) -> None:
    engine = continuous(tiny_model)
    run(engine, PROMPTS, Sampling(temperature=0, ignore_eos=True, max_tokens=NEW))
    assert (engine.decoding_steps, engine.written_tokens) == (NEW, NEW * len(PROMPTS))
    assert engine.prompt_tokens == sum(map(len, PROMPTS))


def test_rows_join_and_leave_in_the_midst(tiny_model: Path) -> None:
    expected = dict(engine_of(tiny_model).greedy(PROMPTS, max_tokens=NEW, repetition_penalty=0.2))
    engine = continuous(tiny_model)
    for i in (0, 1, 2):
        engine.add(i, PROMPTS[i], GREEDY)
    for _ in range(5):
        engine.step()
    assert engine.running == 3
    # The first row's place is taken by the last one, and then by none.
    assert engine.cancel(0) and not engine.cancel(0) and engine.running == 2
    engine.step()
    engine.add(3, PROMPTS[3], GREEDY)
    engine.add(4, PROMPTS[4], GREEDY)
    engine.add("gone", PROMPTS[4], GREEDY)
    assert engine.cancel("gone")
    found = finish(engine)
    assert found == {i: expected[i] for i in (1, 2, 3, 4)}


def test_what_is_held_stays_within_the_budget(tiny_model: Path) -> None:
    engine = continuous(tiny_model, max_rows=5, cache_tokens=512, prefill_tokens=16)
    lengths = [100, 20, 20, 20, 20, 20, 300, 20, 20, 700, 20]
    for i, length in enumerate(lengths):
        engine.add(i, list(range(100, 100 + length)), Sampling(temperature=0, ignore_eos=True, max_tokens=20))
    most, sizes = 0, set()
    while engine.running or engine.waiting:
        engine.step()
        cache = engine._cache
        sizes.add((cache.slots, cache.capacity))
        most = max(most, engine.running)
    # Rounded up to 64 tokens a row; the prompt that is longer than the budget ran alone.
    assert max(slots * capacity for slots, capacity in sizes if capacity <= 512) <= 5 * 128
    assert [slots for slots, capacity in sizes if capacity > 512] == [1]
    assert most == 4


def reference(model: LlamaForCausalLM, prompt: list[int], sampling: Sampling) -> list[int]:
    """The whole sequence through the model again at each step; no end."""
    written: list[int] = []
    for step in range(NEW):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + written])).logits[:, -1] / sampling.temperature
        if sampling.top_k > 0:
            least = logits[0].sort(descending=True).values[sampling.top_k - 1]
            logits = logits.masked_fill(logits < least, float("-inf"))
        written.append(int(nucleus(logits, sampling.top_p, torch.tensor([sampling.seed]), step)))
    return written


def test_samples_are_a_plain_loops(tiny_model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Rows of one batch with settings of their own, greedy ones between them."""
    own = [
        Sampling(temperature=0.7, top_p=0.9, seed=1),
        Sampling(temperature=1.3, top_k=3, seed=2),
        Sampling(temperature=1.0, top_p=0.5, top_k=40, seed=-3),
        # The nucleus is wider than what is looked at first.
        Sampling(temperature=3.0, seed=4),
        Sampling(temperature=3.0, seed=5),
    ]
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    engine = continuous(tiny_model)
    for i, (prompt, sampling) in enumerate(zip(PROMPTS, own, strict=True)):
        fields = {**vars(sampling), "max_tokens": NEW, "ignore_eos": True}
        engine.add(i, prompt, Sampling(**fields))
        engine.add(("greedy", i), prompt, GREEDY)
    found = finish(engine)
    for i, (prompt, sampling) in enumerate(zip(PROMPTS, own, strict=True)):
        text = tokenizer.decode(reference(model, prompt, sampling), skip_special_tokens=True)
        assert found[i] == Completion(text, NEW, "length")
    greedy = dict(engine_of(tiny_model).greedy(PROMPTS, max_tokens=NEW, repetition_penalty=0.2))
    assert {i: found["greedy", i] for i in range(5)} == greedy
    # Without a seed every request draws anew.
    for i in range(2):
        engine.add(i, PROMPTS[0], Sampling(temperature=3.0, max_tokens=NEW))
    unseeded = finish(engine)
    assert unseeded[0].text != unseeded[1].text


def test_the_end_of_a_text(stopping_model: Path) -> None:
    """The model would end itself at its second or third token."""
    engine = continuous(stopping_model)
    plain = Sampling(temperature=0, max_tokens=NEW)
    ended = run(engine, PROMPTS, plain)
    assert {c.finish_reason for c in ended.values()} >= {"stop"}
    longer = run(engine, PROMPTS, Sampling(temperature=0, max_tokens=NEW, ignore_eos=True))
    assert {(c.num_tokens, c.finish_reason) for c in longer.values()} == {(NEW, "length")}
    delayed = run(engine, PROMPTS, Sampling(temperature=0, max_tokens=NEW, min_tokens=NEW - 1))
    assert {c.num_tokens for c in delayed.values()} <= {NEW - 1, NEW}
    # A stop string: not part of the text, its tokens counted.
    text = longer[0].text
    stop = text[5:9]
    cut = run(engine, PROMPTS[:1], Sampling(temperature=0, max_tokens=NEW, ignore_eos=True, stop=(stop, "no such")))
    assert cut[0].text == text[: text.index(stop)] and cut[0].finish_reason == "stop" and cut[0].num_tokens < NEW


def test_a_stream_is_the_whole_text_in_parts(tiny_model: Path) -> None:
    engine = continuous(tiny_model)
    whole = run(engine, PROMPTS, GREEDY)
    for i, prompt in enumerate(PROMPTS):
        engine.add(i, prompt, GREEDY, stream=True)
    parts: list[Progress] = []
    while engine.running or engine.waiting:
        parts += engine.step()
    for i, completion in whole.items():
        own = [part for part in parts if part.id == i]
        assert "".join(part.text for part in own) == completion.text
        assert sum(part.num_tokens for part in own) == completion.num_tokens
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [completion.finish_reason]
        assert len(own) > 3


def test_rows_with_and_without_adapters(tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Each in one batch with the others writes what a model with that adapter merged writes."""
    expected = {None: dict(engine_of(tiny_model).greedy(PROMPTS, max_tokens=NEW, repetition_penalty=0.2))}
    model: Any = load_model(tiny_model, tiny_model, dtype="float32")
    for number, name in enumerate(["a.b", "c"]):
        torch.manual_seed(number)
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        trained = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        save_model(trained, tokenizer, tiny_model, tmp_path / name)
        merged = trained.merge_and_unload()
        merged.save_pretrained(tmp_path / f"merged-{number}")
        tokenizer.save_pretrained(tmp_path / f"merged-{number}")
        engine = engine_of(tmp_path / f"merged-{number}")
        expected[name] = dict(engine.greedy(PROMPTS, max_tokens=NEW, repetition_penalty=0.2))
        if number == 0:
            model = PeftModel.from_pretrained(model, str(tmp_path / name), adapter_name="x0")
        else:
            model.load_adapter(str(tmp_path / name), adapter_name="x1")
    mixed = ContinuousEngine(tokenizer, model.eval(), adapters={"a.b": "x0", "c": "x1"})
    for name in expected:
        for i, prompt in enumerate(PROMPTS):
            mixed.add((name, i), prompt, Sampling(temperature=0, repetition_penalty=0.2, max_tokens=NEW, lora=name))
    found = finish(mixed)
    assert found == {(name, i): text for name, own in expected.items() for i, text in own.items()}
    assert expected[None] != expected["a.b"] != expected["c"]
    with pytest.raises(ValueError, match=r"no LoRA 'd'; there are: a\.b, c"):
        mixed.add("d", PROMPTS[0], Sampling(lora="d"))


def test_lengths(tiny_model: Path) -> None:
    engine = continuous(tiny_model, max_length=32)
    prompt = list(range(100, 130))
    # As vLLM does: it writes up to the model's length.
    for limit in (None, 50):
        found = run(engine, [prompt], Sampling(temperature=0, ignore_eos=True, max_tokens=limit))
        assert (found[0].num_tokens, found[0].finish_reason) == (2, "length")
    # A prompt of one token leaves nothing to prefill, be it the first of all.
    single = [run(own, [[5]], Sampling(temperature=0, max_tokens=3))[0] for own in (engine, continuous(tiny_model))]
    assert single[0] == single[1] and single[0].num_tokens == 3
    with pytest.raises(PromptTooLongError, match="a prompt of 32 tokens and 1 new ones exceed the model's 32"):
        engine.add(0, [*prompt, 1, 2], Sampling())
    with pytest.raises(PromptTooLongError, match="30 tokens and 3 new ones"):
        engine.add(0, prompt, Sampling(min_tokens=3))
    with pytest.raises(ValueError, match="no token"):
        engine.add(0, [], Sampling())
    with pytest.raises(ValueError, match="5000 tokens exceeds the model's 4096 positions"):
        continuous(tiny_model, max_length=5000)


def test_generate_takes_texts_as_it_needs_them(tiny_model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    taken = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        for i in range(40):
            taken += 1
            yield f"Say {i} words about film number {i}"

    engine = continuous(tiny_model, max_rows=4)
    results = engine.generate(texts(), GREEDY)
    found = dict([next(results)])
    assert taken <= 12
    found.update(results)
    ids = [tokenizer(text)["input_ids"] for text in texts()]
    assert found == dict(engine_of(tiny_model).greedy(ids, max_tokens=NEW, repetition_penalty=0.2))
