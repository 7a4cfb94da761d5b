"""The vLLM engine against plain transformers, both on the real SmolLM2, in the environment of `make test-vllm`."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

pytest.importorskip("vllm", reason="runs in the environment of `make test-vllm`")
# GiB for cached keys and values; by default vLLM takes a share of the whole machine's memory.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# vLLM compiles two small functions even in eager mode: half a minute, and nothing that is tested here.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from trackrec.config import EngineSettings
from trackrec.llm.chat import encode_chat, encode_rec
from trackrec.llm.engine import Completion, Group, PromptTooLongError, open_engine
from trackrec.llm.models import WrongBaseError, save_model
from trackrec.llm.tokens import yes_no_ids
from trackrec.llm.vllm_engine import VllmEngine

pytestmark = pytest.mark.vllm

SETTINGS = EngineSettings(kind="vllm", dtype="float32", max_model_len=1024, gpu_memory_utilization=0.25)
HISTORY = [
    {"title": "Toy Story (1995)", "rating": 5.0, "label": 1},
    {"title": "Heat (1995)", "rating": 2.0, "label": 0},
    {"title": "Babe (1995)", "rating": 4.0, "label": 1},
]
RECOTS = [
    "Likes warm family films and animation.",
    "Prefers dark crime thrillers.",
    "No clear preference, rates rarely.",
]
QUESTIONS = ["Name three films for children.", "Why do people like comedies? Answer in one sentence."]


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> VllmEngine:
    opened = open_engine(SETTINGS, smollm2, smollm2)
    assert isinstance(opened, VllmEngine)
    return opened


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [encode_chat(tokenizer, question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def groups(tokenizer: PreTrainedTokenizerFast) -> list[Group]:
    titles = ("Aladdin (1992)", "Se7en (1995)")
    return [encode_rec(tokenizer, "movies", HISTORY, title, RECOTS) for title in titles]


@pytest.fixture(scope="module")
def adapter(smollm2: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter with random B: PEFT starts B at zero, which would change nothing."""
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
    out = tmp_path_factory.mktemp("adapter")
    save_model(model, tokenizer, smollm2, out)
    return out


@torch.no_grad()
def p_yes_no(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, groups: list[Group]) -> list[np.ndarray]:
    """Every text on its own through plain transformers: the softmax over the last position's Yes and No logits."""
    answers = list(yes_no_ids(tokenizer))
    return [
        np.stack(
            [
                model(torch.tensor([prefix + suffix])).logits[0, -1, answers].double().softmax(-1).numpy()
                for suffix in suffixes
            ]
        )
        for prefix, suffixes in groups
    ]


def sampled(engine: VllmEngine, prompts: list[list[int]], seeds: list[list[int]]) -> list[list[Completion]]:
    found = dict(engine.sample(prompts, seeds, temperature=1.0, top_p=0.9, max_tokens=24))
    return [found[index] for index in range(len(prompts))]


def test_scores_are_those_of_plain_transformers(
    engine: VllmEngine, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, groups: list[Group]
) -> None:
    scores = dict(engine.score(groups))
    assert sorted(scores) == [0, 1]
    for index, expected in enumerate(p_yes_no(reference, tokenizer, groups)):
        np.testing.assert_allclose(scores[index], expected, atol=2e-5)
        # Far apart against the tolerance: scores in another order would not pass.
        assert np.diff(np.sort(expected[:, 0])).min() > 2e-4


def test_greedy_writes_what_plain_transformers_writes(
    engine: VllmEngine, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    completions = dict(engine.greedy(prompts, max_tokens=40, repetition_penalty=1.3))
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        whole = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, repetition_penalty=1.3
        )
        new = whole[0, len(prompt) :]
        ended = new[-1] == tokenizer.eos_token_id
        expected = tokenizer.decode(new, skip_special_tokens=True)
        assert completions[index] == Completion(expected, len(new), "stop" if ended else "length")


def test_a_finished_answer_counts_its_end_token(engine: VllmEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = encode_chat(tokenizer, "What is the capital of France? Answer with one word.")
    ((_, completion),) = engine.greedy([prompt], max_tokens=100, repetition_penalty=1.0)
    assert completion.finish_reason == "stop"
    assert completion.num_tokens == len(tokenizer.encode(completion.text, add_special_tokens=False)) + 1


def test_a_samples_text_follows_its_seed_alone(engine: VllmEngine, prompts: list[list[int]]) -> None:
    together = sampled(engine, prompts, [[11, 12, 13], [21, 22, 23]])
    texts = [[completion.text for completion in completions] for completions in together]
    assert all(len(set(own)) == 3 for own in texts)
    for completion in together[0] + together[1]:
        assert 0 < completion.num_tokens <= 24
        assert (completion.num_tokens == 24) or completion.finish_reason == "stop"
    # Other company, other order: the same texts.
    assert sampled(engine, [prompts[1]], [[23, 21]]) == [[together[1][2], together[1][0]]]
    assert sampled(engine, prompts[::-1], [[22], [13, 11, 12]])[1] == [together[0][position] for position in (2, 0, 1)]


def test_sampling_keeps_to_the_nucleus(engine: VllmEngine, prompts: list[list[int]]) -> None:
    greedy = dict(engine.greedy(prompts, max_tokens=16, repetition_penalty=1.0))
    for index, completions in engine.sample(prompts, [[1, 2]] * 2, temperature=1.0, top_p=1e-6, max_tokens=16):
        assert completions == [greedy[index]] * 2


def test_a_caller_that_stops_early_leaves_nothing_behind(engine: VllmEngine, prompts: list[list[int]]) -> None:
    before = sampled(engine, prompts, [[1], [2]])
    results: Iterator[tuple[int, list[Completion]]] = engine.sample(
        prompts, [[5], [6, 7, 8]], temperature=1.0, top_p=0.9, max_tokens=24
    )
    next(results)
    results.close()
    assert not engine._engine.has_unfinished_requests()
    assert sampled(engine, prompts, [[1], [2]]) == before


def test_a_prompt_that_does_not_fit_is_refused(engine: VllmEngine, prompts: list[list[int]]) -> None:
    fits = 1024 - len(prompts[0])
    with pytest.raises(
        PromptTooLongError, match=f"{len(prompts[0])} tokens and {fits + 1} new ones exceed the model's 1024"
    ):
        next(engine.greedy(prompts, max_tokens=fits + 1, repetition_penalty=1.0))
    with pytest.raises(ValueError, match="no seed"):
        next(engine.sample(prompts, [[1], []], temperature=1.0, top_p=0.9, max_tokens=4))


def test_an_adapter_scores_and_writes_as_under_peft(
    smollm2: Path,
    adapter: Path,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    groups: list[Group],
) -> None:
    from peft import PeftModel

    adapted_engine = open_engine(SETTINGS, smollm2, adapter)
    scores = dict(adapted_engine.score(groups))
    completions = dict(adapted_engine.greedy(prompts, max_tokens=12, repetition_penalty=1.0))
    without = p_yes_no(reference, tokenizer, groups)
    adapted = PeftModel.from_pretrained(reference, str(adapter)).eval()
    for index, expected in enumerate(p_yes_no(adapted, tokenizer, groups)):
        assert np.abs(expected - without[index]).max() > 0.01
        np.testing.assert_allclose(scores[index], expected, atol=2e-5)
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        whole = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert completions[index].text == tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True)


def test_an_adapter_on_another_base_is_refused(tiny_model: Path, adapter: Path) -> None:
    with pytest.raises(WrongBaseError, match="sits on sha256:"):
        open_engine(SETTINGS, tiny_model, adapter)
