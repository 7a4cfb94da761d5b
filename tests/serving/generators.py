"""A model repository with a generator alone, and its client."""

import json
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient import grpc

CONFIG = """\
backend: "vllm"
instance_group [{ count: 1 kind: KIND_MODEL }]
model_transaction_policy { decoupled: true }
parameters { key: "REPORT_CUSTOM_METRICS" value { string_value: "true" } }
"""


def generator_repository(
    path: Path, model: Path, *, name: str = "generator", loras: dict[str, Path] | None = None, **arguments: Any
) -> Path:
    """`path` with a model `name`: `model`'s weights, and `arguments` beside vLLM's required ones in model.json."""
    version = path / name / "1"
    version.mkdir(parents=True)
    (version / "weights").symlink_to(model)
    (path / name / "config.pbtxt").write_text(CONFIG, encoding="utf-8")
    given = {"model": f"{name}/1/weights", "dtype": "float32", "gpu_memory_utilization": 0.9, **arguments}
    if loras:
        given["enable_lora"] = True
        names = {name: str(adapter) for name, adapter in loras.items()}
        (version / "multi_lora.json").write_text(json.dumps(names), encoding="utf-8")
    (version / "model.json").write_text(json.dumps(given), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


def inputs(text: str, *, parameters: dict[str, Any] | None = None, **flags: bool) -> list[grpc.InferInput]:
    """`parameters` are the sampling parameters, `flags` the boolean inputs."""

    def tensor(name: str, value: Any, kind: str, dtype: type) -> grpc.InferInput:
        given = grpc.InferInput(name, [1], kind)
        given.set_data_from_numpy(np.array([value], dtype=dtype))
        return given

    found = [tensor("text_input", text.encode(), "BYTES", np.object_)]
    if parameters is not None:
        found.append(tensor("sampling_parameters", json.dumps(parameters).encode(), "BYTES", np.object_))
    return found + [tensor(name, value, "BOOL", np.bool_) for name, value in flags.items()]


class Stream:
    """One gRPC stream: requests go out on it, answers come back by request."""

    def __init__(self, address: str, model: str = "generator") -> None:
        self.model = model
        self.client = grpc.InferenceServerClient(address)
        self._answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self.client.start_stream(lambda result, error: self._answers.put((result, error)))

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        # What was not waited for is given up.
        self.client.stop_stream(cancel_requests=True)
        self.client.close()

    def ask(self, id: str, text: str, *, parameters: dict[str, Any] | None = None, **flags: bool) -> None:
        self.client.async_stream_infer(self.model, inputs(text, parameters=parameters, **flags), request_id=id)

    def whole(self, text: str, *, parameters: dict[str, Any] | None = None, **flags: bool) -> Answer:
        """The one answer to a request that does not stream, with all that can be returned."""
        wanted = {"exclude_input_in_output": True, "return_finish_reason": True, "return_num_input_tokens": True}
        self.ask("", text, parameters=parameters, **{**wanted, "return_num_output_tokens": True, **flags})
        [answer] = self.answers()
        return answer

    def next(self) -> tuple[str, Answer, bool]:
        """The next response: its request's id, its data, and whether it is the request's last.

        Raises:
            InferenceServerException: it is an error.
        """
        result, error = self._answers.get(timeout=120)
        if error is not None:
            raise error
        response = result.get_response()

        def value(name: str) -> Any:
            found = result.as_numpy(name)
            return None if found is None else found.reshape(-1)[0]

        reason = value("finish_reason")
        answer = Answer(
            value("text_output").decode(),
            None if reason is None else reason.decode(),
            value("num_input_tokens"),
            value("num_output_tokens"),
        )
        return response.id, answer, response.parameters["triton_final_response"].bool_param

    def answers(self) -> Iterator[Answer]:
        """The responses to the one request that was sent, up to the last."""
        while True:
            _, answer, last = self.next()
            yield answer
            if last:
                return
