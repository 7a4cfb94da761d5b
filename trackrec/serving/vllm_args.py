"""What a generator of the backend `vllm` is told, checked: `model.json`, and a request's `sampling_parameters`.

The names are vLLM's, and so are the defaults, but those of the engine's limits, which suit a CPU. What this backend
cannot do is refused by name; nothing is passed over silently but what concerns a GPU alone, and a sampling parameter at
the default, which asks for nothing.
"""

import json
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trackrec.llm.continuous import Sampling

MODEL_FILE = "model.json"
LORA_FILE = "multi_lora.json"
# vLLM's default on a CPU (VLLM_CPU_KVCACHE_SPACE).
_CACHE_BYTES = 4 * 2**30
# fmt: off
_GPU_ONLY = frozenset((
    "block_size", "compilation_config", "cpu_offload_gb", "data_parallel_size", "disable_custom_all_reduce",
    "disable_log_requests", "disable_log_stats", "distributed_executor_backend", "enable_chunked_prefill",
    "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "max_loras",
    "max_parallel_loading_workers", "pipeline_parallel_size", "seed", "swap_space", "tensor_parallel_size",
))
# fmt: on
# Sampling parameters that are not supported, at vLLM's defaults.
_UNUSED: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "min_p": 0,
    "stop_token_ids": None,
    "bad_words": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "logprobs": None,
    "prompt_logprobs": None,
    "truncate_prompt_tokens": None,
    "structured_outputs": None,
    "guided_decoding": None,
    "include_stop_str_in_output": False,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
}


class ArgumentError(ValueError):
    """An engine argument or a sampling parameter that is unknown, or that this backend does not support."""


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EngineArguments(_Arguments):
    """`model.json`: vLLM's engine arguments. Paths are relative to the server's working folder."""

    model: str
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_model_len: int | None = Field(None, ge=2)
    # The most requests decoded at once, and the most prompt tokens that join them in one step.
    max_num_seqs: int = Field(64, ge=1)
    max_num_batched_tokens: int = Field(2048, ge=1)
    kv_cache_memory_bytes: int = Field(_CACHE_BYTES, ge=1)
    enable_lora: bool = False
    max_lora_rank: int = Field(16, ge=1)
    # As it is here in any case.
    hf_overrides: dict[Literal["head_dtype"], Literal["float32"]] = {}
    trust_remote_code: Literal[False] = False
    load_format: Literal["auto", "safetensors"] = "auto"
    generation_config: Literal["auto"] = "auto"
    kv_cache_dtype: Literal["auto"] = "auto"
    quantization: None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The `model.json` in a model version's folder.

        Raises:
            ArgumentError: there is none, or it has an argument that this backend does not support.
        """
        file = folder / MODEL_FILE
        if not file.is_file():
            raise ArgumentError(f"{file} is missing: vLLM's engine arguments as JSON, such as {{'model': '…'}}")
        given = _object(file.read_text(encoding="utf-8"), str(file))
        return _checked(cls, {key: value for key, value in given.items() if key not in _GPU_ONLY}, str(file))

    def adapters(self, folder: Path) -> dict[str, Path]:
        """`multi_lora.json`: the adapters' names and folders; none where LoRA is off.

        Raises:
            ArgumentError: the file is missing, or an adapter is not there, not safetensors or of too high a rank.
        """
        if not self.enable_lora:
            return {}
        file = folder / LORA_FILE
        if not file.is_file():
            raise ArgumentError(f"{file} is missing: with `enable_lora` it names the adapters, {{'name': 'folder'}}")
        adapters = {
            name: Path(str(path)) for name, path in _object(file.read_text(encoding="utf-8"), str(file)).items()
        }
        for name, adapter in adapters.items():
            if not (adapter / "adapter_model.safetensors").is_file():
                raise ArgumentError(f"{file}: the adapter {name!r} has no adapter_model.safetensors in {adapter}")
            rank = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
            if rank > self.max_lora_rank:
                raise ArgumentError(
                    f"the adapter {name!r} has rank {rank}, above `max_lora_rank` {self.max_lora_rank}: raise it"
                )
        return adapters


class SamplingParameters(_Arguments):
    """A request's `sampling_parameters`: vLLM's `SamplingParams`, and the adapter's name."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    repetition_penalty: float = Field(1.0, gt=0)
    max_tokens: int | None = Field(16, ge=1)
    min_tokens: int = Field(0, ge=0)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    lora_name: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, stop: Any) -> Any:
        return (stop,) if isinstance(stop, str) else stop or ()

    @model_validator(mode="after")
    def _stops_and_lengths_make_sense(self) -> Self:
        if "" in self.stop:
            raise ValueError("`stop` has an empty string, which would end every text at once")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"`min_tokens` ({self.min_tokens}) exceeds `max_tokens` ({self.max_tokens})")
        return self

    @classmethod
    def read(cls, text: str) -> Sampling:
        """
        Raises:
            ArgumentError: it is no JSON object, or has a parameter that this backend does not support.
        """
        asked = {
            name: value
            for name, value in _object(text or "{}", "sampling_parameters").items()
            if name not in _UNUSED or value != _UNUSED[name]
        }
        fields = _checked(cls, asked, "sampling_parameters").model_dump()
        return Sampling(lora=fields.pop("lora_name"), **fields)


_T = TypeVar("_T", bound=_Arguments)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ArgumentError(f"{where} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ArgumentError(f"{where} must be a JSON object, not {type(found).__name__}")
    return found


def _checked(kind: type[_T], given: dict[str, Any], where: str) -> _T:
    if unknown := sorted(set(given) - set(kind.model_fields)):
        raise ArgumentError(
            f"{where}: {', '.join(map(repr, unknown))} is not supported by this backend, which knows "
            f"{', '.join(kind.model_fields)}"
        )
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc'])) or where}: {e['msg']}" for e in error.errors())
        raise ArgumentError(f"{where}: {found}") from error
