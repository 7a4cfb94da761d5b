"""What the plan is computed from: speeds, cards, prices, data sizes and text lengths, each with its unit and source.

`trackrec plan --rates FILE` lays a YAML mapping over these: give what you have measured. Every stage's manifest holds
the `tokens_per_second` of its own run.
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from trackrec.config import Positive, Rate, Settings, Text
from trackrec.config_file import ConfigError, explain, parse
from trackrec.planning.shapes import ModelShape

# What speeds are scaled from: to another model by its parameters, to another card by its arithmetic or its bandwidth.
REFERENCE_CARD = "h100-80gb"
REFERENCE_PARAMETERS = 7.6e9


class Speed(Settings):
    """Of a model of 7.6 billion parameters on one H100 80GB."""

    tokens_per_second: Rate
    source: Text = "--rates"


class Speeds(Settings):
    # New tokens.
    sample_transformers: Speed = Speed(
        tokens_per_second=944, source="measured: README, sampling, 7B, 40 texts at a time"
    )
    sample_vllm: Speed = Speed(
        tokens_per_second=8000, source="assumed, not measured here: bfloat16, some 256 texts at a time"
    )
    # Tokens read, in forward passes: prompts, and the texts that V scores.
    read: Speed = Speed(
        tokens_per_second=26_460, source="measured: README, scoring, 7B, 189 RecCoTs/s × 1,400 tokens for ten of them"
    )
    # Tokens trained on, forward and backward.
    train_lora: Speed = Speed(
        tokens_per_second=6_062, source="measured: README, S-DPO step, 7B, LoRA, 4.33 examples/s × 1,400 tokens"
    )
    train_all_weights: Speed = Speed(
        tokens_per_second=4_041,
        source="derived: the LoRA step's, × 4/6, since the weights' own gradients are two operations a weight more",
    )
    # Of a BERT base.
    encode: Speed = Speed(tokens_per_second=100_000, source="assumed, not measured here")


class Card(Settings):
    memory_gib: Rate
    # Dense bfloat16, and memory bandwidth: the maker's data sheet.
    tflops: Rate
    terabytes_per_second: Rate
    # Assumed; clouds differ by more than twice.
    usd_per_hour: Rate
    # Values of node selectors that stand for it.
    labels: list[Text]


_CARDS = {
    "h100-80gb": Card(
        memory_gib=79.6,
        tflops=989,
        terabytes_per_second=3.35,
        usd_per_hour=4.0,
        labels=["nvidia-h100-80gb", "nvidia-h100-mega-80gb", "NVIDIA-H100-80GB-HBM3"],
    ),
    "h200-141gb": Card(
        memory_gib=140.4,
        tflops=989,
        terabytes_per_second=4.8,
        usd_per_hour=4.5,
        labels=["nvidia-h200-141gb", "NVIDIA-H200"],
    ),
    "a100-80gb": Card(
        memory_gib=79.2,
        tflops=312,
        terabytes_per_second=2.04,
        usd_per_hour=2.5,
        labels=["nvidia-a100-80gb", "NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe"],
    ),
    "a100-40gb": Card(
        memory_gib=39.4,
        tflops=312,
        terabytes_per_second=1.56,
        usd_per_hour=1.8,
        labels=["nvidia-tesla-a100", "NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB"],
    ),
    "l4-24gb": Card(
        memory_gib=22.5, tflops=121, terabytes_per_second=0.3, usd_per_hour=0.7, labels=["nvidia-l4", "NVIDIA-L4"]
    ),
}


class Splits(Settings):
    train: Positive
    valid: Positive
    test: Positive

    @property
    def all(self) -> int:
        return self.train + self.valid + self.test


class Sizes(Settings):
    """Of a dataset as `ingest` and `contexts` (rolling) make it."""

    raw_rows: Positive
    contexts: Splits
    examples: Splits
    source: Text = "--rates"


_DATASETS = {
    "ml-100k": Sizes(
        raw_rows=100_000,
        contexts=Splits(train=78_608, valid=9_765, test=9_850),
        examples=Splits(train=80_000, valid=10_000, test=10_000),
        source="counted",
    ),
    "ml-1m": Sizes(
        raw_rows=1_000_209,
        contexts=Splits(train=32_975, valid=10_322, test=7_278),
        examples=Splits(train=33_891, valid=10_401, test=7_331),
        source="counted",
    ),
    "amazon-book": Sizes(
        raw_rows=27_163_817,
        contexts=Splits(train=727_463, valid=25_747, test=25_747),
        examples=Splits(train=727_463, valid=25_747, test=25_747),
        source="the recipe's rows; one context each, which is the most there can be",
    ),
}


class Lengths(Settings):
    """Mean tokens of what models read and write, the chat template's included."""

    # G's prompt.
    prompt: Rate = 235
    # V's prompt: up to the target item, from there up to the RecCoT, and from the RecCoT's end up to the answer.
    history: Rate = 231
    target: Rate = 50
    closing: Rate = 19
    # ... and from the target item to the answer where there is no RecCoT.
    target_without_recot: Rate = 37
    # Within the 200 words that the prompt asks for.
    recot: Rate = 250
    source: Text = (
        "prompts: 3,000 of MovieLens-1M with ten earlier items, by SmolLM2's tokenizer; RecCoTs: assumed, 200 words"
    )


class Rates(Settings):
    speeds: Speeds = Speeds()
    cards: dict[str, Card] = Field(default_factory=lambda: dict(_CARDS))
    datasets: dict[str, Sizes] = Field(default_factory=lambda: dict(_DATASETS))
    lengths: Lengths = Lengths()
    # The base model's shape, where it cannot be read from its config.json and its name is not a known one.
    model: ModelShape | None = None
    # A token's speed under ZeRO against one GPU's: what the exchange between GPUs leaves. Assumed.
    zero_efficiency: Rate = 0.85
    # From a pod's start to its first token: image, node, weights. Assumed.
    start_seconds: Rate = 300
    # ingest: 27 million rows in 41 s on two cores (README).
    ingest_rows_per_second: Rate = 660_000
    # train_ctr: one DIN on two cores (README), the slower of the two measured.
    ctr_rows_per_second: Rate = 121_000
    # Epochs until the valid AUC stops rising. Assumed.
    ctr_epochs: Rate = 5
    # Assumed.
    usd_per_core_hour: Rate = 0.04
    # What a nightly job for all active users has.
    window_hours: Rate = 8
    # Numbers of a vector that `encode` writes.
    vector_width: Positive = 768

    def card_of(self, selector: dict[str, str]) -> str | None:
        """The card that a pod's node selector names, by any of its values."""
        return next((name for name, card in self.cards.items() if set(card.labels) & set(selector.values())), None)


def read(path: Path | None) -> Rates:
    """The rates above, with the YAML mapping in `path` laid over them.

    Raises:
        ConfigError: it cannot be read, or has an unknown key or a wrong value; says which.
    """
    if path is None:
        return Rates()
    try:
        given = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: expected a mapping of rates, got {type(given).__name__}")
    # A speed that is given has another source than the one it takes the place of.
    for speed in (given.get("speeds") or {}).values():
        if isinstance(speed, dict):
            speed.setdefault("source", str(path))
    try:
        return Rates.model_validate(_over(Rates().model_dump(exclude_none=True), given), strict=True)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n{explain(error, Rates)}") from error


def _over(known: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    merged = dict(known)
    for key, value in given.items():
        below = known.get(key)
        merged[key] = _over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
