"""Bytes that a stage's pod needs: on each GPU, on the node's disk, and for checkpoints.

The activations' formulas are checked against the peaks that the README's benchmarks measured
(`tests/planning/test_memory.py`).
"""

from trackrec.config import EngineSettings, TrainingSettings
from trackrec.planning.shapes import ModelShape

GIB = 2**30
# AdamW's two moments and the float32 weights it steps.
_OPTIMISER = 12
# What CUDA, NCCL and the allocator's gaps take beside the tensors. Assumed.
CONTEXT = 2 * GIB
# Positions whose logits are held at a time (`trackrec.llm.logprobs.CHUNK`), their gradients and softmax beside them.
_HEAD_POSITIONS, _HEAD_COPIES = 512, 3
# `save_total_limit` is 2, and the oldest goes once the newest is written.
_CHECKPOINTS = 3
# Of text in a table or a journal.
TEXT_BYTES = 5


def element(dtype: str) -> int:
    """Bytes of a number on a GPU, where `auto` is bfloat16."""
    return 4 if dtype == "float32" else 2


def training(shape: ModelShape, settings: TrainingSettings, gpus: int, row_tokens: float) -> float:
    """Bytes on each GPU at the peak of a training step.

    Weights, gradients and optimiser under no, stage-2 or stage-3 ZeRO, all weights or LoRA; activations of a
    micro-batch of rows of `row_tokens` tokens, with or without gradient checkpointing; the head's logits.
    """
    weights = shape.parameters
    width = element(settings.dtype)
    trained = weights if settings.lora is None else shape.adapter(settings.lora)
    shards = gpus if settings.deepspeed else 1
    if settings.lora is not None:
        # float32 adapter and its gradients, on frozen weights.
        static = weights * width / (gpus if settings.deepspeed == "zero3" else 1) + trained * (4 + _OPTIMISER) / shards
    elif settings.deepspeed == "zero3":
        static = weights * (2 * width + _OPTIMISER) / gpus
    elif settings.deepspeed == "zero2":
        static = weights * width + weights * (width + _OPTIMISER) / gpus
    else:
        # float32 weights are the optimiser's own; their bfloat16 copies stay until the forward pass ends.
        static = weights * (4 + _OPTIMISER + width)
    if settings.deepspeed == "zero3":
        # Gathered while they are used: the embedding or the head, and a layer with the next one.
        static += width * (shape.embedding + 2 * shape.layer)
    tokens = settings.micro_batch_size * row_tokens
    layer = shape.activation_bytes + (shape.adapter_activation_bytes if settings.lora is not None else 0)
    if settings.gradient_checkpointing:
        activations = tokens * (shape.layers * 2 * shape.hidden + layer)
    else:
        activations = tokens * shape.layers * layer
    return static + activations + _HEAD_POSITIONS * shape.vocabulary * 4 * _HEAD_COPIES


def decoding(shape: ModelShape, settings: EngineSettings, longest: float) -> float:
    """Bytes on each GPU for sampling or scoring.

    transformers: weights, keys and values of a batch, and one layer's work on it. vLLM: weights, keys and values of
    one text of `max_model_len` (`longest` where it is not set); what is left of the card lets more run at once.
    """
    weights = shape.parameters * element(settings.dtype)
    if settings.kind == "vllm":
        tokens = settings.max_model_len or longest
        return (weights + tokens * shape.kv_bytes) / settings.tensor_parallel_size
    return weights + settings.batch_tokens * (shape.kv_bytes + shape.activation_bytes)


def model_file(shape: ModelShape, settings: TrainingSettings | None) -> float:
    """Bytes of what a training publishes; of a bfloat16 base model for None."""
    if settings is None:
        return shape.parameters * 2
    if settings.lora is not None:
        return shape.adapter(settings.lora) * 4
    # DeepSpeed gathers 16-bit weights; without it they are float32.
    return shape.parameters * (element(settings.dtype) if settings.deepspeed else 4)


def checkpoints(shape: ModelShape, settings: TrainingSettings) -> float:
    """Bytes in the work directory while a training runs: so many checkpoints of weights and optimiser."""
    if settings.lora is not None:
        return _CHECKPOINTS * shape.adapter(settings.lora) * _OPTIMISER
    width = element(settings.dtype) + _OPTIMISER if settings.deepspeed else _OPTIMISER
    return _CHECKPOINTS * shape.parameters * width
