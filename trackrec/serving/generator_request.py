"""A request to the generator: what Triton's vLLM backend reads of its inputs, and answers."""

from typing import Any

import numpy as np
import triton_python_backend_utils as pb
from transformers import PreTrainedTokenizerFast

from trackrec.llm.continuous import Progress, Sampling
from trackrec.llm.engine import PromptTooLongError
from trackrec.serving.generation import CancelledError, UndeliveredError, UnhealthyError
from trackrec.serving.generator_model import FLAGS
from trackrec.serving.vllm_args import SamplingParameters


class GeneratorRequest:
    """One request of Triton's, as `trackrec.serving.generation.Request`.

    Raises:
        ValueError: an input is wrong; the message says which.
    """

    def __init__(self, request: Any, sender: Any, tokenizer: PreTrainedTokenizerFast) -> None:
        given = {tensor.name(): tensor.as_numpy().reshape(-1)[0] for tensor in request.inputs()}
        self._sender = sender
        self._text = given["text_input"].decode("utf-8")
        self.stream = bool(given.get("stream", False))
        # Streaming never repeats the prompt; otherwise the answer begins with it unless it is excluded.
        self._exclude_input = bool(given.get("exclude_input_in_output", self.stream))
        if self.stream and not self._exclude_input:
            raise ValueError("When streaming, `exclude_input_in_output` = False is not allowed.")
        self._wanted = {name for name in FLAGS if given.get(name, False)}
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
        elif isinstance(error, UnhealthyError | UndeliveredError):
            message, code = str(error), pb.TritonError.UNAVAILABLE
        respond_error(self._sender, message, code)

    def cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


def respond_error(sender: Any, message: str, code: int) -> None:
    response = pb.InferenceResponse(error=pb.TritonError(message, code))
    sender.send(response, pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
