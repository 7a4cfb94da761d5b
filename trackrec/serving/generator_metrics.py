"""The generator's own metrics at Triton's endpoint, by the names of Triton's vLLM backend.

An autoscaler must read the number of waiting requests from here: Triton hands a request on at once, so its own queue
is always empty.
"""

from typing import Any

import triton_python_backend_utils as pb

from trackrec.llm.continuous import ContinuousEngine


class GeneratorMetrics:
    def __init__(self, labels: dict[str, str]) -> None:
        family = pb.MetricFamily

        def metric(name: str, description: str, kind: int) -> Any:
            # The family lives as long as it is held.
            self._families.append(family(name=f"vllm:{name}", description=description, kind=kind))
            return self._families[-1].Metric(labels=labels)

        self._families: list[Any] = []
        self._running = metric("num_requests_running", "Requests that are decoded now", family.GAUGE)
        self._waiting = metric("num_requests_waiting", "Requests that wait for a place", family.GAUGE)
        self._counters = {
            "prompt_tokens": metric("prompt_tokens_total", "Prompt tokens computed", family.COUNTER),
            "written_tokens": metric("generation_tokens_total", "Tokens written", family.COUNTER),
            # vLLM itself has a histogram of tokens a step instead.
            "decoding_steps": metric("decoding_steps_total", "Steps that wrote them", family.COUNTER),
        }
        self._reported = dict.fromkeys(self._counters, 0)

    def report(self, engine: ContinuousEngine) -> None:
        self._running.set(engine.running)
        self._waiting.set(engine.waiting)
        for name, counter in self._counters.items():
            total = getattr(engine, name)
            if total > self._reported[name]:
                counter.increment(total - self._reported[name])
                self._reported[name] = total
