"""Algorithm 1's sampling: N RecCoTs of each train context."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trackrec import seeds, storage
from trackrec.config import SampleSettings
from trackrec.data import schema
from trackrec.llm.engine import Completion, Engine
from trackrec.shards import WHOLE, Shard
from trackrec.stages.decoding import write_recots


def run(
    settings: SampleSettings,
    *,
    contexts: Path,
    base_model: Path,
    generator: Path,
    recots: Path,
    seed: int = 0,
    iteration: int = 0,
    shard: Shard = WHOLE,
) -> None:
    """Writes table `recots`: `settings.n` rows a context, samples 0…n-1.

    A sample's seed derives from run seed, iteration, context and sample, so the text does not depend on which other
    contexts are sampled beside it.

    Args:
        shard: which of the contexts; the facts name it.

    Facts: see `write_recots`.

    Raises:
        ValueError: there is no train context.
    """
    inputs = {"contexts": contexts, "base_model": base_model, "generator": generator}
    key = f"{seed}/{iteration}/{shard}"
    with storage.publish("sample", settings, inputs=inputs, outputs={"recots": recots}, seed=key) as job:
        known = schema.rows(contexts, "contexts", ["context_id", "split"])
        drawn = draw_contexts(known, settings.max_contexts, seed, iteration)
        if not drawn:
            raise ValueError(f"{contexts} has no train context to sample")
        own = shard.own(context["context_id"] for context in drawn)
        chosen = schema.rows(contexts, "contexts", of_contexts=own)
        chosen.sort(key=lambda context: context["context_id"])

        def decode(
            engine: Engine, names: list[str], prompts: list[list[int]]
        ) -> Iterator[tuple[int, list[Completion]]]:
            own = [[seeds.derive(seed, iteration, name, sample) for sample in range(settings.n)] for name in names]
            return engine.sample(
                prompts,
                own,
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_tokens,
            )

        write_recots(job, chosen, decode, settings.engine, base_model, generator)
        job.facts |= shard.facts()


def draw_contexts(contexts: list[dict[str, Any]], count: int | None, seed: int, iteration: int) -> list[dict[str, Any]]:
    """The train contexts, or `count` of them drawn by a hash of seed, iteration and context, ordered by context_id."""
    train = [context for context in contexts if context["split"] == "train"]
    drawn = sorted(train, key=lambda context: seeds.derive(seed, "contexts", iteration, context["context_id"]))[:count]
    return sorted(drawn, key=lambda context: context["context_id"])
