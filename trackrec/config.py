"""Typed settings of the stages, one class each; `trackrec.run_config` puts them together.

A stage reads its section from Kubeflow's parameters, where every number is a float: so a file is read strictly
(`trackrec.config_file`), and the classes themselves are lax.
"""

from datetime import UTC, date, datetime
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Split = Literal["train", "valid", "test"]
# The stages that train with torch's launcher, on all GPUs of a pod or on several nodes.
Trained = Literal["sft_generator", "sdpo", "rec_tune"]


def unquoted(given: object) -> object:
    """YAML reads a date, or a number, where no quotes say that it is text."""
    if isinstance(given, date):
        return given.isoformat()
    return str(given) if isinstance(given, int | float) and not isinstance(given, bool) else given


def _is_moment(text: str) -> str:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"give a moment as ISO 8601 has it, such as 2025-05-01 (got {text!r})") from None
    return text


# An ISO 8601 moment, UTC where it names no zone.
Moment = Annotated[str, BeforeValidator(unquoted), AfterValidator(_is_moment)]
# Any text that a new content of something gives a new value.
Version = Annotated[str, BeforeValidator(unquoted)]
Domain = Literal["movies", "books", "generic"]
# A Kubernetes quantity of bytes, e.g. "32Gi" (Kubeflow takes whole numbers only).
Memory = Annotated[str, BeforeValidator(unquoted), Field(pattern=r"^[1-9][0-9]*(Ki|[MGT]i?)?$")]


class Settings(BaseModel):
    """Base of all sections.

    A field that may be None defaults to None: Kubeflow's parameters carry no null, so None travels as "left out".
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


# --- data -----------------------------------------------------------------------------------------------------------


class ImpressionLog(Settings):
    """How a company's own log maps to our columns (`dataset: impressions`); `None`: the log has no such column."""

    user_id: Text = "user_id"
    item_id: Text = "item_id"
    timestamp: Text = "timestamp"
    timestamp_unit: Literal["s", "ms", "us", "iso8601"] = "s"
    label: Text | None = None
    rating: Text | None = None
    # With no label column, a row is liked when its rating is at least this.
    liked_from: float | None = None
    item_title: Text = "title"
    item_attributes: list[Text] = []
    # The split by time: rows before `valid_from` train, rows from `test_from` on test (ISO 8601, UTC).
    valid_from: Moment
    test_from: Moment

    @model_validator(mode="after")
    def _has_one_label(self) -> Self:
        if self.label is None and (self.rating is None or self.liked_from is None):
            raise ValueError("give `label`, or both `rating` and `liked_from`")
        if self.label is not None and self.liked_from is not None:
            raise ValueError("`label` and `liked_from` both say which rows are liked; give one of them")
        return self

    @model_validator(mode="after")
    def _splits_follow_in_time(self) -> Self:
        moments = [datetime.fromisoformat(text) for text in (self.valid_from, self.test_from)]
        valid, test = (moment if moment.tzinfo else moment.replace(tzinfo=UTC) for moment in moments)
        if valid >= test:
            raise ValueError(f"`valid_from` ({self.valid_from}) must lie before `test_from` ({self.test_from})")
        return self


class IngestSettings(Settings):
    """Raw files to interactions and items (paper 4.1.1; CoLLM's recipes)."""

    dataset: Literal["ml-100k", "ml-1m", "amazon-book", "impressions"]
    # The longest history a row carries (the newest items); whole ones grow with the square of a user's rows.
    max_history: Positive = 1000
    log: ImpressionLog | None = None

    @model_validator(mode="after")
    def _log_goes_with_impressions(self) -> Self:
        if (self.log is not None) != (self.dataset == "impressions"):
            raise ValueError("`log` goes with `dataset: impressions`, and only with it")
        return self


class ContextsSettings(Settings):
    """Histories to contexts, one for each distinct history as rendered, and the examples that use them."""

    domain: Domain
    # rolling: the history up to each interaction. snapshot: one a user every `snapshot_days`, as a daily job has it.
    kind: Literal["rolling", "snapshot"] = "rolling"
    snapshot_days: Positive = 1
    # The last so many earlier items; examples with fewer than `min_history` are dropped and counted.
    history_length: Positive = 10
    min_history: Count = 0
    # Sub-samples for small runs, drawn by a hash of the context and the seed; None keeps all.
    max_train_contexts: Positive | None = None
    max_valid_contexts: Positive | None = None
    max_test_contexts: Positive | None = None
    max_examples_per_context: Positive | None = None
    # Prior strength (rows) of the item-mean baseline.
    item_mean_prior: Rate = 5.0

    @model_validator(mode="after")
    def _history_can_be_long_enough(self) -> Self:
        if self.min_history > self.history_length:
            raise ValueError(
                f"`min_history` ({self.min_history}) is more than `history_length` ({self.history_length}): "
                "every example would be dropped"
            )
        return self


# --- engines ----------------------------------------------------------------------------------------------------------


class EngineSettings(Settings):
    """How a model is run for sampling and scoring."""

    kind: Literal["transformers", "vllm"] = "transformers"
    # auto: bfloat16 on a GPU, float32 on a CPU (where it is the faster one).
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # transformers: the most tokens, padding included, in one batch (a forward pass's memory follows from it).
    batch_tokens: Positive = 16384
    # vllm. No prompt fits into fewer than 64 tokens.
    max_model_len: Annotated[int, Field(ge=64)] | None = None
    gpu_memory_utilization: Share = 0.9
    tensor_parallel_size: Positive = 1

    @model_validator(mode="after")
    def _vllm_settings_go_with_vllm(self) -> Self:
        for name in ("max_model_len", "gpu_memory_utilization", "tensor_parallel_size"):
            # One that equals its default may be there: a run's settings are written out whole, and read again.
            if self.kind != "vllm" and getattr(self, name) != EngineSettings.model_fields[name].default:
                raise ValueError(f"`{name}` is vLLM's; leave it out, or set `kind: vllm`")
        return self


class DecodingSettings(Settings):
    """Greedy decoding of RecCoTs."""

    max_tokens: Positive = 512
    repetition_penalty: Rate = 1.05
    engine: EngineSettings = EngineSettings()


class SampleSettings(Settings):
    """Algorithm 1's sampling: `n` RecCoTs a train context at temperature `t` and `top_p` (paper 4.1.4)."""

    n: Annotated[int, Field(ge=2)] = 10
    temperature: Rate = 1.0
    top_p: Share = 0.9
    max_tokens: Positive = 512
    # How many train contexts one iteration samples (drawn anew each iteration); None samples all.
    max_contexts: Positive | None = None
    engine: EngineSettings = EngineSettings()


class ScoreSettings(Settings):
    """The validator's P(Yes) and P(No), and the reward (eq. 1)."""

    engine: EngineSettings = EngineSettings()


class PreferencesSettings(Settings):
    """Preference sets (eq. 2)."""

    # A context whose rewards all lie within this of one another says nothing: dropped, and counted.
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 1e-6


# --- training ---------------------------------------------------------------------------------------------------------


class LoraSettings(Settings):
    r: Positive = 16
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"


class TrainingSettings(Settings):
    """What all trainers share. Without `lora` all weights are trained, as the paper does."""

    learning_rate: Rate = 1e-5
    epochs: Rate = 1.0
    # Examples an optimiser step over all GPUs, and examples a forward pass on one; the rest is accumulation.
    batch_size: Positive = 16
    micro_batch_size: Positive = 1
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Rate = 1.0
    # Prompts and RecCoTs longer than this are refused, never silently cut.
    max_length: Positive = 4096
    lora: LoraSettings | None = None
    # auto: bfloat16 on a GPU, float32 on a CPU.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    deepspeed: Literal["zero2", "zero3"] | None = None
    # Optimiser steps between checkpoints; a killed training goes on from the last one.
    checkpoint_steps: Positive = 100

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"`batch_size` ({self.batch_size}) must be a multiple of `micro_batch_size` ({self.micro_batch_size})"
            )
        return self


class SftSettings(TrainingSettings):
    """Distillation: supervised fine-tuning of G on the teacher's RecCoTs (paper 3.5)."""


class SdpoSettings(TrainingSettings):
    """Softmax-DPO of G (eq. 3-4)."""

    beta: Rate = 0.1
    # This share of the preference sets is not trained on: the preference accuracy is measured on it.
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    # ... on at most so many of the held-out sets.
    measured_sets: Positive = 512


class RecTuneSettings(TrainingSettings):
    """Rec-tuning of V (eq. 5-6)."""

    epochs: Rate = 3.0
    # How many train examples one iteration tunes on (drawn anew each iteration); None takes all.
    max_examples: Positive | None = None


# --- distillation -----------------------------------------------------------------------------------------------------


class RecordedTeacher(Settings):
    """RecCoTs from a file. `ml-100k` names the ones that ship with the project."""

    kind: Literal["recorded"] = "recorded"
    path: Text = "ml-100k"
    # Fewer recordings than this that fit the train contexts is taken for a mistake.
    min_matches: Positive = 10


class OpenAITeacher(Settings):
    """An OpenAI-compatible endpoint. The key is read from the environment, never from a file or an argument."""

    kind: Literal["openai"] = "openai"
    model: Text
    base_url: Text = "https://api.openai.com/v1"
    key_env: Text = "TEACHER_API_KEY"
    temperature: Annotated[float, Field(ge=0)] = 0.7
    max_tokens: Positive = 512
    requests_per_minute: Positive = 300
    concurrency: Positive = 16
    timeout_s: Rate = 120
    retries: Count = 6
    # The most this stage may spend; prices in US dollars a million tokens. It stops before passing the cap.
    max_cost_usd: Rate
    prompt_usd_per_million: Annotated[float, Field(ge=0)]
    completion_usd_per_million: Annotated[float, Field(ge=0)]


class DistillDataSettings(Settings):
    """Teacher RecCoTs for a sampled share of the train contexts (paper 3.5: about 5 %)."""

    share: Share = 0.05
    teacher: Annotated[RecordedTeacher | OpenAITeacher, Field(discriminator="kind")]


# --- evaluation -------------------------------------------------------------------------------------------------------


class EvaluateSettings(Settings):
    """Metrics of V on held-out examples (paper 4.1.5, plus UAUC and calibration)."""

    split: Split = "test"
    # Warm: user and item both have more than this many train rows (CoLLM's rule).
    warm_rows: Count = 3
    # Long tail: the user or the item has at most this many train rows.
    long_tail_rows: Count = 10
    calibration_bins: Positive = 10
    engine: EngineSettings = EngineSettings()


# --- ranking ----------------------------------------------------------------------------------------------------------

Backbone = Literal["autoint", "deepfm", "fignn", "fibinet", "dcn", "din", "dien"]


class EncodeSettings(Settings):
    """RecCoTs to vectors, by a BERT-family encoder (paper 3.6, eq. 7)."""

    # The mean over the tokens' states, or the first token's.
    pooling: Literal["mean", "cls"] = "mean"
    # auto: bfloat16 on a GPU, float32 on a CPU.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # The most tokens, padding included, in one batch; a GPU takes more at once, a CPU is slower with more.
    batch_tokens: Positive = 2048


class CtrGrid(Settings):
    """The hyper-parameters that are searched: every combination, chosen by valid AUC."""

    embedding_size: Annotated[list[Positive], Field(min_length=1)] = [16]
    batch_size: Annotated[list[Positive], Field(min_length=1)] = [256]
    learning_rate: Annotated[list[Rate], Field(min_length=1)] = [1e-3, 3e-3]
    dropout: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=1)] = [0.0, 0.2]
    l2: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = [0.0, 1e-5]


class TrainCtrSettings(Settings):
    """A backbone with or without the RecCoT feature (paper 3.6, eq. 8): the grid on valid, then several seeds."""

    # The encoder's width: 768 for BERT base. A vector table of another is refused.
    vector_width: Positive = 768
    grid: CtrGrid = CtrGrid()
    # The deep network's layers; the last size is also that of AutoInt's heads together and of FiGNN's node states.
    hidden: Annotated[list[Positive], Field(min_length=1)] = [64, 32]
    # The last so many earlier items.
    history_length: Positive = 10
    # Trains on the newest so many train rows, for small runs; None takes all.
    max_train_rows: Positive | None = None
    # A user or an item with fewer train rows shares one embedding with all such.
    min_rows: Positive = 2
    epochs: Positive = 20
    # Stops when the valid AUC has not risen for so many epochs, and goes back to the best one.
    patience: Positive = 2
    # ... which counts from this optimiser step on: near its first weights a model may stand still.
    min_steps: Count = 300
    # Models of the chosen point, each under its own seed; a paired test needs two, five make it worth something.
    seeds: Annotated[int, Field(ge=2)] = 5
    # The slices of the test split, as `evaluate` has them.
    warm_rows: Count = 3
    long_tail_rows: Count = 10
    calibration_bins: Positive = 10

    @model_validator(mode="after")
    def _heads_divide_the_last_layer(self) -> Self:
        if self.hidden[-1] % 2:
            raise ValueError(f"the last of `hidden` ({self.hidden[-1]}) must be even: two attention heads share it")
        return self
