"""The Triton model of the backend `vllm`: the contract of Triton's vLLM backend, over `trackrec.llm.continuous`.

For machines without a GPU, and for tests. A repository made for the one serves in the other: the same `model.json`,
inputs, outputs, sampling parameters and final flag (on the last response with data).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from trackrec.llm.continuous import Progress, Sampling
from trackrec.llm.engine import PromptTooLongError
from trackrec.serving.generation import CancelledError, Generation, UnhealthyError
from trackrec.serving.generator_engine import open_generator
from trackrec.serving.generator_metrics import GeneratorMetrics
from trackrec.serving.vllm_args import EngineArguments, SamplingParameters

_FLAGS = ("exclude_input_in_output", "return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
_INPUTS: list[dict[str, Any]] = [
    {"name": "text_input", "data_type": "TYPE_STRING", "dims": [1]},
    {"name": "stream", "data_type": "TYPE_BOOL", "dims": [1], "optional": True},
    {"name": "sampling_parameters", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
    *({"name": name, "data_type": "TYPE_BOOL", "dims": [1], "optional": True} for name in _FLAGS),
]
_OUTPUTS: list[dict[str, Any]] = [
    {"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "finish_reason", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "num_input_tokens", "data_type": "TYPE_UINT32", "dims": [1]},
    {"name": "num_output_tokens", "data_type": "TYPE_UINT32", "dims": [-1]},
]


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Adds what the model's config leaves out; no batching by Triton, and answers as they come."""
        config = auto_complete_model_config.as_dict()
        for kind, tensors in (("input", _INPUTS), ("output", _OUTPUTS)):
            given = {tensor["name"] for tensor in config[kind]}
            for tensor in tensors:
                if tensor["name"] not in given:
                    getattr(auto_complete_model_config, f"add_{kind}")(tensor)
        auto_complete_model_config.set_model_transaction_policy({"decoupled": True})
        auto_complete_model_config.set_max_batch_size(0)
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._name = config["name"]
        version = Path(pb.get_model_dir())
        self._tokenizer, engine = open_generator(EngineArguments.read(version), version)
        reported = config["parameters"].get("REPORT_CUSTOM_METRICS", {}).get("string_value", "")
        labels = {"model": self._name, "version": args["model_version"]}
        metrics = GeneratorMetrics(labels) if reported.lower() == "true" else None
        self._generation = Generation(
            engine, on_failure=self._unload, on_step=metrics.report if metrics else lambda engine: None
        )

    def execute(self, requests: list[Any]) -> None:
        """Hands the requests to the engine's thread, which lets them into the batch that runs."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._generation.submit(_Request(request, sender, self._tokenizer))
            except ValueError as error:
                _fail(sender, f"Error generating stream: {error}", pb.TritonError.INVALID_ARG)

    def finalize(self) -> None:
        """Answers what is under way, then ends."""
        self._generation.close()

    def _unload(self, error: BaseException) -> None:
        """Takes this model out of service: the server answers that it is not ready, which a probe sees."""
        pb.Logger.log_error(f"the engine of {self._name} failed ({error}); the model is unloaded")
        pb.unload_model(self._name)


class _Request:
    """One request of Triton's, as `trackrec.serving.generation.Request`.

    Raises:
        ValueError: an input is wrong; the message says which.
    """

    def __init__(self, request: Any, sender: Any, tokenizer: Any) -> None:
        given = {tensor.name(): tensor.as_numpy().reshape(-1)[0] for tensor in request.inputs()}
        self._sender = sender
        self._text = given["text_input"].decode("utf-8")
        self.stream = bool(given.get("stream", False))
        # Streaming never repeats the prompt; otherwise the answer begins with it unless it is excluded.
        self._exclude_input = bool(given.get("exclude_input_in_output", self.stream))
        if self.stream and not self._exclude_input:
            raise ValueError("When streaming, `exclude_input_in_output` = False is not allowed.")
        self._wanted = {name for name in _FLAGS if given.get(name, False)}
        parameters = given["sampling_parameters"].decode() if "sampling_parameters" in given else request.parameters()
        self.sampling: Sampling = SamplingParameters.read(parameters)
        self.prompt: list[int] = tokenizer(self._text)["input_ids"]

    def answer(self, progress: Progress) -> None:
        text = progress.text if self._exclude_input else self._text + progress.text
        outputs = [pb.Tensor("text_output", np.array([text.encode()], dtype=np.object_))]
        if "return_finish_reason" in self._wanted:
            outputs.append(pb.Tensor("finish_reason", np.array([str(progress.finish_reason)], dtype=np.object_)))
        if "return_num_input_tokens" in self._wanted:
            outputs.append(pb.Tensor("num_input_tokens", np.array([len(self.prompt)], dtype=np.uint32)))
        if "return_num_output_tokens" in self._wanted:
            outputs.append(pb.Tensor("num_output_tokens", np.array([progress.num_tokens], dtype=np.uint32)))
        flags = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if progress.finish_reason is not None else 0
        self._sender.send(pb.InferenceResponse(output_tensors=outputs), flags)

    def fail(self, error: Exception) -> None:
        message, code = f"Error generating stream: {error}", pb.TritonError.INVALID_ARG
        if isinstance(error, PromptTooLongError):
            # In vLLM's words, by which clients know it.
            message = (
                f"Error generating stream: the prompt (length {error.prompt}) is longer than the maximum model length "
                f"of {error.limit}, or leaves no room for {error.new} new tokens; shorten it"
            )
        elif isinstance(error, CancelledError):
            message, code = str(error), pb.TritonError.CANCELLED
        elif isinstance(error, UnhealthyError):
            message, code = str(error), pb.TritonError.UNAVAILABLE
        _fail(self._sender, message, code)

    def cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


def _fail(sender: Any, message: str, code: int) -> None:
    response = pb.InferenceResponse(error=pb.TritonError(message, code))
    sender.send(response, pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
