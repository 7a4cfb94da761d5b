"""GPU hours, cost, memory and disk of each stage: its work (`work.py`) at the rates' speeds on its pod's card."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trackrec.config import EngineSettings, TrainingSettings
from trackrec.config_file import ConfigError
from trackrec.planning import memory, work
from trackrec.planning.rates import REFERENCE_CARD, REFERENCE_PARAMETERS, Rates, Sizes
from trackrec.planning.shapes import ModelShape, known
from trackrec.planning.work import Work
from trackrec.quantity import cores, to_bytes
from trackrec.run_config import Resources, RunConfig, ShardedResources

# A BERT base, for the encoder's memory.
_ENCODER_BYTES = 110e6 * 4


@dataclass(frozen=True)
class Estimate:
    """Of all tasks of one stage together; hours are None where no speed is known for the pod (a stage on a CPU).

    `gpus` are of one of the `pods` (shards, or nodes) that work on one task at a time. `gpu_bytes` is what each GPU
    needs and `room_bytes` what the card gives (None: no known card). `disk_bytes` is of one pod: the inputs that
    Kubeflow copies into it and the `written_bytes`. `work_bytes` lie in the work directory.
    """

    work: Work
    gpus: int = 0
    pods: int = 1
    card: str | None = None
    tokens_per_second: float | None = None
    wall_hours: float | None = None
    usd: float | None = None
    gpu_bytes: float | None = None
    room_bytes: float | None = None
    disk_bytes: float | None = None
    written_bytes: float = 0.0
    work_bytes: float = 0.0

    @property
    def gpu_hours(self) -> float | None:
        return self.wall_hours * self.gpus * self.pods if self.wall_hours is not None and self.gpus else None


def shape_of(config: RunConfig, rates: Rates) -> ModelShape:
    """The base model's shape: the rates', or a known one by the model's address.

    Raises:
        ConfigError: neither is there.
    """
    shape = rates.model or known(config.base_model)
    if shape is None:
        raise ConfigError(
            f"the shape of {config.base_model} is not known; give its numbers under `model` in a file for --rates"
        )
    return shape


def sizes_of(config: RunConfig, rates: Rates) -> Sizes:
    """The dataset's counts.

    Raises:
        ConfigError: the rates have none.
    """
    sizes = rates.datasets.get(config.ingest.dataset)
    if sizes is None:
        raise ConfigError(
            f"the size of `ingest.dataset: {config.ingest.dataset}` is not known; give `raw_rows`, `contexts` and "
            f"`examples` under `datasets.{config.ingest.dataset}` in a file for --rates"
        )
    return sizes


def of_run(config: RunConfig, rates: Rates, shape: ModelShape, sizes: Sizes) -> list[Estimate]:
    """Every stage that takes more than minutes, in the order they run."""
    found = [_ingest(config, rates, sizes)]
    for stage in work.of_run(config, sizes, rates.lengths):
        found.append(_teacher(config, stage) if stage.stage == "distill_data" else _gpu(config, rates, shape, stage))
    if work.rankers(config):
        found.append(_ranking(config, rates, sizes))
    return found


def nightly(config: RunConfig, rates: Rates, shape: ModelShape, users: int) -> list[Estimate]:
    """The production job: one greedy RecCoT and one vector for each of `users` active users."""
    lengths = rates.lengths
    texts: dict[work.Kind, float] = {"read": users * lengths.prompt, "write": users * lengths.recot}
    stages = [
        Work("generate", 1, users, users, texts),
        Work("encode", 1, users, users, {"encode": users * lengths.recot}),
    ]
    return [_gpu(config, rates, shape, stage) for stage in stages]


def speed(rates: Rates, shape: ModelShape, card: str, kind: str, settings: object) -> float:
    """Tokens a second on one GPU of `card`.

    Scaled from the reference: by the model's parameters; by memory bandwidth where tokens are written, else by
    arithmetic. Gradient checkpointing runs the forward pass twice.

    Args:
        kind: of `work.Kind`.
        settings: the stage's engine or training.
    """
    base, here = rates.cards[REFERENCE_CARD], rates.cards[card]
    if kind == "encode":
        return rates.speeds.encode.tokens_per_second * here.tflops / base.tflops
    smaller = REFERENCE_PARAMETERS / shape.parameters
    if kind == "write":
        assert isinstance(settings, EngineSettings)
        of_engine = rates.speeds.sample_vllm if settings.kind == "vllm" else rates.speeds.sample_transformers
        ratio = here.terabytes_per_second / base.terabytes_per_second
        return of_engine.tokens_per_second * smaller * ratio * settings.tensor_parallel_size
    ratio = smaller * here.tflops / base.tflops
    if kind == "read":
        parallel = settings.tensor_parallel_size if isinstance(settings, EngineSettings) else 1
        return rates.speeds.read.tokens_per_second * ratio * parallel
    assert isinstance(settings, TrainingSettings)
    of_training = rates.speeds.train_all_weights if settings.lora is None else rates.speeds.train_lora
    # Operations a weight and token: forward 2, backward 4, or 2 where the weights themselves are frozen.
    operations = 6 if settings.lora is None else 4
    if settings.gradient_checkpointing:
        ratio *= operations / (operations + 2)
    return of_training.tokens_per_second * ratio


def _gpu(config: RunConfig, rates: Rates, shape: ModelShape, stage: Work) -> Estimate:
    resources: Resources = getattr(config.resources, stage.stage)
    gpus = resources.accelerator.count if resources.accelerator else 0
    shards = resources.shards if isinstance(resources, ShardedResources) else 1
    pods = shards * resources.nodes
    card = rates.card_of(resources.node_selector) if gpus else None
    section = getattr(config, stage.stage)
    settings = section.engine if hasattr(section, "engine") else section
    read, written, kept = _bytes(config, rates, shape, stage, shards)
    needed = _gpu_bytes(config, rates, shape, stage.stage, gpus * resources.nodes) if gpus else None
    if card is None:
        return Estimate(
            stage, gpus, pods, gpu_bytes=needed, disk_bytes=read + written, written_bytes=written, work_bytes=kept
        )
    speeds = {kind: speed(rates, shape, card, kind, settings) for kind in stage.tokens}
    # A training uses all GPUs of its pods; all else uses one of each pod, or its tensor-parallel group.
    parallel: float = pods
    if isinstance(settings, TrainingSettings):
        parallel = gpus * pods * (rates.zero_efficiency if settings.deepspeed and gpus * pods > 1 else 1)
    seconds = sum(count / speeds[kind] for kind, count in stage.tokens.items()) / parallel
    wall = (seconds + stage.tasks * rates.start_seconds) / 3600
    room = rates.cards[card].memory_gib * memory.GIB
    if isinstance(settings, EngineSettings) and settings.kind == "vllm":
        room *= settings.gpu_memory_utilization
    main = max(stage.tokens, key=lambda kind: stage.tokens[kind] / speeds[kind])
    return Estimate(
        stage,
        gpus,
        pods,
        card,
        tokens_per_second=speeds[main],
        wall_hours=wall,
        usd=wall * gpus * pods * rates.cards[card].usd_per_hour,
        gpu_bytes=needed,
        room_bytes=room,
        disk_bytes=read + written,
        written_bytes=written,
        work_bytes=kept,
    )


def _gpu_bytes(config: RunConfig, rates: Rates, shape: ModelShape, stage: str, gpus: int) -> float:
    """At the longest rows: every RecCoT at its token limit."""
    lengths, section = rates.lengths, getattr(config, stage)
    judged = lengths.history + lengths.target + lengths.closing + config.generate.max_tokens
    if stage == "encode":
        return _ENCODER_BYTES + config.encode.batch_tokens * 40 * rates.vector_width + memory.CONTEXT
    if isinstance(section, TrainingSettings):
        teacher = getattr(config.distill_data and config.distill_data.teacher, "max_tokens", lengths.recot)
        rows = {
            "sft_generator": lengths.prompt + teacher,
            "sdpo": lengths.prompt + config.sample.n * config.sample.max_tokens,
            "rec_tune": judged,
        }
        return memory.training(shape, section, gpus, rows[stage]) + memory.CONTEXT
    written = {"sample": config.sample.max_tokens, "generate": config.generate.max_tokens}
    longest = lengths.prompt + written[stage] if stage in written else judged
    return memory.decoding(shape, section.engine, longest) + memory.CONTEXT


def _bytes(config: RunConfig, rates: Rates, shape: ModelShape, stage: Work, shards: int) -> tuple[float, float, float]:
    """Of one pod, with one of the `shards` of a task's texts: its inputs, what it writes, and the work directory."""
    parts = stage.tasks * shards
    texts = stage.tokens_out * memory.TEXT_BYTES / parts
    if stage.stage == "encode":
        vectors = stage.contexts / parts * rates.vector_width * 4
        read = stage.contexts / parts * rates.lengths.recot * memory.TEXT_BYTES
        return _ENCODER_BYTES + read, vectors, 0.0
    base = memory.model_file(shape, None)
    # The generator is what sft_generator or sdpo wrote, the validator what rec_tune wrote.
    is_validators = stage.stage in ("score", "evaluate", "rec_tune")
    other = memory.model_file(shape, config.rec_tune if is_validators else config.sdpo)
    section = getattr(config, stage.stage)
    if isinstance(section, TrainingSettings):
        start = 0.0 if stage.stage == "sft_generator" else other
        return base + start, memory.model_file(shape, section), memory.checkpoints(shape, section)
    if stage.stage in ("score", "evaluate"):
        read = stage.prompts / parts * rates.lengths.recot * memory.TEXT_BYTES
        return base + other + read, 0.0, 0.0  # numbers alone
    # The journal of what is finished is as large as the table.
    return base + other, texts, texts


def _ingest(config: RunConfig, rates: Rates, sizes: Sizes) -> Estimate:
    wall = sizes.raw_rows / rates.ingest_rows_per_second / 3600
    return _on_cpu(rates, config.resources.ingest, Work("ingest", 1), wall)


def _teacher(config: RunConfig, stage: Work) -> Estimate:
    teacher = config.distill_data.teacher if config.distill_data else None
    if teacher is None or teacher.kind == "recorded":
        return Estimate(Work("distill_data", stage.tasks, stage.contexts, stage.prompts))
    read, written = (
        stage.tokens_in * teacher.prompt_usd_per_million,
        stage.tokens_out * teacher.completion_usd_per_million,
    )
    return Estimate(stage, wall_hours=stage.prompts / teacher.requests_per_minute / 60, usd=(read + written) / 1e6)


def _ranking(config: RunConfig, rates: Rates, sizes: Sizes) -> Estimate:
    settings, grid = config.train_ctr, config.train_ctr.grid
    points = math.prod(len(getattr(grid, name)) for name in type(grid).model_fields)
    rows = min(sizes.examples.train, settings.max_train_rows or sizes.examples.train)
    trained = rows * min(rates.ctr_epochs, settings.epochs) * (points + settings.seeds)
    tasks = work.rankers(config)
    wall = tasks * trained / rates.ctr_rows_per_second / 3600
    return _on_cpu(rates, config.resources.train_ctr, Work("train_ctr", tasks), wall)


def _on_cpu(rates: Rates, resources: Resources, stage: Work, wall: float) -> Estimate:
    return Estimate(stage, wall_hours=wall, usd=wall * cores(resources.cpu) * rates.usd_per_core_hour)


def faults(config: RunConfig, estimates: list[Estimate]) -> Iterator[str]:
    """A line for each stage that does not fit what its pod asks for: GPU memory, and scratch space for checkpoints."""
    for one in estimates:
        stage = one.work.stage
        if one.gpu_bytes is not None and one.room_bytes is not None and one.gpu_bytes > one.room_bytes:
            yield (
                f"{stage} needs {one.gpu_bytes / memory.GIB:.0f} GiB on each GPU and {one.card} gives "
                f"{one.room_bytes / memory.GIB:.0f}: {_remedy(config, stage)}"
            )
        resources: Resources = getattr(config.resources, stage)
        if not resources.work_claim and one.work_bytes > to_bytes(resources.ephemeral_storage):
            yield (
                f"{stage} keeps {one.work_bytes / memory.GIB:.0f} GiB in its work directory and "
                f"`resources.{stage}.ephemeral_storage` is {resources.ephemeral_storage}: raise it, or set "
                f"`resources.{stage}.work_claim`"
            )


def _remedy(config: RunConfig, stage: str) -> str:
    section = getattr(config, stage)
    if isinstance(section, TrainingSettings):
        return (
            f"lower `{stage}.micro_batch_size`, set `{stage}.gradient_checkpointing: true`, `deepspeed: zero3` or "
            f"`lora`, or raise `resources.{stage}.accelerator.count`"
        )
    if stage == "encode":
        return "lower `encode.batch_tokens`"
    if section.engine.kind == "vllm":
        return f"lower `{stage}.engine.max_model_len`, or raise `{stage}.engine.tensor_parallel_size`"
    return f"lower `{stage}.engine.batch_tokens`"
