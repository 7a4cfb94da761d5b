"""Models with the served models' contracts that cost next to nothing, for tests of their clients."""

import shutil
from pathlib import Path
from typing import Any

import google.protobuf.text_format as text_format
from tritonclient.grpc import model_config_pb2

from trackrec.serving.contract import EncoderContract, GeneratorContract

_HERE = Path(__file__).parent
FLAGS = (
    "stream",
    "exclude_input_in_output",
    "return_finish_reason",
    "return_num_input_tokens",
    "return_num_output_tokens",
)


def repository(
    folder: Path,
    *,
    width: int = 8,
    delay_ms: float = 0,
    load_ms: float = 0,
    log: Path | None = None,
    generator: dict[str, Any] | None = None,
    encoder: dict[str, Any] | None = None,
) -> Path:
    """A model repository with the fakes `generator` and `encoder`.

    Args:
        generator, encoder: fields of their contracts other than these here.
    """
    contract = GeneratorContract(
        **{
            "model_version": "g1",
            "domain": "movies",
            "history_length": 8,
            "opening": "<|user|>",
            "closing": "<|assistant|>",
            "special_tokens": ("<|user|>", "<|assistant|>"),
            "max_tokens": 64,
            "repetition_penalty": 1.0,
            "max_prompt_tokens": 4000,
            **(generator or {}),
        }
    )
    parameters = {"trackrec": contract.model_dump_json()}
    if delay_ms:
        parameters["delay_ms"] = str(delay_ms)
    if load_ms:
        parameters["load_ms"] = str(load_ms)
    if log:
        parameters["log"] = str(log)
    inputs = {"text_input": "TYPE_STRING", "sampling_parameters": "TYPE_STRING", **dict.fromkeys(FLAGS, "TYPE_BOOL")}
    outputs = {
        "text_output": "TYPE_STRING",
        "finish_reason": "TYPE_STRING",
        "num_input_tokens": "TYPE_UINT32",
        "num_output_tokens": "TYPE_UINT32",
    }
    config = _config("generator", parameters, inputs, outputs)
    config.model_transaction_policy.decoupled = True
    _write(folder, config)
    read = EncoderContract(
        **{"model_version": "e1", "width": width, "pooling": "mean", "limit": 256, **_rest(), **(encoder or {})}
    )
    config = _config(
        "encoder", {"trackrec": read.model_dump_json()}, {"text": "TYPE_STRING"}, {"num_tokens": "TYPE_INT32"}
    )
    config.output.add(name="embedding", data_type="TYPE_FP32", dims=[width])
    config.max_batch_size = 32
    config.dynamic_batching.SetInParent()
    _write(folder, config)
    return folder


def _rest() -> dict[str, Any]:
    given = {"dtype": "float32", "batch_tokens": 8192}
    return {name: value for name, value in given.items() if name in EncoderContract.model_fields}


def _config(
    name: str, parameters: dict[str, str], inputs: dict[str, str], outputs: dict[str, str]
) -> model_config_pb2.ModelConfig:
    config = model_config_pb2.ModelConfig(name=name, backend="python")
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    for key, kind in inputs.items():
        config.input.add(name=key, data_type=kind, dims=[1], optional=key in FLAGS)
    for key, kind in outputs.items():
        config.output.add(name=key, data_type=kind, dims=[1])
    config.instance_group.add(count=1, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    return config


def _write(folder: Path, config: model_config_pb2.ModelConfig) -> None:
    model = folder / config.name
    (model / "1").mkdir(parents=True, exist_ok=True)
    (model / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
    shutil.copy(_HERE / f"{config.name}_model.py", model / "1/model.py")
