"""The model `encoder`: a Triton python model over the very encoder that wrote the vectors a ranker was trained on.

It tokenises itself, so a client sends texts and needs no tokenizer.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from trackrec.llm.encoder import TextEncoder
from trackrec.serving.contract import EncoderContract


class TritonPythonModel:
    """Input `text` BYTES [1]; outputs `embedding` FP32 [width] and `num_tokens` INT32 [1].

    `num_tokens` counts the whole text: more than the contract's `limit` says that its end was not read. All texts of
    all requests at hand are encoded together, alike lengths in one batch.
    """

    def initialize(self, args: dict[str, str]) -> None:
        contract = EncoderContract.of(json.loads(args["model_config"]))
        folder = Path(args["model_repository"]) / args["model_version"] / "weights"
        self.encoder = TextEncoder(
            folder, pooling=contract.pooling, dtype=contract.dtype, batch_tokens=contract.batch_tokens
        )
        if (self.encoder.width, self.encoder.limit) != (contract.width, contract.limit):
            raise pb_utils.TritonModelException(
                f"{folder} has width {self.encoder.width} and reads {self.encoder.limit} tokens; the config says "
                f"{contract.width} and {contract.limit}. Export the repository again."
            )

    def execute(self, requests: list[Any]) -> list[Any]:
        responses: list[Any] = [None] * len(requests)
        texts: list[str] = []
        own: dict[int, slice] = {}
        for number, request in enumerate(requests):
            try:
                given = _texts(request)
            except UnicodeDecodeError as error:
                # This request's alone: the others' texts are encoded.
                code = pb_utils.TritonError.INVALID_ARG
                responses[number] = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
                continue
            own[number] = slice(len(texts), len(texts) + len(given))
            texts += given
        if not texts:
            return responses
        token_ids = self.encoder.token_ids(texts)
        vectors = np.empty((len(texts), self.encoder.width), dtype=np.float32)
        for place, vector in self.encoder.encode(token_ids):
            vectors[place] = vector
        counts = np.array([[len(ids)] for ids in token_ids], dtype=np.int32)
        for number, part in own.items():
            outputs = [pb_utils.Tensor("embedding", vectors[part]), pb_utils.Tensor("num_tokens", counts[part])]
            responses[number] = pb_utils.InferenceResponse(output_tensors=outputs)
        return responses


def _texts(request: Any) -> list[str]:
    """An empty one, too: a generator may write nothing, and the stage `encode` has a vector of that for the rankers.

    Raises:
        UnicodeDecodeError: a text is no UTF-8.
    """
    return [bytes(text).decode() for text in pb_utils.get_input_tensor_by_name(request, "text").as_numpy().ravel()]
