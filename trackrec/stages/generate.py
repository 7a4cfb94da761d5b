"""Greedy RecCoTs of all contexts, for Rec-tuning and evaluation (paper 3.3, 3.4)."""

from collections.abc import Iterator
from pathlib import Path

from trackrec import storage
from trackrec.config import DecodingSettings
from trackrec.data import schema
from trackrec.llm.engine import Completion, Engine
from trackrec.stages.decoding import write_recots


def run(settings: DecodingSettings, *, contexts: Path, base_model: Path, generator: Path, recots: Path) -> None:
    """Writes table `recots`: one row (sample 0) for each context of every split. Facts: see `write_recots`.

    Raises:
        ValueError: there is no context.
    """
    inputs = {"contexts": contexts, "base_model": base_model, "generator": generator}
    with storage.publish("generate", settings, inputs=inputs, outputs={"recots": recots}) as job:
        rows = sorted(schema.rows(contexts, "contexts"), key=lambda context: context["context_id"])
        if not rows:
            raise ValueError(f"{contexts} has no context")

        def decode(
            engine: Engine, names: list[str], prompts: list[list[int]]
        ) -> Iterator[tuple[int, list[Completion]]]:
            found = engine.greedy(
                prompts, max_tokens=settings.max_tokens, repetition_penalty=settings.repetition_penalty
            )
            return ((index, [completion]) for index, completion in found)

        write_recots(job, rows, decode, settings.engine, base_model, generator)
