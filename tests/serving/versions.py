"""Small versions for a real Triton server: models that keep the contracts, or break them in a chosen way."""

from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from trackrec.data import schema
from trackrec.serving.contract import PARAMETER, Contract, EncoderContract, GeneratorContract, RankerContract

ITEMS = ("10", "20", "30")
WIDTH = 4

_GENERATOR = """
import json
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        self.broken = json.loads(args["model_config"])["parameters"]["broken"]["string_value"]

    def execute(self, requests):
        import numpy as np
        for request in requests:
            sender = request.get_response_sender()
            given = {each.name(): each.as_numpy().flat[0] for each in request.inputs()}
            assert all(given[name] for name in given if name.startswith(("return_", "exclude_")))
            asked = json.loads(given["sampling_parameters"])
            prompt = given["text_input"].decode()
            if not (prompt.startswith("<u>") and prompt.endswith("</u>")):
                sender.send(pb.InferenceResponse(error=pb.TritonError("no chat template")), flags=1)
                continue
            if self.broken == "error":
                sender.send(pb.InferenceResponse(error=pb.TritonError("out of memory")), flags=1)
                continue
            if self.broken == "silent":
                import time
                time.sleep(6)
            text = "" if self.broken == "empty" else "quiet films"
            tokens = asked["max_tokens"] + (1 if self.broken == "long" else 0)
            out = [
                pb.Tensor("text_output", np.array([text.encode()], dtype=object)),
                pb.Tensor("finish_reason", np.array([b"length"], dtype=object)),
                pb.Tensor("num_input_tokens", np.array([len(prompt.split())], dtype=np.uint32)),
                pb.Tensor("num_output_tokens", np.array([tokens], dtype=np.uint32)),
            ]
            sender.send(pb.InferenceResponse(out), flags=1)
"""
_ENCODER = """
import json
import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        self.broken = json.loads(args["model_config"])["parameters"]["broken"]["string_value"]

    def execute(self, requests):
        answers = []
        for request in requests:
            texts = pb.get_input_tensor_by_name(request, "text").as_numpy()
            value = float("nan") if self.broken == "nan" else 0.5
            vectors = np.full((len(texts), WIDTH), value, dtype=np.float32)
            tokens = np.full((len(texts), 1), 5, dtype=np.int32)
            answers.append(pb.InferenceResponse([pb.Tensor("embedding", vectors), pb.Tensor("num_tokens", tokens)]))
        return answers
""".replace("WIDTH", str(WIDTH))
_RANKER = """
import json
import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        self.broken = json.loads(args["model_config"])["parameters"]["broken"]["string_value"]

    def execute(self, requests):
        answers = []
        for request in requests:
            items = pb.get_input_tensor_by_name(request, "item_id").as_numpy()
            scores = np.full(items.shape, 2.0 if self.broken == "scores" else 0.25, dtype=np.float32)
            answers.append(pb.InferenceResponse([pb.Tensor("score", scores)]))
        return answers
"""


def write(folder: Path, version: str, broken: str = "") -> Path:
    """A repository of all four models in `folder`.

    Args:
        version: of the generator; the other models' is "1".
        broken: "error", "empty", "long" or "silent" of the generator, "nan" of the encoder, "scores" of the rankers.
    """
    generator = GeneratorContract(
        model_version=version,
        domain="movies",
        history_length=10,
        opening="<u>",
        closing="</u>",
        special_tokens=["<u>", "</u>"],
        max_tokens=64,
        repetition_penalty=1.1,
        max_prompt_tokens=900,
    )
    inputs = {"text_input": "TYPE_STRING", "stream": "TYPE_BOOL", "sampling_parameters": "TYPE_STRING"}
    inputs |= dict.fromkeys(("exclude_input_in_output", "return_finish_reason"), "TYPE_BOOL")
    inputs |= dict.fromkeys(("return_num_input_tokens", "return_num_output_tokens"), "TYPE_BOOL")
    outputs = {"text_output": "TYPE_STRING", "finish_reason": "TYPE_STRING"}
    outputs |= {"num_input_tokens": "TYPE_UINT32", "num_output_tokens": "TYPE_UINT32"}
    config = _config("generator", generator, broken, 0, dict.fromkeys(inputs, 1), outputs)
    for entry, kind in zip(config.input, inputs.values(), strict=True):
        entry.data_type = model_config_pb2.DataType.Value(kind)
    config.model_transaction_policy.decoupled = True
    _model(folder, config, _GENERATOR)
    encoder = EncoderContract(model_version="1", width=WIDTH, pooling="mean", limit=16)
    config = _config(
        "encoder", encoder, broken, 32, {"text": 1}, {"embedding": "TYPE_FP32", "num_tokens": "TYPE_INT32"}
    )
    config.output[0].dims[:] = [WIDTH]
    _model(folder, config, _ENCODER)
    for name in ("ranker_base", "ranker_trackrec"):
        ranker = RankerContract(model_version="1", seed=0, uses_recot=name == "ranker_trackrec")
        config = _config(name, ranker, broken, 64, {"user_id": 1, "item_id": -1}, {"score": "TYPE_FP32"})
        config.output[0].dims[:] = [-1]
        _model(folder, config, _RANKER)
        rows = [{"item_id": item, "title": item, "attributes": []} for item in ITEMS]
        schema.write(folder / name / "1", "items", rows)
    return folder


def _config(
    name: str, contract: Contract, broken: str, batch: int, inputs: dict[str, int], outputs: dict[str, str]
) -> model_config_pb2.ModelConfig:
    config = model_config_pb2.ModelConfig(name=name, backend="python", max_batch_size=batch)
    config.parameters[PARAMETER].string_value = contract.model_dump_json()
    config.parameters["broken"].string_value = broken
    for key, dims in inputs.items():
        config.input.add(name=key, data_type="TYPE_STRING", dims=[dims])
    for key, kind in outputs.items():
        config.output.add(name=key, data_type=kind, dims=[1])
    return config


def _model(folder: Path, config: model_config_pb2.ModelConfig, code: str) -> None:
    (folder / config.name / "1").mkdir(parents=True, exist_ok=True)
    (folder / config.name / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
    (folder / config.name / "1/model.py").write_text(code, encoding="utf-8")
