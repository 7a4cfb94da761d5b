"""Packed rows against one row per continuation, on the architectures in use."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from trackrec.llm.attention import UnsupportedModelError
from trackrec.llm.logprobs import suffix_logprobs
from trackrec.llm.packing import enable, pack

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
}
GROUPS = [
    ([5, 6, 7, 8], [[9, 10, 11], [9], [12, 13, 14, 15, 16]]),
    ([20, 21], [[22, 23], [24, 25, 26]]),
]


def build(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()


def plain_logprobs(model: PreTrainedModel, prefix: list[int], suffix: list[int]) -> Tensor:
    """The whole text in a row of its own, full logits, no mask and no position ids given."""
    ids = torch.tensor([prefix + suffix])
    log_probs = model(input_ids=ids).logits[0].float().log_softmax(-1)
    return sum(log_probs[len(prefix) + k - 1, token] for k, token in enumerate(suffix))


def test_layout_is_the_docstrings() -> None:
    packed = pack([([5, 6], [[7], [8, 9]]), ([5], [[3, 4]])], pad_id=0)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 3, 4, 0, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 0, 0]]
    assert packed.segment_ids.tolist() == [[0, 0, 1, 2, 2], [0, 1, 1, -1, -1]]
    first, second = packed.layouts
    assert (first.prefix, first.places.tolist(), first.real.tolist()) == (2, [[2, 3], [3, 4]], [0, 2, 3])
    assert (second.prefix, second.places.tolist(), second.real.tolist()) == (1, [[1, 2]], [0, 1])


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_are_those_of_separate_rows(name: str) -> None:
    plain, model = build(CONFIGS[name]), build(CONFIGS[name])
    enable(model)
    packed = pack(GROUPS, pad_id=0)
    with torch.no_grad():
        logits = model(**packed.model_inputs).logits
        assert logits.isfinite().all(), "padding must not give NaN"
        for row, (prefix, suffixes) in enumerate(GROUPS):
            start = len(prefix)
            for suffix in suffixes:
                alone = plain(input_ids=torch.tensor([prefix + suffix])).logits[0, len(prefix) :]
                torch.testing.assert_close(logits[row, start : start + len(suffix)], alone, atol=1e-5, rtol=1e-5)
                start += len(suffix)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "lm_head"]], ids=["full", "lora", "lora-head"])
def test_logprobs_and_gradients_are_those_of_separate_rows(name: str, targets: str | list[str] | None) -> None:
    model = build(CONFIGS[name])
    if targets is not None:
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False)
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.tensor([[1.0, -2.0, 0.5], [3.0, -1.0, 0.0]])  # an arbitrary function of the log-probabilities

    expected = torch.zeros(2, 3)
    rows = [[plain_logprobs(model, prefix, suffix) for suffix in suffixes] for prefix, suffixes in GROUPS]
    for row, values in enumerate(rows):
        expected[row, : len(values)] = torch.stack(values)
    plain_gradients = torch.autograd.grad((expected * weights).sum(), trained)

    enable(model)
    for chunk in (3, 1000):  # chunks that cut through suffixes, and one chunk
        found = suffix_logprobs(model, pack(GROUPS, pad_id=0), chunk=chunk)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert found[1, 2] == 0, "the second group has no third suffix"
        gradients = torch.autograd.grad((found * weights).sum(), trained)
        for gradient, plain in zip(gradients, plain_gradients, strict=True):
            assert (gradient - plain).norm() <= 1e-4 * plain.norm() + 1e-7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_logprobs_on_a_gpu_in_bfloat16() -> None:
    model = build(CONFIGS["qwen2"])
    enable(model)
    with torch.no_grad():
        expected = suffix_logprobs(model, pack(GROUPS, pad_id=0))
        found = suffix_logprobs(model.to("cuda", torch.bfloat16), pack(GROUPS, pad_id=0, device="cuda"))
    torch.testing.assert_close(found.cpu(), expected, atol=0.5, rtol=0.02)


@pytest.mark.parametrize("group", [([], [[1]]), ([1], []), ([1], [[2], []])])
def test_an_empty_part_is_refused(group: tuple[list[int], list[list[int]]]) -> None:
    with pytest.raises(ValueError, match="group 1"):
        pack([([1], [[2]]), group], pad_id=0)


def test_memory_holds_one_chunk_of_logits_and_no_more() -> None:
    """No tensor with more than chunk × V numbers lives in forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, Tensor):
                    largest = max(largest, value.numel())
            return out

    vocabulary, chunk = 5000, 32
    config = LlamaConfig(**{**SIZES, "vocab_size": vocabulary})
    model = build(config).requires_grad_(False)
    model.model.layers.requires_grad_(True)
    enable(model)
    packed = pack([(list(range(10)), [list(range(20)) for _ in range(5)])], pad_id=0)
    with Watch():
        suffix_logprobs(model, packed, chunk=chunk).sum().backward()
    # 100 positions predict; the head's own weight, [V, 32], is as large as a chunk.
    assert largest <= chunk * vocabulary


def test_a_model_with_a_sliding_window_is_refused() -> None:
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(UnsupportedModelError, match="sliding_attention"):
        enable(build(config))


def test_a_model_that_is_not_enabled_is_refused() -> None:
    with pytest.raises(ValueError, match="enable"):
        suffix_logprobs(build(CONFIGS["llama"]), pack(GROUPS, pad_id=0))


def test_an_enabled_model_takes_nothing_but_packed_rows() -> None:
    """Without a mask function it would ignore an attention mask: better an error than a silent one."""
    model = build(CONFIGS["llama"])
    enable(model)
    with pytest.raises(TypeError, match="layouts"):
        model(input_ids=torch.tensor([[1, 2]]))
