"""What each stage of a run is asked to do: tasks, contexts, prompts and tokens, from the config and the data's size."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from trackrec.planning.rates import Lengths, Sizes, Splits
from trackrec.run_config import RunConfig

# read: a forward pass. write: new tokens. train: forward and backward.
Kind = Literal["read", "write", "train", "encode"]


@dataclass(frozen=True)
class Work:
    """Of all tasks of one stage together. `prompts`: texts that a model is given; of a training, its examples."""

    stage: str
    tasks: int
    contexts: int = 0
    prompts: int = 0
    tokens: dict[Kind, float] = field(default_factory=dict)

    @property
    def tokens_in(self) -> float:
        return sum(count for kind, count in self.tokens.items() if kind != "write")

    @property
    def tokens_out(self) -> float:
        return self.tokens.get("write", 0.0)


def sampled_sizes(config: RunConfig, sizes: Sizes) -> tuple[Splits, Splits]:
    """Contexts and examples by split, under the config's `contexts.max_…`.

    `sizes` are of rolling contexts. Snapshots are fewer, with more examples each: without a cap, an upper bound.
    """
    settings = config.contexts
    contexts, examples = {}, {}
    for split in ("train", "valid", "test"):
        whole: int = getattr(sizes.contexts, split)
        rows: int = getattr(sizes.examples, split)
        kept = min(whole, getattr(settings, f"max_{split}_contexts") or whole)
        own = math.ceil(rows * kept / whole) if settings.kind == "rolling" else rows
        contexts[split], examples[split] = kept, min(own, kept * (settings.max_examples_per_context or own))
    return Splits(**contexts), Splits(**examples)


def of_run(config: RunConfig, sizes: Sizes, lengths: Lengths) -> list[Work]:
    """The stages of the pipeline `trackrec` that read or write texts, in the order they run."""
    contexts, examples = sampled_sizes(config, sizes)
    return [
        *_distillation(config, contexts, lengths),
        *_loop(config, contexts, examples, lengths),
        *_encoding(config, contexts, lengths),
    ]


def distilled(config: RunConfig, contexts: Splits) -> int:
    """How many RecCoTs the teacher writes."""
    if not config.loop.distillation or config.distill_data is None:
        return 0
    return max(1, round(config.distill_data.share * contexts.train))


def _distillation(config: RunConfig, contexts: Splits, lengths: Lengths) -> Iterator[Work]:
    if count := distilled(config, contexts):
        tokens: dict[Kind, float] = {"read": count * lengths.prompt, "write": count * lengths.recot}
        yield Work("distill_data", 1, count, count, tokens)
        trained = count * (lengths.prompt + lengths.recot)
        yield Work("sft_generator", 1, count, count, {"train": trained * config.sft_generator.epochs})


def _loop(config: RunConfig, contexts: Splits, examples: Splits, lengths: Lengths) -> Iterator[Work]:
    turns, controls = config.loop.iterations, config.loop.controls
    judged = lengths.history + lengths.target  # V's prompt up to where a RecCoT begins
    if turns:
        n = config.sample.n
        drawn = min(contexts.train, config.sample.max_contexts or contexts.train)
        asked = math.ceil(examples.train * drawn / contexts.train)
        yield Work(
            "sample",
            turns,
            turns * drawn,
            turns * drawn * n,
            {"read": turns * drawn * lengths.prompt, "write": turns * drawn * n * lengths.recot},
        )
        # One (context, item) is read once for its N RecCoTs.
        scored = asked * (judged + n * (lengths.recot + lengths.closing))
        yield Work("score", turns, turns * drawn, turns * asked * n, {"read": turns * scored})
        # Of every sampled context, which is the most there can be; the reference's pass comes before the training.
        sets = drawn - math.floor(drawn * config.sdpo.holdout)
        row = lengths.prompt + n * lengths.recot
        trained = sets * row * config.sdpo.epochs
        yield Work("sdpo", turns, turns * drawn, turns * sets, {"train": turns * trained, "read": turns * drawn * row})
    written = turns * contexts.all + (contexts.all if _first_train_texts(config) else contexts.valid + contexts.test)
    untuned = 1 if _untuned_is_written(config) else 0
    written += untuned * contexts.all
    tokens: dict[Kind, float] = {"read": written * lengths.prompt, "write": written * lengths.recot}
    yield Work("generate", turns + 1 + untuned, written, written, tokens)
    if turns:
        again = (turns if config.loop.validator_init == "previous" else 1) if controls else 0
        own = min(examples.train, config.rec_tune.max_examples or examples.train)
        with_text = turns * own * (judged + lengths.recot + lengths.closing)
        without = again * own * (lengths.history + lengths.target_without_recot)
        yield Work(
            "rec_tune",
            turns + again,
            (turns + again) * contexts.train,
            (turns + again) * own,
            {"train": (with_text + without) * config.rec_tune.epochs},
        )
    texts = turns + 1 + (1 if controls else 0)
    bare = (2 if turns else 1) if controls else 0
    held, rows = getattr(contexts, config.evaluate.split), getattr(examples, config.evaluate.split)
    # A context's history is read once for all its examples.
    read = (
        texts * rows * (lengths.target + lengths.recot + lengths.closing) + bare * rows * lengths.target_without_recot
    )
    read += (texts + bare) * held * lengths.history
    yield Work("evaluate", texts + bare, (texts + bare) * held, (texts + bare) * rows, {"read": read})


def _encoding(config: RunConfig, contexts: Splits, lengths: Lengths) -> Iterator[Work]:
    ranking = config.ranking
    if ranking is None:
        return
    turns = config.loop.iterations if ranking.by_iteration_of else 0
    histories = 1 if ranking.controls_of else 0
    texts = (turns + 1) * contexts.all
    tokens = texts * lengths.recot + histories * contexts.all * lengths.history
    tasks = turns + 1 + histories
    yield Work("encode", tasks, tasks * contexts.all, tasks * contexts.all, {"encode": tokens})


def rankers(config: RunConfig) -> int:
    """The tasks of `train_ctr`: each backbone without RecCoTs once, with each iteration's, and the controls."""
    ranking = config.ranking
    if ranking is None:
        return 0
    with_texts = config.loop.iterations * len(ranking.by_iteration_of) + len(ranking.backbones)
    return len(ranking.backbones) + with_texts + 3 * len(ranking.controls_of)


def _first_train_texts(config: RunConfig) -> bool:
    """Whether the first G writes the train split's texts (`pipelines/loop.py`)."""
    ranking = config.ranking
    read = ranking is not None and (bool(ranking.by_iteration_of) or not config.loop.iterations)
    return read or config.evaluate.split == "train"


def _untuned_is_written(config: RunConfig) -> bool:
    """Whether the base model writes texts of its own for Table 5a (`pipelines/loop.py`)."""
    is_first = not config.loop.distillation and _first_train_texts(config)
    return config.loop.untuned and config.loop.iterations > 0 and not is_first
