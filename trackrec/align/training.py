"""What all trainers share: arguments, LoRA, checkpoints, several GPUs, DeepSpeed, and the facts of a training.

A stage trains in a function `body(settings, ...) -> facts`, which `trackrec.align.launching` runs. A body goes:

    # Before the model: ZeRO-3 partitions its weights as they are loaded.
    args = TrainingArguments(**arguments(settings, work, seed))
    model = load_trainable(settings, base_model, model_directory, seed)
    trainer = SomeTrainer(model=model, args=args, ...)
    facts = train(trainer, tokens)
    save(trainer, tokenizer, base_model, out)
    return facts
"""

import contextlib
import math
import os
from collections.abc import Sized
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from trackrec import storage
from trackrec.config import LoraSettings, TrainingSettings
from trackrec.llm import models
from trackrec.progress import track

# Written last into a checkpoint: one without it was cut off while being written.
_COMPLETE = "complete"
_SEED_LIMIT = 2**32  # numpy's


class EmptyTrainingError(ValueError):
    """There is nothing to train on."""


class TooLongError(ValueError):
    """An example has more tokens than `max_length`; examples are never silently cut."""


def check_length(tokens: int, max_length: int, what: str) -> None:
    """
    Raises:
        TooLongError: `what` has more tokens than allowed.
    """
    if tokens > max_length:
        raise TooLongError(
            f"{what} has {tokens} tokens, more than max_length {max_length}; raise `max_length`, or shorten "
            "`contexts.history_length` or the RecCoTs' `max_tokens`"
        )


def arguments(settings: TrainingSettings, work: Path, seed: int) -> dict[str, Any]:
    """Keyword arguments for `transformers.TrainingArguments` or a subclass of it.

    Args:
        work: survives a kill; checkpoints go to `work/checkpoints`, DeepSpeed's to a folder for their number of
            processes: cut into so many parts, they cannot be gone on with by another number.
    Raises:
        ValueError: `batch_size` cannot be had with this `micro_batch_size` on this many processes.
    """
    on_gpu = torch.cuda.is_available()
    checkpoints = f"checkpoints-{world_size()}" if settings.deepspeed else "checkpoints"
    step = settings.micro_batch_size * world_size()
    if settings.batch_size % step:
        raise ValueError(
            f"batch_size {settings.batch_size} is not a multiple of micro_batch_size {settings.micro_batch_size} × "
            f"{world_size()} processes = {step}; change one of them"
        )
    return {
        "output_dir": str(work / checkpoints),
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // step,
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "lr_scheduler_type": settings.lr_schedule,
        "warmup_steps": settings.warmup_ratio,  # below 1 it is a share of all steps
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": compute_dtype(settings) == "bfloat16",
        "use_cpu": not on_gpu,
        "activation_checkpointing": settings.gradient_checkpointing,
        # PEFT on ZeRO-3 works with the reentrant kind alone.
        "activation_checkpointing_kwargs": {
            "use_reentrant": settings.deepspeed == "zero3" and settings.lora is not None
        },
        "deepspeed": deepspeed_config(settings.deepspeed) if settings.deepspeed else None,
        "save_strategy": "steps",
        "save_steps": settings.checkpoint_steps,
        "save_total_limit": 2,  # the older one goes before the newer one is marked complete
        "logging_nan_inf_filter": False,  # `_RefuseNonFinite` sees to them
        "logging_steps": 0.05,  # of all steps: about twenty points make the loss curve
        "seed": seed % _SEED_LIMIT,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "disable_tqdm": True,  # `_Progress` is quieter in a pod's log
    }


def deepspeed_config(stage: Literal["zero2", "zero3"]) -> dict[str, Any]:
    """DeepSpeed's JSON: ZeRO-2 shards gradients and optimiser state, ZeRO-3 also the weights.

    "auto" is filled in by transformers, from the training arguments.
    """
    zero: dict[str, Any] = {"stage": 2, "overlap_comm": True, "contiguous_gradients": True}
    if stage == "zero3":
        zero |= {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
        zero |= {
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        }
    return {
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }


def world_size() -> int:
    """The number of training processes, as the launcher gives it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def compute_dtype(settings: TrainingSettings) -> Literal["float32", "bfloat16"]:
    """The dtype of forward and backward; `auto` is bfloat16 on a GPU, float32 on a CPU."""
    if settings.dtype != "auto":
        return settings.dtype
    return "bfloat16" if torch.cuda.is_available() else "float32"


def load_trainable(settings: TrainingSettings, base_model: Path, model: Path, seed: int) -> PreTrainedModel | PeftModel:
    """The model in directory `model`, ready to train.

    With LoRA that is a new adapter on the base model, or the adapter that lies there, continued. Without, it is all
    weights; an adapter that lies there is merged into its base first.

    Raises:
        ValueError: an adapter of another rank, alpha or dropout than `settings.lora`, or, with LoRA on, full weights
            other than the base's (the new adapter would sit on weights that no later stage is given).
    """
    full = settings.lora is None and settings.deepspeed is None
    # Training all weights needs them in float32, for a step of 1e-5 vanishes in bfloat16; DeepSpeed keeps such a copy.
    dtype = "float32" if full else compute_dtype(settings)
    if settings.deepspeed:
        import deepspeed

        # On CPUs it would compile an exchange through shared memory, behind a lock file that a killed process leaves:
        # every later training of this machine would wait for it for ever. gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # On a GPU accelerate has done it; on CPUs ZeRO-3 would take itself for the only process.
        deepspeed.init_distributed(auto_mpi_discovery=False)
    loaded = models.load_model(base_model, model, dtype=dtype, trainable=True)
    if settings.lora is None:
        merged = loaded.merge_and_unload() if isinstance(loaded, PeftModel) else loaded
        return merged.requires_grad_(True)
    if isinstance(loaded, PeftModel):
        _refuse_another_rank(loaded, settings.lora, model)
        adapted = loaded
    else:
        if storage.content_hash(model) != storage.content_hash(base_model):
            raise ValueError(
                f"{model} holds full weights that are not the base model's, so a LoRA adapter cannot be trained on it; "
                "leave `lora` out here too, or train the earlier stage with LoRA"
            )
        set_seed(seed % _SEED_LIMIT)  # the adapter's first matrix is random
        # ZeRO-3 gathers a module's parameters together and so wants them in one dtype.
        adapted = get_peft_model(
            loaded, _lora_config(settings.lora), autocast_adapter_dtype=settings.deepspeed != "zero3"
        )
    if settings.gradient_checkpointing:
        adapted.enable_input_require_grads()  # the embedding is frozen, and a checkpoint needs an input with gradients
    return adapted


def _lora_config(lora: LoraSettings) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )


def _refuse_another_rank(model: PeftModel, lora: LoraSettings, where: Path) -> None:
    found = cast(LoraConfig, model.peft_config[model.active_adapter])
    has = (found.r, found.lora_alpha, found.lora_dropout)
    wants = (lora.r, lora.alpha, lora.dropout)
    if has != wants:
        raise ValueError(
            f"the adapter in {where} has (r, alpha, dropout) = {has}, but the settings say {wants}; "
            "give the stages that train one model the same `lora`"
        )


class MeanLossTrainer(Trainer):
    """A Trainer whose loss is the mean over the examples of an optimiser step, however they are cut into micro-batches
    and processes.

    A subclass gives `example_losses`; its batches hold `labels` with one row an example.
    """

    loss_is_scaled_for_ga = True

    def example_losses(self, model: PreTrainedModel | PeftModel, batch: dict[str, Any]) -> Tensor:
        """One loss an example of the micro-batch, [B]. `model` is the bare one: any part of it may be called."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        # The mixed precision that accelerate puts around the model's own forward, for a loss that calls its parts.
        with self.accelerator.autocast():
            losses = self._inside_wrapper(model, inputs)
        if num_items_in_batch is None:
            return losses.mean()
        # Processes average their gradients, so each one's share of the sum is scaled up first.
        return losses.sum() * self.accelerator.num_processes / num_items_in_batch

    def _inside_wrapper(self, wrapper: nn.Module, batch: dict[str, Any]) -> Tensor:
        """`example_losses` in the place of the bare model's forward.

        DDP and DeepSpeed set up their exchange of gradients in the wrapper's forward, which a loss that calls the
        model's parts would miss.
        """
        bare = cast(PreTrainedModel | PeftModel, self.accelerator.unwrap_model(wrapper))
        if bare is wrapper:
            return self.example_losses(bare, batch)
        forward = bare.forward

        def losses(batch: dict[str, Any]) -> Tensor:
            bare.forward = forward  # type: ignore[method-assign]
            return self.example_losses(bare, batch)

        bare.forward = losses  # type: ignore[method-assign]
        try:
            return wrapper(batch)
        finally:
            bare.forward = forward  # type: ignore[method-assign]

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of one optimiser step, and their number of examples over all processes."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        count = torch.tensor(sum(len(batch["labels"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(count).sum()


def train(trainer: Trainer, tokens: int) -> dict[str, Any]:
    """Trains to the end, from the last complete checkpoint where there is one, and returns the facts for the manifest.

    Args:
        tokens: the tokens of one epoch, padding not counted.
    Raises:
        FloatingPointError: the loss is infinite or no number.
    """
    model, checkpoint = cast(nn.Module, trainer.model), last_checkpoint(Path(str(trainer.args.output_dir)))
    resumed = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_RefuseNonFinite())
    trainer.add_callback(_MarkComplete())
    trainer.add_callback(_Progress())
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    seconds = result.metrics["train_runtime"]
    done = tokens * trainer.args.num_train_epochs * (state.max_steps - resumed) / state.max_steps
    facts: dict[str, Any] = {
        "examples": len(cast(Sized, trainer.train_dataset)),
        "tokens": tokens,
        "steps": state.global_step,
        "resumed_from_step": resumed,
        "processes": world_size(),
        "trained_parameters": sum(_size(p) for p in model.parameters() if p.requires_grad),
        "train_seconds": round(seconds, 3),
        "tokens_per_second": round(done / seconds, 1),
        "loss": [round(entry["loss"], 6) for entry in state.log_history if "loss" in entry],
    }
    if torch.cuda.is_available():
        facts["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated()
    return facts


def save(trainer: Trainer, tokenizer: PreTrainedTokenizerFast, base_model: Path, out: Path) -> None:
    """Writes the trained model to `out`; every process calls it, rank 0 writes."""
    model = cast(PreTrainedModel | PeftModel, trainer.model)
    with _whole_weights(model):
        if trainer.args.should_save:
            models.save_model(model, tokenizer, base_model, out)
    trainer.accelerator.wait_for_everyone()


def _whole_weights(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Under ZeRO-3 a process holds a part of each weight; inside this, it has the trained ones whole."""
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad])


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = [path.parent for path in directory.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _size(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor behind


class _MarkComplete(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.distributed_state.wait_for_everyone()
        if args.should_save:
            storage.write_atomic(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE, b"")


class _RefuseNonFinite(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(
                f"the loss is {logs['loss']} (step {state.global_step}); lower `learning_rate`, or set `dtype: float32`"
            )


class _Progress(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = track(range(state.max_steps), "training", unit="step")
            self.bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar.close()
