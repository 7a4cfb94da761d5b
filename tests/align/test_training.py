from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from trackrec.align import training
from trackrec.config import LoraSettings, TrainingSettings
from trackrec.llm.models import load_model, save_model


def test_accumulation_makes_up_for_micro_batches_and_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainingSettings(batch_size=16, micro_batch_size=2)
    assert training.arguments(settings, tmp_path, seed=0)["gradient_accumulation_steps"] == 8
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert training.arguments(settings, tmp_path, seed=0)["gradient_accumulation_steps"] == 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size 16 is not a multiple of micro_batch_size 2 × 3 processes = 6"):
        training.arguments(settings, tmp_path, seed=0)


def test_warm_up_is_a_share_of_the_steps_and_seeds_of_any_size_do(tmp_path: Path) -> None:
    args = TrainingArguments(**training.arguments(TrainingSettings(warmup_ratio=0.1), tmp_path, seed=2**62 + 5))
    assert args.get_warmup_steps(200) == 20
    assert args.seed == 5
    assert Path(str(args.output_dir)) == tmp_path / "checkpoints"


def test_deepspeeds_checkpoints_are_of_one_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses to load another number's, so a training with more nodes than before begins anew."""
    plain, sharded = TrainingSettings(), TrainingSettings(deepspeed="zero3")
    found = []
    for processes in ("8", "16"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        found.append([training.arguments(one, tmp_path, seed=0)["output_dir"] for one in (plain, sharded)])
    (same, eight), (again, sixteen) = found
    assert same == again == str(tmp_path / "checkpoints")
    assert (eight, sixteen) == (str(tmp_path / "checkpoints-8"), str(tmp_path / "checkpoints-16"))


def test_deepspeed_shards_what_its_stage_says() -> None:
    assert training.deepspeed_config("zero2")["zero_optimization"]["stage"] == 2
    zero3 = training.deepspeed_config("zero3")["zero_optimization"]
    assert zero3["stage"] == 3
    assert zero3["stage3_gather_16bit_weights_on_model_save"]


def test_a_new_adapter_leaves_the_model_as_it_was_and_trains_only_itself(tiny_model: Path) -> None:
    model = training.load_trainable(TrainingSettings(lora=LoraSettings(r=2)), tiny_model, tiny_model, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # r × (in + out) a matrix: q, o 64→64; k, v 64→32; gate, up 64→128; down 128→64; two layers.
    assert trained == 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 2 * (64 + 128) + (128 + 64))
    ids = torch.tensor([[1, 5, 9]])
    plain = load_model(tiny_model, tiny_model, dtype="float32")
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_new_adapters_depend_on_the_seed_alone(tiny_model: Path) -> None:
    settings = TrainingSettings(lora=LoraSettings(r=2))
    first, again, other = (training.load_trainable(settings, tiny_model, tiny_model, seed) for seed in (1, 1, 2))
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.fixture
def adapter(tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """An adapter of rank 2 that changes what the model says."""
    model = training.load_trainable(TrainingSettings(lora=LoraSettings(r=2)), tiny_model, tiny_model, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    save_model(model, tokenizer, tiny_model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_continued(tiny_model: Path, adapter: Path) -> None:
    model = training.load_trainable(TrainingSettings(lora=LoraSettings(r=2)), tiny_model, adapter, seed=0)
    assert isinstance(model, PeftModel)
    values = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(values) == 14
    assert all(p.requires_grad and bool((p == 0.05).all()) for p in values)


def test_without_lora_an_adapter_is_merged_and_all_weights_train(tiny_model: Path, adapter: Path) -> None:
    merged = training.load_trainable(TrainingSettings(), tiny_model, adapter, seed=0)
    assert not isinstance(merged, PeftModel)
    assert all(p.requires_grad for p in merged.parameters())
    continued = training.load_trainable(TrainingSettings(lora=LoraSettings(r=2)), tiny_model, adapter, seed=0)
    ids = torch.tensor([[1, 5, 9]])
    torch.testing.assert_close(merged(ids).logits, continued(ids).logits)


def test_an_adapter_of_another_rank_is_refused(tiny_model: Path, adapter: Path) -> None:
    with pytest.raises(ValueError, match=r"= \(2, 32, 0.0\), but the settings say \(4, 32, 0.0\)"):
        training.load_trainable(TrainingSettings(lora=LoraSettings(r=4)), tiny_model, adapter, seed=0)


def test_an_adapter_on_weights_no_later_stage_is_given_is_refused(
    tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tuned = load_model(tiny_model, tiny_model, dtype="float32")
    with torch.no_grad():
        next(tuned.parameters()).add_(1)
    save_model(tuned, tokenizer, tiny_model, tmp_path / "tuned")
    with pytest.raises(ValueError, match="full weights that are not the base model's"):
        training.load_trainable(TrainingSettings(lora=LoraSettings()), tiny_model, tmp_path / "tuned", seed=0)


def test_a_checkpoint_cut_off_while_being_written_is_passed_over(tmp_path: Path) -> None:
    assert training.last_checkpoint(tmp_path) is None
    for step, complete in ((9, True), (10, True), (11, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert training.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


class _Square(nn.Module):
    """A weight w; example x has the loss (w - x)²."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, **_: Tensor) -> Tensor:
        raise AssertionError("the trainer calls example_losses")


class _SquareTrainer(training.MeanLossTrainer):
    def example_losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model.w - batch["labels"]) ** 2


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_loss_is_the_mean_over_the_examples_of_a_step_however_they_are_cut(tmp_path: Path, micro: int) -> None:
    settings = TrainingSettings(batch_size=4, micro_batch_size=micro, lr_schedule="constant", warmup_ratio=0, epochs=2)
    # Seven examples: a step over four, then one over the three that are left, cut 2 + 1 or 1 + 1 + 1.
    rows = [{"labels": torch.tensor(float(x))} for x in (1, 2, 3, 4, 5, 6, 7)]
    args = TrainingArguments(**training.arguments(settings, tmp_path, seed=3), optim="sgd")
    args.logging_steps = 1
    args.max_grad_norm = 0.0
    args.learning_rate = 0.25
    trainer = _SquareTrainer(
        model=_Square(),
        args=args,
        train_dataset=rows,
        data_collator=lambda b: {"labels": torch.stack([r["labels"] for r in b])},
    )
    seen: list[float] = []
    trainer.add_callback(_Follow(seen))
    facts = training.train(trainer, tokens=7)

    order = _order(seed=3, folder=tmp_path)
    w, losses, weights = 0.0, [], []
    for epoch in order:
        for step in (epoch[:4], epoch[4:]):
            losses.append(sum((w - x) ** 2 for x in step) / len(step))
            # w goes down the mean's gradient, 2 (w - mean), by 0.25 of it.
            w -= 0.25 * 2 * (w - sum(step) / len(step))
            weights.append(w)
    assert seen == pytest.approx(weights, rel=1e-5)
    assert facts["loss"] == pytest.approx(losses, rel=1e-4)
    assert (facts["examples"], facts["steps"], facts["trained_parameters"]) == (7, 4, 1)


def _order(seed: int, folder: Path) -> list[list[float]]:
    """The examples' order in two epochs, as the Trainer draws it from the seed, whatever the micro-batch."""
    orders: list[list[float]] = []
    rows = [{"labels": torch.tensor(float(x))} for x in (1, 2, 3, 4, 5, 6, 7)]
    args = TrainingArguments(str(folder), seed=seed, per_device_train_batch_size=7, report_to="none", use_cpu=True)
    args.remove_unused_columns = False
    loader = Trainer(model=_Square(), args=args, train_dataset=rows).get_train_dataloader()
    for epoch in range(2):
        loader.set_epoch(epoch)
        orders.append([x for batch in loader for x in batch["labels"].tolist()])
    return orders


class _Follow(TrainerCallback):
    def __init__(self, seen: list[float]) -> None:
        self.seen = seen

    def on_step_end(self, args, state, control, model, **_) -> None:
        self.seen.append(model.w.item())


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    settings = TrainingSettings(batch_size=1, lora=None)
    args = TrainingArguments(**training.arguments(settings, tmp_path, seed=0))
    trainer = _SquareTrainer(model=_Square(), args=args, train_dataset=[{"labels": torch.tensor([torch.inf])}])
    with pytest.raises(FloatingPointError, match="lower `learning_rate`"):
        training.train(trainer, tokens=1)
