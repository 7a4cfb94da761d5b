"""Greedy RecCoTs, for Rec-tuning and evaluation (paper 3.3, 3.4)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from trackrec import storage
from trackrec.config import DecodingSettings
from trackrec.data import schema
from trackrec.llm.engine import Completion, Engine
from trackrec.shards import WHOLE, Shard
from trackrec.stages.decoding import write_recots


def run(
    settings: DecodingSettings,
    *,
    splits: Sequence[str],
    examples: Path,
    contexts: Path,
    base_model: Path,
    generator: Path,
    recots: Path,
    shard: Shard = WHOLE,
) -> None:
    """Writes table `recots`: one row (sample 0) for each context that an example of `splits` is judged in.

    Args:
        shard: which of the contexts; the facts name it.

    Facts: see `write_recots`.

    Raises:
        ValueError: there is no such context, or `contexts` lacks one.
    """
    inputs = {"examples": examples, "contexts": contexts, "base_model": base_model, "generator": generator}
    asked = " ".join(sorted(splits))
    with storage.publish(
        "generate", settings, inputs=inputs, outputs={"recots": recots}, seed=f"{asked}/{shard}"
    ) as job:
        # A context's own split is the earliest that uses it; later ones may, too.
        used = {
            row["context_id"]
            for row in schema.rows(examples, "examples", ["context_id", "split"])
            if row["split"] in splits
        }
        if not used:
            raise ValueError(f"{examples} has no example in the splits {asked}")
        own = shard.own(used)
        rows = schema.rows(contexts, "contexts", of_contexts=own)
        if len(rows) < len(own):
            raise ValueError(f"{contexts} lacks {len(own) - len(rows)} contexts of {examples}; give both of one run")
        rows.sort(key=lambda context: context["context_id"])

        def decode(
            engine: Engine, names: list[str], prompts: list[list[int]]
        ) -> Iterator[tuple[int, list[Completion]]]:
            found = engine.greedy(
                prompts, max_tokens=settings.max_tokens, repetition_penalty=settings.repetition_penalty
            )
            return ((index, [completion]) for index, completion in found)

        write_recots(job, rows, decode, settings.engine, base_model, generator)
        job.facts |= shard.facts()
