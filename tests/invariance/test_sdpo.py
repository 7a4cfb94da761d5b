"""S-DPO trainings that must take the same trajectory."""

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trackrec.align import sdpo_trainer
from trackrec.align.launching import launch
from trackrec.align.sdpo import SoftmaxDPOLoss
from trackrec.align.sdpo_trainer import PreferenceSet, Row, SdpoTrainer, align, encode
from trackrec.config import LoraSettings, SdpoSettings
from trackrec.llm.logprobs import suffix_logprobs
from trackrec.llm.packing import enable, pack

LIKES = ["quiet dramas", "loud comedies", "old westerns", "films about the sea", "courtroom thrillers"]
LORA = LoraSettings(r=4, alpha=8)


def preference_sets(count: int) -> list[PreferenceSet]:
    """Prompts and RecCoTs of several lengths; two to five RecCoTs a set, some cut off."""
    sets = []
    for number in range(count):
        texts = [
            f"The user likes {LIKES[(number + j) % 5]}" + ", and more of it" * ((number + j) % 3)
            for j in range(2 + number % 4)
        ]
        sets.append(
            PreferenceSet(
                context_id=f"c{number}",
                prompt=f"User {number} has seen {' and '.join(LIKES[: 1 + number % 5])}. Summarise the preference.",
                chosen=texts[0],
                rejected=texts[1:],
                chosen_finished=number % 3 > 0,
                rejected_finished=[j % 2 == 0 for j in range(len(texts) - 1)],
            )
        )
    return sets


def settings(**changes: Any) -> SdpoSettings:
    base = {
        "learning_rate": 1e-3,
        "epochs": 2,
        "batch_size": 4,
        "lora": LORA,
        "checkpoint_steps": 2,
        "dtype": "float32",
        "holdout": 0.17,  # c3, and c10 where there is one
    }
    return SdpoSettings.model_validate(base | changes)


def weights(directory: Path) -> dict[str, Tensor]:
    [file] = directory.glob("*.safetensors")
    return safetensors.torch.load_file(file)


def trained(settings: SdpoSettings, model: Path, root: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    facts = align(settings, preference_sets(12), model, model, root / "out", root / "work", seed=3)
    return weights(root / "out"), facts


def same_trajectory(
    facts: dict[str, Any], found: dict[str, Tensor], expected_facts: dict[str, Any], expected: dict[str, Tensor]
) -> None:
    """Equal but for the order of sums, which Adam enlarges where a gradient is near zero."""
    # Losses of steps over other sets cannot be compared; every margin starts at 0.
    assert expected_facts["reward_margins"][-1] > 0.05, "nothing was learnt: equal losses would show nothing"
    for name in ("loss", "reward_margins", "preference_accuracies", "reward_margin", "preference_accuracy"):
        assert facts[name] == pytest.approx(expected_facts[name], abs=1e-4), name
    for name, weight in expected.items():
        assert (found[name] - weight).norm() <= 1e-4 * weight.norm(), name


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_micro_batch_1_times_4_is_4_times_1(lora: LoraSettings | None, tiny_model: Path, tmp_path: Path) -> None:
    """Ten sets to train on in steps of 4, 4 and 2: an epoch's last step is smaller, and its loss is a mean over two."""
    one, one_facts = trained(settings(lora=lora, micro_batch_size=1), tiny_model, tmp_path / "one")
    four, four_facts = trained(settings(lora=lora, micro_batch_size=4), tiny_model, tmp_path / "four")
    assert one_facts["steps"] == 6 and len(one_facts["loss"]) == 6
    same_trajectory(four_facts, four, one_facts, one)


@pytest.mark.parametrize(("lora", "killed_in"), [(LORA, 1), (LORA, 8), (None, 8)], ids=["early-lora", "lora", "full"])
def test_resumed_is_uninterrupted(
    lora: LoraSettings | None, killed_in: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in a micro-batch before and after the first checkpoint, and tried again in the same work directory."""
    expected, facts = trained(settings(lora=lora), tiny_model, tmp_path / "whole")

    calls, training_step = itertools.count(), SdpoTrainer.training_step

    def dying_step(self: SdpoTrainer, *args: Any, **kwargs: Any) -> Tensor:
        if next(calls) == killed_in:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(SdpoTrainer, "training_step", dying_step)
    with pytest.raises(KeyboardInterrupt):
        trained(settings(lora=lora), tiny_model, tmp_path / "killed")
    again, again_facts = trained(settings(lora=lora), tiny_model, tmp_path / "killed")

    # Ten micro-batches an epoch: 8 lies in its third step.
    assert again_facts["resumed_from_step"] == (2 if killed_in == 8 else 0)
    assert again_facts["loss"] == facts["loss"]
    assert again_facts["preference_accuracy"] == facts["preference_accuracy"]
    for name, weight in expected.items():
        assert torch.equal(again[name], weight), name


def test_a_reference_cut_off_is_taken_up(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the reference is computed: the blocks that were saved are not computed again."""
    monkeypatch.setattr(sdpo_trainer, "_BLOCK", 4)
    expected, _ = trained(settings(), tiny_model, tmp_path / "whole")

    seen, all_logprobs = [], SdpoTrainer.all_logprobs

    def dying(self: SdpoTrainer, numbers: range) -> Tensor:
        seen.append(numbers)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return all_logprobs(self, numbers)

    monkeypatch.setattr(SdpoTrainer, "all_logprobs", dying)
    with pytest.raises(KeyboardInterrupt):
        trained(settings(), tiny_model, tmp_path / "killed")
    again, _ = trained(settings(), tiny_model, tmp_path / "killed")
    assert seen[:4] == [range(0, 4), range(4, 8), range(4, 8), range(8, 12)]
    for name, weight in expected.items():
        assert torch.equal(again[name], weight), name


def test_two_processes_are_one(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of four: 1 × 4, and 2 processes × 1 × 2, which get the sets of a step in turn."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs = []
    for processes in (1, 2):
        # As many processes does `launch` start.
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=processes: count)
        out, work = tmp_path / f"out{processes}", tmp_path / f"work{processes}"
        sets = preference_sets(9)
        arguments = (settings(), sets, tiny_model, tiny_model, out, work, 3)
        runs.append((launch(align, *arguments), weights(out)))
    (one_facts, one), (two_facts, two) = runs
    assert (one_facts["processes"], two_facts["processes"]) == (1, 2)
    same_trajectory(two_facts, two, one_facts, one)


def dying_align(*arguments: Any) -> dict[str, Any]:
    """`align`, but the process dies in the middle of its third step."""
    calls, training_step = itertools.count(), SdpoTrainer.training_step

    def dying_step(self: SdpoTrainer, *args: Any, **kwargs: Any) -> Tensor:
        # Steps of four sets, two a process: call 5 is the third step's second micro-batch.
        if next(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self, *args, **kwargs)

    SdpoTrainer.training_step = dying_step  # type: ignore[method-assign]
    return align(*arguments)


@pytest.mark.parametrize(
    "changes",
    [{"deepspeed": "zero2"}, {"deepspeed": "zero3", "lora": None, "gradient_checkpointing": True}],
    ids=["zero2-lora", "zero3-full"],
)
def test_resumed_is_uninterrupted_under_deepspeed(
    changes: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes with a part of the optimiser's state (and of the weights) each, killed after a checkpoint.

    ZeRO-3 on all weights with gradient checkpointing is how the paper's settings train; one process must match it too.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # as many processes does `launch` start
    chosen = settings(**changes)

    def launched(body: Any, root: Path) -> dict[str, Any]:
        arguments = (chosen, preference_sets(9), tiny_model, tiny_model, root / "out", root / "work", 3)
        return launch(body, *arguments)

    facts = launched(align, tmp_path / "whole")
    with pytest.raises(ChildFailedError):
        launched(dying_align, tmp_path / "killed")
    assert not (tmp_path / "killed" / "out").exists()
    again_facts = launched(align, tmp_path / "killed")
    assert (facts["resumed_from_step"], again_facts["resumed_from_step"], facts["steps"]) == (0, 2, 4)
    expected, again = weights(tmp_path / "whole" / "out"), weights(tmp_path / "killed" / "out")
    same_trajectory(again_facts, again, facts, expected)

    alone = settings(**changes | {"deepspeed": None})
    (tmp_path / "alone").mkdir()
    arguments = (
        preference_sets(9),
        tiny_model,
        tiny_model,
        tmp_path / "alone" / "out",
        tmp_path / "alone" / "work",
        3,
    )
    same_trajectory(facts, expected, align(alone, *arguments), weights(tmp_path / "alone" / "out"))


def plain_logprobs(model: Any, row: Row, pad_id: int) -> Tensor:
    """One padded row a RecCoT, its prompt repeated, full logits."""
    texts = [row.prompt + recot for recot in row.recots]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [pad_id] * (longest - len(text)) for text in texts])
    lengths = torch.tensor([len(text) for text in texts])
    positions = torch.arange(longest)
    logits = model(input_ids=ids, attention_mask=(positions < lengths[:, None]).long()).logits
    token_logprobs = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    is_recot = (positions[1:] >= len(row.prompt)) & (positions[1:] < lengths[:, None])
    return (token_logprobs * is_recot).sum(1)


def test_prefix_shared_is_plain(tiny_model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Log-probabilities within 1e-4, gradients of eq. 4 within 1e-3 of each weight's, in float32."""
    rows = encode(tokenizer, preference_sets(5), max_length=512)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    parameters = list(model.parameters())
    loss = SoftmaxDPOLoss(beta=0.1)
    width = max(len(row.recots) for row in rows)
    present = torch.tensor([[j < len(row.recots) for j in range(width)] for row in rows])
    # Any fixed numbers, for gradients that are not those of the first step.
    reference = torch.randn(len(rows), width, generator=torch.Generator().manual_seed(0)) * 5 - 100

    plain = torch.zeros(len(rows), width)
    for number, row in enumerate(rows):
        plain[number, : len(row.recots)] = plain_logprobs(model, row, tokenizer.pad_token_id)
    plain_gradients = torch.autograd.grad(loss(plain, reference, present).mean(), parameters)

    enable(model)
    shared = suffix_logprobs(model, pack([(row.prompt, row.recots) for row in rows], tokenizer.pad_token_id))
    torch.testing.assert_close(shared, plain, atol=1e-4, rtol=0)
    gradients = torch.autograd.grad(loss(shared, reference, present).mean(), parameters)
    for gradient, expected in zip(gradients, plain_gradients, strict=True):
        assert (gradient - expected).norm() <= 1e-3 * expected.norm()
