"""CoT preference alignment: G learns to prefer the RecCoT that V rewarded most (paper 3.2; Algorithm 2, stage 1).

The reference is G as it was before this training: its log-probabilities are computed once, before the first step, and
no second copy of the weights is held. A prompt is encoded once for its N RecCoTs (`trackrec.llm.packing`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from trackrec import seeds, storage
from trackrec.align import training
from trackrec.align.sdpo import SoftmaxDPOLoss, implicit_rewards, preference_accuracy, reward_margin
from trackrec.config import SdpoSettings
from trackrec.llm.chat import encode_chat, encode_text
from trackrec.llm.logprobs import suffix_logprobs
from trackrec.llm.models import load_tokenizer
from trackrec.llm.packing import Packed, enable, pack
from trackrec.progress import track

# Preference sets whose reference log-probabilities are saved at a time: what a kill can cost.
_BLOCK = 256


@dataclass(frozen=True)
class PreferenceSet:
    """(u_i, Cot_p, C^ε): a context's prompt^CoT, the RecCoT with the highest reward, and the others."""

    context_id: str
    prompt: str
    chosen: str
    rejected: Sequence[str]
    # Whether a RecCoT ended by itself: one cut at the token limit has no end-of-sequence token to learn.
    chosen_finished: bool
    rejected_finished: Sequence[bool]


@dataclass(frozen=True)
class Row:
    """A preference set as token ids, the chosen RecCoT first."""

    prompt: list[int]
    recots: list[list[int]]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(len(recot) for recot in self.recots)


def encode(tokenizer: PreTrainedTokenizerFast, sets: Sequence[PreferenceSet], max_length: int) -> list[Row]:
    """Token ids as G sees and writes them at sampling.

    Raises:
        TooLongError: a prompt with one of its RecCoTs has more than `max_length` tokens.
    """
    rows = []
    for one in sets:
        prompt = encode_chat(tokenizer, one.prompt)
        texts = zip([one.chosen, *one.rejected], [one.chosen_finished, *one.rejected_finished], strict=True)
        recots = [encode_text(tokenizer, text) + [tokenizer.eos_token_id] * finished for text, finished in texts]
        longest = max(len(recot) for recot in recots)
        training.check_length(len(prompt) + longest, max_length, f"context {one.context_id}")
        rows.append(Row(prompt, recots))
    return rows


class SdpoTrainer(training.MeanLossTrainer):
    """Softmax-DPO against the model's own initial weights.

    Args:
        model: G; as it is now, it is the reference.
        rows: the first `trained` of them are trained on; the others can be measured.
        work: survives a kill; the reference's log-probabilities are saved here, so that a resumed training does not
            take its half-trained weights for the reference.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments,
        rows: Sequence[Row],
        *,
        trained: int,
        beta: float,
        pad_id: int,
        work: Path,
    ) -> None:
        enable(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collate,
            train_dataset=range(trained),  # type: ignore[arg-type]  # a sequence is a map-style dataset
            callbacks=[_OnTrainBegin(self.load_reference)],
        )
        self.rows = rows
        self.loss = SoftmaxDPOLoss(beta)
        self.pad_id = pad_id
        self.work = work
        # N, the most RecCoTs of a preference set, and which of them each set has.
        self.width = max(len(row.recots) for row in rows)
        self.present = torch.tensor([[j < len(row.recots) for j in range(self.width)] for row in rows])
        # Number of examples, sum of reward margins and of preference accuracies since the last log.
        self.seen = torch.zeros(3, device=args.device)

    def collate(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """One packed row a preference set; `labels` are the sets' numbers.

        Sets 3 and 1, with the prompts and RecCoTs ([5, 6], [[7], [8, 9]]) and ([5], [[3], [4]]), give

            {"input_ids":    [[5, 6, 7, 8, 9], [5, 3, 4, 0, 0]],
             "position_ids": [[0, 1, 2, 2, 3], [0, 1, 1, 0, 0]],
             "segment_ids":  [[0, 0, 1, 2, 2], [0, 1, 2, -1, -1]],
             "labels":       [3, 1]}
        """
        packed = pack([(self.rows[n].prompt, self.rows[n].recots) for n in numbers], self.pad_id)
        return {
            "input_ids": packed.input_ids,
            "position_ids": packed.position_ids,
            "segment_ids": packed.segment_ids,
            "labels": torch.tensor(numbers),
        }

    def example_losses(self, model: PreTrainedModel | PeftModel, batch: dict[str, Tensor]) -> Tensor:
        policy = self.recot_logprobs(model, batch)
        numbers = batch["labels"].cpu()
        reference = self.reference[numbers].to(policy.device)
        present = self.present[numbers].to(policy.device)
        self._measure(policy.detach(), reference, present)
        return self.loss(policy, reference, present)

    def recot_logprobs(self, model: PreTrainedModel | PeftModel, batch: dict[str, Tensor]) -> Tensor:
        """log P(Cot | u) under `model`, [B, width]; 0 where a set has fewer RecCoTs."""
        packed = Packed(batch["input_ids"], batch["position_ids"], batch["segment_ids"])
        found = suffix_logprobs(model, packed)
        return F.pad(found, (0, self.width - found.shape[1]))

    @torch.no_grad()
    def all_logprobs(self, numbers: Sequence[int]) -> Tensor:
        """log P(Cot | u) under the weights as they are, float32 [len(numbers), width] on the CPU.

        Args:
            numbers: of the sets. The processes share the work.
        """
        model = cast(PreTrainedModel | PeftModel, self.model).eval()
        world, rank, size = self.args.world_size, self.args.process_index, self.args.per_device_train_batch_size
        # Each process does equally many, as ZeRO-3 wants; the last ones may come twice.
        share = math.ceil(len(numbers) / world)
        mine = [numbers[i % len(numbers)] for i in range(rank, share * world, world)]
        parts = []
        for start in range(0, share, size):
            batch = self._prepare_inputs(self.collate(mine[start : start + size]))
            with self.accelerator.autocast():
                parts.append(self.recot_logprobs(model, batch))
        every = self.accelerator.gather(torch.cat(parts)).view(world, share, self.width)
        return every.transpose(0, 1).reshape(-1, self.width)[: len(numbers)].cpu()

    def load_reference(self) -> None:
        """log G(Cot | u) of all sets, from `work` as far as an earlier try has saved them.

        Raises:
            FileNotFoundError: they are not all there, though the weights are trained ones already.
        """
        blocks = []
        starts = range(0, len(self.rows), _BLOCK)
        for start in track(starts, "reference", unit="block") if self.is_world_process_zero() else starts:
            path = self.work / f"reference-{start:08d}.safetensors"
            if path.is_file():
                blocks.append(safetensors.torch.load_file(path)["logprobs"])
                continue
            if self.state.global_step > 0:
                raise FileNotFoundError(f"{path} is gone; delete the folder it was in, and train from the start")
            block = self.all_logprobs(range(start, min(start + _BLOCK, len(self.rows))))
            if self.args.should_save:
                storage.write_atomic(path, safetensors.torch.save({"logprobs": block}))
            blocks.append(block)
        self.reference = torch.cat(blocks)

    def measure(self, numbers: Sequence[int]) -> dict[str, float]:
        """Means over the sets with these numbers, under the weights as they are; `trackrec.align.sdpo` defines them."""
        chosen = torch.tensor(numbers)
        rewards = implicit_rewards(self.all_logprobs(numbers), self.reference[chosen], self.loss.beta)
        return {
            "reward_margin": reward_margin(rewards, self.present[chosen]).mean().item(),
            "preference_accuracy": preference_accuracy(rewards, self.present[chosen]).mean().item(),
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds reward margin and preference accuracy since the last log, of each set just before the step it is in."""
        if "loss" in logs:
            count, margin, accuracy = self.accelerator.reduce(self.seen).tolist()
            logs |= {"reward_margin": margin / count, "preference_accuracy": accuracy / count}
            self.seen.zero_()
        super().log(logs, start_time)

    def _measure(self, policy: Tensor, reference: Tensor, present: Tensor) -> None:
        rewards = implicit_rewards(policy, reference, self.loss.beta)
        margins, accuracies = reward_margin(rewards, present), preference_accuracy(rewards, present)
        self.seen += torch.stack([margins.new_tensor(len(rewards)), margins.sum(), accuracies.sum()])


class _OnTrainBegin(TrainerCallback):
    """Calls `action` when the model is prepared (placed, partitioned, wrapped), and loaded where training goes on."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.action()


def hold_out(sets: Sequence[PreferenceSet], share: float) -> tuple[list[PreferenceSet], list[PreferenceSet]]:
    """The sets to train on, and about `share` of them to measure on.

    A hash of the context alone decides, so that a context is on the same side in every iteration.
    """
    trained: list[PreferenceSet] = []
    held: list[PreferenceSet] = []
    for one in sets:
        (held if seeds.derive("holdout", one.context_id) < share * 2**63 else trained).append(one)
    return trained, held


def align(
    settings: SdpoSettings,
    sets: Sequence[PreferenceSet],
    base_model: Path,
    generator: Path,
    out: Path,
    work: Path,
    seed: int,
) -> dict[str, Any]:
    """Trains G on from `generator`, which may be the base model itself; returns the training's facts.

    Beside every training's facts: `reward_margins` and `preference_accuracies`, one for each loss, on the sets trained
    on; and, where sets are held out, `held_out` of them with the final `reward_margin` and `preference_accuracy`.

    Args:
        out: where the aligned G goes. work: survives a kill; holds checkpoints and the reference's log-probabilities.
    Raises:
        EmptyTrainingError: no preference set.
        TooLongError: a prompt with one of its RecCoTs has more than `settings.max_length` tokens.
    """
    if not sets:
        raise training.EmptyTrainingError("no preference set to train on; look at what `preferences` dropped")
    tokenizer = load_tokenizer(base_model)
    trained, held_out = hold_out(sets, settings.holdout)
    if not trained:  # a few sets, all on one side
        trained, held_out = held_out, []
    held_out = held_out[: settings.measured_sets]
    rows = encode(tokenizer, [*trained, *held_out], settings.max_length)
    args = TrainingArguments(**training.arguments(settings, work, seed))
    trainer = SdpoTrainer(
        training.load_trainable(settings, base_model, generator, seed),
        args,
        rows,
        trained=len(trained),
        beta=settings.beta,
        pad_id=tokenizer.pad_token_id,
        work=work,
    )
    facts = training.train(trainer, tokens=sum(row.tokens for row in rows[: len(trained)]))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    facts |= {
        "reward_margins": [round(entry["reward_margin"], 6) for entry in logged],
        "preference_accuracies": [round(entry["preference_accuracy"], 6) for entry in logged],
        "held_out": len(held_out),
    }
    if held_out:
        facts |= trainer.measure(range(len(trained), len(rows)))
    training.save(trainer, tokenizer, base_model, out)
    return facts
