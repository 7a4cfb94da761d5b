"""The messages to and from Triton's models, as protobuf: one prompt to the generator, a batch of texts to the encoder.

They are built and read here, not by tritonclient's classes: those cost as much time as the whole rest of a request, and
lose the id of a request that failed.
"""

import functools
import json
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from trackrec.serving.contract import GeneratorContract

GENERATOR = "generator"
ENCODER = "encoder"
# The server's own parameters, in requests and answers.
_EMPTY_FINAL = "triton_enable_empty_final_response"
_FINAL = "triton_final_response"

_FLAGS = ("exclude_input_in_output", "return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")


class AnswerError(ValueError):
    """An answer that is not what the model's contract says."""


@dataclass(frozen=True)
class Generated:
    """A RecCoT as G wrote it; `finish_reason` is "stop" or "length"."""

    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: str


def sampling_parameters(contract: GeneratorContract) -> str:
    """Greedy decoding, as the run's RecCoTs for its ranking models were written (JSON)."""
    given: dict[str, object] = {
        "temperature": 0.0,
        "max_tokens": contract.max_tokens,
        "repetition_penalty": contract.repetition_penalty,
    }
    if contract.lora_name is not None:
        given["lora_name"] = contract.lora_name
    return json.dumps(given, sort_keys=True)


def generate_request(text: str, sampling: str) -> service_pb2.ModelInferRequest:
    """One prompt; its answer is one text."""
    request = service_pb2.ModelInferRequest()
    request.CopyFrom(_generate_template(sampling))
    request.raw_input_contents[-1] = _bytes(text)
    return request


@functools.cache
def _generate_template(sampling: str) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=GENERATOR)
    # An answer in no pieces may still come with an end of its own, which tells that there is no more.
    request.parameters[_EMPTY_FINAL].bool_param = True
    for name in _FLAGS:
        _add(request, name, "BOOL", [1], b"\1")
    _add(request, "sampling_parameters", "BYTES", [1], _bytes(sampling))
    _add(request, "text_input", "BYTES", [1], b"")
    return request


def is_last(response: service_pb2.ModelInferResponse) -> bool:
    """Whether nothing follows for its request."""
    return _FINAL not in response.parameters or response.parameters[_FINAL].bool_param


def read_generated(responses: list[service_pb2.ModelInferResponse]) -> Generated:
    """
    Args:
        responses: all of one request.

    Raises:
        AnswerError: an output is missing.
    """
    outputs: dict[str, bytes] = {}
    for response in responses:
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=False):
            outputs[output.name] = raw
    try:
        return Generated(
            text=outputs["text_output"][4:].decode("utf-8", errors="replace"),
            prompt_tokens=int.from_bytes(outputs["num_input_tokens"][:4], "little"),
            tokens=int.from_bytes(outputs["num_output_tokens"][:4], "little"),
            finish_reason=outputs["finish_reason"][4:].decode(),
        )
    except KeyError as error:
        raise AnswerError(f"the generator's answer lacks {error}; export the model again with this release") from error


def encode_request(texts: list[str]) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=ENCODER)
    _add(request, "text", "BYTES", [len(texts), 1], b"".join(_bytes(text) for text in texts))
    request.outputs.add(name="embedding")
    return request


def read_vectors(response: service_pb2.ModelInferResponse, texts: int, width: int) -> npt.NDArray[np.float32]:
    """[texts, width].

    Raises:
        AnswerError: of another shape.
    """
    names = [output.name for output in response.outputs]
    raw = response.raw_output_contents[names.index("embedding")] if "embedding" in names else b""
    if len(raw) != texts * width * 4:
        raise AnswerError(
            f"the encoder gave {len(raw)} bytes for {texts} texts, {texts * width * 4} are expected; export the model "
            "again with this release"
        )
    return np.frombuffer(raw, np.float32).reshape(texts, width)


def _add(request: service_pb2.ModelInferRequest, name: str, datatype: str, shape: list[int], raw: bytes) -> None:
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.raw_input_contents.append(raw)


def _bytes(text: str) -> bytes:
    """A string as Triton's tensors hold it: its length, then itself."""
    data = text.encode()
    return struct.pack("<I", len(data)) + data
