"""Packed rows against one row per continuation, on the architectures in use."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from trackrec.llm.logprobs import suffix_logprobs
from trackrec.llm.packing import pack

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


def build(config: PretrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def plain_logprobs(model: nn.Module, prefix: list[int], suffix: list[int]) -> Tensor:
    """The whole text in a row of its own, full logits, no mask and no position ids given."""
    ids = torch.tensor([prefix + suffix])
    log_probs = model(input_ids=ids).logits[0].float().log_softmax(-1)
    return sum(log_probs[len(prefix) + k - 1, token] for k, token in enumerate(suffix))


def test_layout_is_the_docstrings() -> None:
    packed = pack([([5, 6], [[7], [8, 9]]), ([5], [[3, 4]])], pad_id=0)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 3, 4, 0, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 0, 0]]
    assert packed.segment_ids.tolist() == [[0, 0, 1, 2, 2], [0, 1, 1, -1, -1]]
    assert packed.spans == [[(2, 1), (3, 2)], [(1, 2)]]


def test_a_suffix_token_sees_the_prefix_and_itself() -> None:
    mask = pack([([5, 6], [[7], [8, 9]]), ([5], [[3, 4]])], pad_id=0).attention_mask
    assert mask.dtype == torch.bool and mask.shape == (2, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert mask.any(-1).all(), "a row that sees nothing turns a softmax into NaN"


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_are_those_of_separate_rows(name: str) -> None:
    model = build(CONFIGS[name])
    packed = pack(GROUPS, pad_id=0)
    with torch.no_grad():
        logits = model(**packed.model_inputs).logits
        assert logits.isfinite().all()
        for row, (prefix, suffixes) in enumerate(GROUPS):
            for (start, length), suffix in zip(packed.spans[row], suffixes, strict=True):
                alone = model(input_ids=torch.tensor([prefix + suffix])).logits[0, len(prefix) :]
                torch.testing.assert_close(logits[row, start : start + length], alone, atol=1e-5, rtol=1e-5)


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
    packed = pack([(list(range(10)), [list(range(20)) for _ in range(5)])], pad_id=0)
    with Watch():
        suffix_logprobs(model, packed, chunk=chunk).sum().backward()
    # 100 positions predict; the head's own weight, [V, 32], is as large as a chunk.
    assert largest <= chunk * vocabulary
