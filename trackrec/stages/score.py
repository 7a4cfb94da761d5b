"""Algorithm 1's feedback: V's P(Yes) and P(No) for each sampled RecCoT, and the reward (eq. 1)."""

import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from trackrec import storage
from trackrec.align.feedback import reward
from trackrec.config import ScoreSettings
from trackrec.data import schema
from trackrec.journal import Journal
from trackrec.llm.chat import encode_rec
from trackrec.llm.engine import open_engine
from trackrec.progress import track
from trackrec.shards import WHOLE, Shard

Row = dict[str, Any]
# Examples tokenised at once: bounds memory, and is many batches.
_CHUNK = 1024


def run(
    settings: ScoreSettings,
    *,
    examples: Path,
    contexts: Path,
    recots: Path,
    base_model: Path,
    validator: Path,
    rewards: Path,
    shard: Shard = WHOLE,
) -> None:
    """Writes table `rewards`: for each sampled context, each of its train examples with each of its RecCoTs.

    A killed stage scores only what is left.

    Args:
        shard: which of the sampled contexts; the facts name it.

    Facts: `contexts`, `rows` (of `rewards`), `mean_reward`, and of this try
    `tokens` (a prompt's shared prefix counts once) and `tokens_per_second`.

    Raises:
        ValueError: a sampled context is not in `contexts`, or has no train example.
    """
    inputs = {
        "examples": examples,
        "contexts": contexts,
        "recots": recots,
        "base_model": base_model,
        "validator": validator,
    }
    with storage.publish("score", settings, inputs=inputs, outputs={"rewards": rewards}, seed=str(shard)) as job:
        own = shard.own(schema.read(recots, "recots", ["context_id"])["context_id"].unique().to_pylist())
        samples: dict[str, list[Row]] = defaultdict(list)
        for row in schema.rows(recots, "recots", ["context_id", "sample", "text"], own):
            samples[row["context_id"]].append(row)
        for texts in samples.values():
            texts.sort(key=lambda row: row["sample"])
        shown = {row["context_id"]: row for row in schema.rows(contexts, "contexts", of_contexts=own)}
        asked = [row for row in schema.rows(examples, "examples", of_contexts=own) if row["split"] == "train"]
        asked.sort(key=lambda row: (row["context_id"], row["row_id"]))
        unscored = samples.keys() - {row["context_id"] for row in asked if row["context_id"] in shown}
        if unscored:
            raise ValueError(
                f"{len(unscored)} sampled contexts (first: {min(unscored)}) are not in {contexts} or have no train "
                f"example in {examples}; give the tables that {recots} was made from"
            )
        found, tokens, seconds = _score(
            settings, base_model, validator, shown, asked, samples, job.work / "scores.jsonl"
        )
        rows = [
            {
                "context_id": example["context_id"],
                "row_id": example["row_id"],
                "sample": sample["sample"],
                "p_yes": p_yes,
                "p_no": p_no,
                "reward": reward(p_yes, p_no, example["label"]),
            }
            for example in asked
            for sample, (p_yes, p_no) in zip(samples[example["context_id"]], found[example["row_id"]], strict=True)
        ]
        schema.write(job.outputs["rewards"], "rewards", rows)
        job.facts |= {
            "contexts": len(samples),
            "rows": len(rows),
            "mean_reward": fmean(row["reward"] for row in rows) if rows else 0.0,
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
        } | shard.facts()


def _score(
    settings: ScoreSettings,
    base_model: Path,
    validator: Path,
    contexts: dict[str, Row],
    examples: list[Row],
    samples: dict[str, list[Row]],
    journal_path: Path,
) -> tuple[dict[int, list[list[float]]], int, float]:
    """[p_yes, p_no] of each sample by row_id; the tokens and seconds of this try."""
    tokens, seconds = 0, 0.0
    with Journal(journal_path) as journal:
        found = {record["row_id"]: record["p"] for record in journal.records}
        waiting = [row for row in examples if row["row_id"] not in found]
        if not waiting:
            return found, tokens, seconds
        engine = open_engine(settings.engine, base_model, validator)
        started = time.monotonic()
        with track(range(len(examples)), "Score", total=len(examples), unit="example") as bar:
            bar.update(len(found))
            for start in range(0, len(waiting), _CHUNK):
                chunk = waiting[start : start + _CHUNK]
                groups = [
                    encode_rec(
                        engine.tokenizer,
                        contexts[row["context_id"]]["domain"],
                        contexts[row["context_id"]]["history"],
                        row["title"],
                        [sample["text"] for sample in samples[row["context_id"]]],
                    )
                    for row in chunk
                ]
                tokens += sum(len(prefix) + sum(map(len, suffixes)) for prefix, suffixes in groups)
                for index, probabilities in engine.score(groups):
                    journal.append({"row_id": chunk[index]["row_id"], "p": probabilities.tolist()})
                    found[chunk[index]["row_id"]] = probabilities.tolist()
                    bar.update(1)
        seconds = time.monotonic() - started
    return found, tokens, seconds
