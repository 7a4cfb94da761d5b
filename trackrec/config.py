"""Typed settings of a run: one class a stage, read from a YAML file.

The field names of `RunConfig` are the stages' names. `trackrec.config_file` reads it; an unknown key, a wrong type
or an impossible combination is refused with the key's path and what is allowed.
"""

from datetime import UTC, date, datetime
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Split = Literal["train", "valid", "test"]
# An ISO 8601 moment, UTC where it names no zone; YAML reads one without quotes as a date.
Moment = Annotated[str, BeforeValidator(lambda given: given.isoformat() if isinstance(given, date) else given)]
Domain = Literal["movies", "books", "generic"]
# A Kubernetes quantity, e.g. "500m", "8", "32Gi".
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[KMGT]i?)?$")]


class Settings(BaseModel):
    """Base of all sections.

    A field that may be None defaults to None: Kubeflow's parameters carry no null, so None travels as "left out".
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


# --- data -----------------------------------------------------------------------------------------------------------


class ImpressionLog(Settings):
    """How a company's own log maps to our columns (`dataset: impressions`); `None`: the log has no such column."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp: str = "timestamp"
    timestamp_unit: Literal["s", "ms", "us", "iso8601"] = "s"
    label: str | None = None
    rating: str | None = None
    # With no label column, a row is liked when its rating is at least this.
    liked_from: float | None = None
    item_title: str = "title"
    item_attributes: list[str] = []
    # The split by time: rows before `valid_from` train, rows from `test_from` on test (ISO 8601, UTC).
    valid_from: Moment
    test_from: Moment

    @model_validator(mode="after")
    def _has_a_label(self) -> Self:
        if self.label is None and (self.rating is None or self.liked_from is None):
            raise ValueError("give `label`, or both `rating` and `liked_from`")
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
    engine: Literal["duckdb", "spark"] = "duckdb"
    memory_limit: Quantity = "8Gi"
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
    engine: Literal["duckdb", "spark"] = "duckdb"
    memory_limit: Quantity = "8Gi"
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
    # vllm
    max_model_len: Positive | None = None
    gpu_memory_utilization: Share = 0.9
    tensor_parallel_size: Positive = 1


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
    tolerance: Annotated[float, Field(ge=0)] = 1e-6


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
    # The preference accuracy after training is measured on at most so many of the training's preference sets.
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
    path: str = "ml-100k"
    # Fewer recordings than this that fit the train contexts is taken for a mistake.
    min_matches: Positive = 10


class OpenAITeacher(Settings):
    """An OpenAI-compatible endpoint. The key is read from the environment, never from a file or an argument."""

    kind: Literal["openai"] = "openai"
    model: str
    base_url: str = "https://api.openai.com/v1"
    key_env: str = "TEACHER_API_KEY"
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


class LoopSettings(Settings):
    """Algorithm 2."""

    # T; 0 stops after distillation and its evaluation.
    iterations: Count = 3
    distillation: bool = True
    # Where V starts in each iteration: the paper says the previous one, the authors' scripts start from the base.
    validator_init: Literal["previous", "base"] = "previous"
    # Figure 1's controls (no RecCoT: zero-shot and tuned) and RecCoTs shuffled between users.
    controls: bool = True


# --- where it runs ----------------------------------------------------------------------------------------------------


class Accelerator(Settings):
    type: str = "nvidia.com/gpu"
    count: Positive = 1


class Toleration(Settings):
    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    # None tolerates every effect.
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _value_goes_with_equal(self) -> Self:
        if (self.operator == "Equal") != (self.value is not None):
            raise ValueError("`value` goes with `operator: Equal`, and only with it")
        return self


class SecretKey(Settings):
    """One key of a Kubernetes secret, given to the container as an environment variable."""

    secret: str
    key: str
    env: str


class Resources(Settings):
    """What one stage's pod asks for; on one machine only `retries` and `cache` count."""

    cpu: Quantity = "2"
    memory: Quantity = "8Gi"
    # Scratch space at /tmp, on the node's own disk.
    ephemeral_storage: Quantity = "20Gi"
    accelerator: Accelerator | None = None
    node_selector: dict[str, str] = {}
    tolerations: list[Toleration] = []
    # Size of /dev/shm (memory-backed), for NCCL and data loaders.
    shm: Quantity | None = None
    # A PersistentVolumeClaim for checkpoints and finished shards, so that a retried pod resumes.
    work_claim: str | None = None
    secrets: list[SecretKey] = []
    retries: Count = 2
    cache: bool = True


class StageResources(Settings):
    """Resources by stage; a stage left out gets the defaults of `Resources`."""

    ingest: Resources = Resources()
    contexts: Resources = Resources()
    distill_data: Resources = Resources()
    sft_generator: Resources = Resources()
    sample: Resources = Resources()
    score: Resources = Resources()
    preferences: Resources = Resources()
    sdpo: Resources = Resources()
    generate: Resources = Resources()
    rec_tune: Resources = Resources()
    evaluate: Resources = Resources()
    compare: Resources = Resources()


class RunConfig(Settings):
    """A whole run: `pipelines/configs/*.yaml`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=60)]
    seed: Count = 0
    # A local path or a bucket's URI; `package:NAME` is fetched by package name into the local cache first.
    raw_data: str
    base_model: str
    # Where the images lie; a stage's image is REGISTRY/IMAGE:STAGE-HASH.
    registry: str = "trackrec"
    loop: LoopSettings = LoopSettings()
    ingest: IngestSettings
    contexts: ContextsSettings
    distill_data: DistillDataSettings | None = None
    sft_generator: SftSettings = SftSettings()
    sample: SampleSettings = SampleSettings()
    score: ScoreSettings = ScoreSettings()
    preferences: PreferencesSettings = PreferencesSettings()
    sdpo: SdpoSettings = SdpoSettings()
    generate: DecodingSettings = DecodingSettings()
    rec_tune: RecTuneSettings = RecTuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    resources: StageResources = StageResources()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.loop.distillation and self.distill_data is None:
            raise ValueError(
                "`loop.distillation: true` needs `distill_data`; give it, or set `loop.distillation: false`"
            )
        for stage in ("sample", "score", "generate", "evaluate"):
            engine: EngineSettings = getattr(self, stage).engine
            accelerator: Accelerator | None = getattr(self.resources, stage).accelerator
            gpus = accelerator.count if accelerator else 0
            if engine.tensor_parallel_size > max(gpus, 1):
                raise ValueError(
                    f"`{stage}.engine.tensor_parallel_size` is {engine.tensor_parallel_size}, but "
                    f"`resources.{stage}.accelerator.count` gives {gpus} GPUs"
                )
        for stage in ("sft_generator", "sdpo", "rec_tune"):
            training: TrainingSettings = getattr(self, stage)
            accelerator = getattr(self.resources, stage).accelerator
            if training.deepspeed and accelerator is None:
                raise ValueError(f"`{stage}.deepspeed` needs `resources.{stage}.accelerator`")
            if accelerator and training.batch_size % (training.micro_batch_size * accelerator.count):
                raise ValueError(
                    f"`{stage}.batch_size` ({training.batch_size}) must be a multiple of `{stage}.micro_batch_size` "
                    f"({training.micro_batch_size}) × `resources.{stage}.accelerator.count` ({accelerator.count})"
                )
        if self.loop.distillation and self.sdpo.lora is not None and self.sdpo.lora != self.sft_generator.lora:
            raise ValueError("`sdpo.lora` goes on with the adapter of `sft_generator`; give both the same `lora`")
        return self
