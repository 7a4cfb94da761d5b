"""The engine against plain, unbatched, uncached reference computations with the same model."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trackrec.config import EngineSettings
from trackrec.llm.attention import UnsupportedModelError
from trackrec.llm.engine import Completion, PromptTooLongError, open_engine
from trackrec.llm.models import save_model
from trackrec.llm.sampling import nucleus
from trackrec.llm.tokens import yes_no_ids
from trackrec.llm.transformers_engine import TransformersEngine
from trackrec.seeds import derive

# Unequal lengths, so that prompts are padded, with the padding token's id inside: it is end-of-sequence too.
PROMPTS = [[1, *range(100, 100 + 7 * k), 2, 40 + k] for k in range(1, 6)]
SEEDS = [[derive(0, k, sample) for sample in range(4)] for k in range(5)]
NEW = 12


def engine_of(model: Path, batch_tokens: int = 16384, dtype: str = "float32") -> TransformersEngine:
    settings = EngineSettings.model_validate({"batch_tokens": batch_tokens, "dtype": dtype})
    engine = open_engine(settings, model, model)
    assert isinstance(engine, TransformersEngine)
    return engine


def sampled(engine: TransformersEngine, order: list[int] | None = None) -> dict[int, list[Completion]]:
    order = order or list(range(len(PROMPTS)))
    found = engine.sample(
        [PROMPTS[i] for i in order], [SEEDS[i] for i in order], temperature=0.8, top_p=0.9, max_tokens=NEW
    )
    return {order[i]: completions for i, completions in found}


def reference_sample(
    model: LlamaForCausalLM, prompt: list[int], seed: int, stops: set[int], tokenizer: PreTrainedTokenizerFast
) -> Completion:
    """The whole sequence through the model again at each step."""
    written: list[int] = []
    for step in range(NEW):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + written])).logits[:, -1]
        written.append(int(nucleus(logits / 0.8, 0.9, torch.tensor([seed]), step)))
        if written[-1] in stops:
            return Completion(tokenizer.decode(written[:-1], skip_special_tokens=True), len(written), "stop")
    return Completion(tokenizer.decode(written, skip_special_tokens=True), len(written), "length")


def test_samples_are_a_plain_loops(stopping_model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = LlamaForCausalLM.from_pretrained(stopping_model)
    found = sampled(engine_of(stopping_model))
    stops = set(range(2, 49152, 8))
    for i, prompt in enumerate(PROMPTS):
        assert found[i] == [reference_sample(model, prompt, seed, stops, tokenizer) for seed in SEEDS[i]]
    flat = [completion for completions in found.values() for completion in completions]
    # Rows ended at many different steps, so finished ones were cut out of the batch; and some reached the limit.
    assert len({c.num_tokens for c in flat if c.finish_reason == "stop"}) > 4
    assert {c.num_tokens for c in flat if c.finish_reason == "length"} == {NEW}


def test_samples_depend_on_their_seed_alone(stopping_model: Path) -> None:
    expected = sampled(engine_of(stopping_model))
    assert sampled(engine_of(stopping_model)) == expected
    # One prompt a batch; and another order.
    assert sampled(engine_of(stopping_model, batch_tokens=1)) == expected
    assert sampled(engine_of(stopping_model), order=[3, 0, 4, 1, 2]) == expected
    texts = {completion.text for completions in expected.values() for completion in completions}
    assert len(texts) > 10
    # A sample alone is what it was beside others.
    [(_, [alone])] = engine_of(stopping_model).sample(
        PROMPTS[2:3], [SEEDS[2][3:]], temperature=0.8, top_p=0.9, max_tokens=NEW
    )
    assert alone == expected[2][3]


def test_greedy_is_transformers_own(tiny_model: Path, stopping_model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    reasons = set()
    for directory, stops in ((tiny_model, {2}), (stopping_model, set(range(2, 49152, 8)))):
        model = AutoModelForCausalLM.from_pretrained(directory)
        engine = engine_of(directory)
        # Below 1 it favours repetition: a random model hardly repeats anything, so a penalty would change nothing.
        found = dict(engine.greedy(PROMPTS, max_tokens=NEW, repetition_penalty=0.2))
        for i, prompt in enumerate(PROMPTS):
            # Unpadded: transformers would count padding, which is end-of-sequence here, as a repeated token.
            theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, repetition_penalty=0.2)
            written = theirs[0, len(prompt) :].tolist()
            stopped = written[-1] in stops
            text = tokenizer.decode(written[:-1] if stopped else written, skip_special_tokens=True)
            assert found[i] == Completion(text, len(written), "stop" if stopped else "length")
            reasons.add(found[i].finish_reason)
        assert dict(engine.greedy(PROMPTS, max_tokens=NEW, repetition_penalty=1.0)) != found
    assert reasons == {"stop", "length"}


def groups() -> Iterator[tuple[list[int], list[list[int]]]]:
    """Groups of 4, 4, 1 and 3 suffixes, all of unequal lengths."""
    for k, count in enumerate([4, 4, 1, 3]):
        prefix = [1, *range(200 + k, 200 + k + 5 * (k + 2))]
        yield prefix, [list(range(300 + 50 * j, 300 + 50 * j + 3 + 4 * j + k)) for j in range(count)]


def reference_scores(model: torch.nn.Module, answers: tuple[int, int]) -> list[np.ndarray]:
    """One padded batch of whole prompts a group, all logits."""
    scores = []
    for prefix, suffixes in groups():
        prompts = [prefix + suffix for suffix in suffixes]
        longest = max(map(len, prompts))
        ids = torch.tensor([p + [2] * (longest - len(p)) for p in prompts])
        mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts])
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask).logits
        last = torch.stack([row[len(p) - 1] for row, p in zip(logits, prompts, strict=True)]).double()
        # Algorithm 1: P(Yes) and P(No) among all tokens, then normalised over the two.
        p = last.softmax(-1)[:, list(answers)]
        scores.append((p / p.sum(-1, keepdim=True)).numpy())
    return scores


@pytest.mark.parametrize("batch_tokens", [1, 120, 16384])
def test_scores_are_a_padded_batchs(tiny_model: Path, tokenizer: PreTrainedTokenizerFast, batch_tokens: int) -> None:
    found = dict(engine_of(tiny_model, batch_tokens).score(list(groups())))
    expected = reference_scores(AutoModelForCausalLM.from_pretrained(tiny_model), yes_no_ids(tokenizer))
    assert sorted(found) == [0, 1, 2, 3]
    for i, scores in enumerate(expected):
        assert found[i].dtype == np.float64
        np.testing.assert_allclose(found[i], scores, atol=1e-5)
        np.testing.assert_allclose(found[i].sum(1), 1, atol=1e-9)
    assert np.concatenate(list(found.values()))[:, 0].std() > 0.05


def test_scores_of_qwen2_and_in_bfloat16(qwen2_model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Another architecture (biases, tied head), and a precision in which logits alone would be too coarse."""
    expected = reference_scores(AutoModelForCausalLM.from_pretrained(qwen2_model), yes_no_ids(tokenizer))
    found = dict(engine_of(qwen2_model).score(list(groups())))
    half = engine_of(qwen2_model, dtype="bfloat16")
    coarse = dict(half.score(list(groups())))
    for i, scores in enumerate(expected):
        np.testing.assert_allclose(found[i], scores, atol=1e-5)
        np.testing.assert_allclose(coarse[i], scores, atol=0.03)
    # The head computes in float32, and the input embeddings it is tied to stay as they are.
    embeddings, head = half.model.get_input_embeddings(), half.model.get_output_embeddings()
    assert (embeddings.weight.dtype, head.head.weight.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_an_adapter_is_applied(
    tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, dtype: str, within: float
) -> None:
    """Merged in float32, beside the weights in bfloat16."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    save_model(model, tokenizer, tiny_model, tmp_path)
    engine = open_engine(EngineSettings.model_validate({"dtype": dtype}), tiny_model, tmp_path)
    found = dict(engine.score(list(groups())))
    for i, scores in enumerate(reference_scores(model.eval(), yes_no_ids(tokenizer))):
        np.testing.assert_allclose(found[i], scores, atol=within)
    plain = dict(engine_of(tiny_model).score(list(groups())))
    assert max(np.abs(found[i] - plain[i]).max() for i in found) > 0.1


def test_what_cannot_be_run_is_refused(tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    engine = engine_of(tiny_model)
    with pytest.raises(ValueError, match="at least two tokens"):
        list(engine.greedy([[5]], max_tokens=2, repetition_penalty=1.0))
    with pytest.raises(PromptTooLongError, match=r"4090 tokens and 7 new ones exceed the model's 4096; lower"):
        list(engine.greedy([[5] * 4091], max_tokens=7, repetition_penalty=1.0))
    config = LlamaConfig.from_pretrained(tiny_model)
    config.layer_types = ["full_attention", "sliding_attention"]
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError, match=r"full_attention, sliding_attention\); run it with `engine.kind: vllm`"
    ):
        engine_of(tmp_path)
