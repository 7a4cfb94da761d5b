"""What `sample` and `generate` share: contexts decoded into the table `recots`, kept as they are finished."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from trackrec import storage
from trackrec.config import EngineSettings
from trackrec.data import schema
from trackrec.journal import Journal
from trackrec.llm.chat import encode_chat
from trackrec.llm.engine import Completion, Engine, open_engine
from trackrec.progress import track
from trackrec.prompts.render import cot_prompt
from trackrec.storage import Publication

# (engine, context ids, prompts) → each prompt's index and completions, as they are finished.
Decode = Callable[[Engine, list[str], list[list[int]]], Iterator[tuple[int, list[Completion]]]]
# Contexts tokenised at once: bounds memory, and is many batches.
_CHUNK = 4096


def write_recots(
    job: Publication,
    contexts: list[dict[str, Any]],
    decode: Decode,
    engine_settings: EngineSettings,
    base_model: Path,
    generator: Path,
) -> None:
    """Decodes `contexts` with G and writes table `recots` to output "recots"; a killed stage decodes only what is left.

    Facts: `contexts`, `recots`, `tokens`, `mean_tokens`, `finished` (the share that ended by itself), and for the texts
    of this try `decoded` (their number), `seconds_per_recot` and `tokens_per_second`. Many are decoded at once, so the
    seconds are those of the work, not what one text takes.
    """
    decoded, written, seconds = 0, 0, 0.0
    with Journal(job.work / "recots.jsonl") as journal:
        done = {record["context_id"]: record["completions"] for record in journal.records}
        waiting = [context for context in contexts if context["context_id"] not in done]
        if waiting:
            engine = open_engine(engine_settings, base_model, generator)
            started = time.monotonic()
            with track(range(len(contexts)), "RecCoTs", total=len(contexts), unit="context") as bar:
                bar.update(len(done))
                for start in range(0, len(waiting), _CHUNK):
                    chunk = waiting[start : start + _CHUNK]
                    names = [context["context_id"] for context in chunk]
                    prompts = [encode_chat(engine.tokenizer, cot_prompt(c["domain"], c["history"])) for c in chunk]
                    for index, completions in decode(engine, names, prompts):
                        record = [[c.text, c.num_tokens, c.finish_reason] for c in completions]
                        journal.append({"context_id": names[index], "completions": record})
                        done[names[index]] = record
                        decoded += len(completions)
                        written += sum(c.num_tokens for c in completions)
                        bar.update(1)
            seconds = time.monotonic() - started
    model = storage.content_hash(generator)
    rows = [
        {
            "context_id": context["context_id"],
            "sample": sample,
            "text": text,
            "num_tokens": num_tokens,
            "finish_reason": finish_reason,
            "model": model,
        }
        for context in contexts
        for sample, (text, num_tokens, finish_reason) in enumerate(done[context["context_id"]])
    ]
    schema.write(job.outputs["recots"], "recots", rows)
    job.facts |= {
        "contexts": len(contexts),
        "recots": len(rows),
        "tokens": sum(row["num_tokens"] for row in rows),
        "mean_tokens": fmean(row["num_tokens"] for row in rows) if rows else 0.0,
        "finished": fmean(row["finish_reason"] == "stop" for row in rows) if rows else 0.0,
        "decoded": decoded,
        "seconds_per_recot": round(seconds / decoded, 6) if decoded else 0.0,
        "tokens_per_second": round(written / seconds, 1) if seconds else 0.0,
    }
