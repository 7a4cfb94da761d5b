"""The Triton model of the backend `vllm`: the contract of Triton's vLLM backend, over `trackrec.llm.continuous`.

For machines without a GPU, and for tests. A repository made for the one serves in the other: the same `model.json`,
inputs, outputs, sampling parameters and final flag (on the last response with data).
"""

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb

# No import of torch here: Triton reads this file twice, the first time only to complete the config.

FLAGS = ("exclude_input_in_output", "return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
_INPUTS: list[dict[str, Any]] = [
    {"name": "text_input", "data_type": "TYPE_STRING", "dims": [1]},
    {"name": "stream", "data_type": "TYPE_BOOL", "dims": [1], "optional": True},
    {"name": "sampling_parameters", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
    *({"name": name, "data_type": "TYPE_BOOL", "dims": [1], "optional": True} for name in FLAGS),
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
        from trackrec.serving.generation import Generation
        from trackrec.serving.generator_engine import open_generator
        from trackrec.serving.generator_metrics import GeneratorMetrics
        from trackrec.serving.vllm_args import EngineArguments

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
        from trackrec.serving.generator_request import GeneratorRequest, respond_error

        for request in requests:
            sender = request.get_response_sender()
            try:
                self._generation.submit(GeneratorRequest(request, sender, self._tokenizer))
            # Whatever it is: an exception from here would be answered to the requests that are under way, too.
            except Exception as error:
                respond_error(sender, f"Error generating stream: {error}", pb.TritonError.INVALID_ARG)

    def finalize(self) -> None:
        """Answers what is under way, then ends."""
        self._generation.close()

    def _unload(self, error: BaseException) -> None:
        """Takes this model out of service: it is not ready any more, which a probe of the model sees."""
        pb.Logger.log_error(f"the engine of {self._name} failed ({error}); the model is unloaded")
        pb.unload_model(self._name)
