"""The validator's P(Yes) for held-out examples, and its metrics beside the item-mean baseline's."""

import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerFast

from trackrec import seeds, storage
from trackrec.config import EvaluateSettings
from trackrec.data import schema
from trackrec.evaluation import metrics as measures
from trackrec.evaluation import results
from trackrec.evaluation.controls import shuffle_between_users
from trackrec.journal import Journal
from trackrec.llm.chat import encode_targets
from trackrec.llm.engine import Group, open_engine
from trackrec.progress import track

Row = dict[str, Any]
# row_id, title and RecCoT of an example of one context.
Target = tuple[int, str, str | None]

# Groups tokenised at once: bounds memory, and is many batches.
_CHUNK = 1024
# Examples of one context in a group: an engine takes a group whole, and a context may have hundreds.
_TARGETS = 16


def run(
    settings: EvaluateSettings,
    *,
    examples: Path,
    contexts: Path,
    recots: Path | None,
    base_model: Path,
    validator: Path,
    predictions: Path,
    metrics: Path,
    shuffled: bool = False,
    seed: int = 0,
) -> None:
    """Writes table `predictions`, and `metrics.json` (`trackrec.evaluation.results.Evaluation`).

    V reads each example's history, target and the greedy RecCoT of its context; without `recots` no RecCoT; with
    `shuffled` the RecCoT of a context of other users (`trackrec.evaluation.controls`). A killed stage scores only what
    is left.

    Facts: `rows`, `contexts`, the overall `auc`, `uauc`, `acc`, `log_loss` and `ece`, `mean_tokens`, `tokens` (scored
    in this try; a context's history counts once), `tokens_per_second`; with `shuffled`, `kept_their_own`: contexts that
    share a user with every other.

    Raises:
        ValueError: the split has no example, an evaluated context has no RecCoT, or shuffling is impossible.
    """
    if shuffled and recots is None:
        raise ValueError("`shuffled` needs `recots`: there are no texts to shuffle")
    kind: results.RecCots = "none" if recots is None else "shuffled" if shuffled else "own"
    inputs = {"examples": examples, "contexts": contexts, "base_model": base_model, "validator": validator}
    if recots is not None:
        inputs["recots"] = recots
    outputs = {"predictions": predictions, "metrics": metrics}
    with storage.publish("evaluate", settings, inputs=inputs, outputs=outputs, seed=f"{seed} {kind}") as job:
        all_examples: list[Row] = schema.rows(examples, "examples")
        rows = [row for row in all_examples if row["split"] == settings.split]
        if not rows:
            raise ValueError(f"{examples} has no example in split {settings.split!r}")
        targets: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            targets[row["context_id"]].append(row)
        shown = _of_contexts(contexts, "contexts", targets)
        given = None if recots is None else _of_contexts(recots, "recots", targets)
        if given is not None and shuffled:
            own = given
            given = _shuffled(own, all_examples, shown, seeds.derive(seed, "shuffle"))
            job.facts["kept_their_own"] = sum(given[name] is own[name] for name in own)

        asked = {
            context_id: [(row["row_id"], row["title"], given[context_id]["text"] if given else None) for row in group]
            for context_id, group in targets.items()
        }
        started = time.monotonic()
        scores, tokens = _score(settings, base_model, validator, shown, asked, job.work / "scores.jsonl")
        seconds = time.monotonic() - started

        evaluation = results.Evaluation(
            split=settings.split,
            recots=kind,
            mean_tokens=_mean_tokens(given),
            cut=fmean(row["finish_reason"] == "length" for row in given.values()) if given else None,
            validator=_by_slice(rows, [scores[row["row_id"]] for row in rows], settings, seed),
            item_mean=None
            if any(row["item_mean"] is None for row in rows)
            else _by_slice(rows, [row["item_mean"] for row in rows], settings, seed),
        )
        results.write(job.outputs["metrics"], evaluation)
        schema.write(
            job.outputs["predictions"],
            "predictions",
            ({"row_id": row["row_id"], "score": scores[row["row_id"]]} for row in rows),
        )
        overall = evaluation.validator["overall"]
        job.facts |= {
            "rows": len(rows),
            "contexts": len(targets),
            **overall.model_dump(include={"auc", "uauc", "acc", "log_loss", "ece"}),
            "mean_tokens": evaluation.mean_tokens,
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1),
        }


def _score(
    settings: EvaluateSettings,
    base_model: Path,
    validator: Path,
    contexts: dict[str, Row],
    asked: dict[str, list[Target]],
    journal_path: Path,
) -> tuple[dict[int, float], int]:
    """P(Yes) by row_id, and the tokens that this try scored; what the journal holds is not scored again."""
    tokens = 0
    with Journal(journal_path) as journal:
        scores: dict[int, float] = {row_id: p for record in journal.records for row_id, p in record["scores"]}
        waiting = [
            (contexts[context_id], targets[start : start + _TARGETS])
            for context_id, targets in sorted(asked.items())
            for start in range(0, len(targets), _TARGETS)
            if targets[start][0] not in scores
        ]
        if not waiting:
            return scores, tokens
        engine = open_engine(settings.engine, base_model, validator)
        rows = sum(map(len, asked.values()))
        with track(range(rows), "Evaluate", total=rows, unit="row") as bar:
            bar.update(len(scores))
            for start in range(0, len(waiting), _CHUNK):
                chunk = waiting[start : start + _CHUNK]
                groups = [_group(engine.tokenizer, context, targets) for context, targets in chunk]
                tokens += sum(len(prefix) + sum(map(len, suffixes)) for prefix, suffixes in groups)
                for index, probabilities in engine.score(groups):
                    _, targets = chunk[index]
                    found = [(row_id, float(p)) for (row_id, *_), p in zip(targets, probabilities[:, 0], strict=True)]
                    journal.append({"scores": found})
                    scores.update(found)
                    bar.update(len(found))
    return scores, tokens


def _group(tokenizer: PreTrainedTokenizerFast, context: Row, targets: list[Target]) -> Group:
    return encode_targets(
        tokenizer, context["domain"], context["history"], [(title, recot) for _, title, recot in targets]
    )


def _of_contexts(directory: Path, table: str, wanted: Iterable[str]) -> dict[str, Row]:
    """The table's rows by context_id, for the wanted contexts.

    Raises:
        ValueError: a wanted context has none, or more than one.
    """
    wanted = set(wanted)
    table_rows: list[Row] = schema.rows(directory, table)
    rows = [row for row in table_rows if row["context_id"] in wanted]
    found = {row["context_id"]: row for row in rows}
    if len(rows) != len(found):
        raise ValueError(
            f"{directory}: table {table!r} has several rows of one context; evaluate greedy RecCoTs, one each"
        )
    if len(found) != len(wanted):
        missing = sorted(wanted - found.keys())
        raise ValueError(
            f"{directory}: table {table!r} lacks {len(missing)} of the {len(wanted)} evaluated contexts "
            f"(first: {missing[0]}); make it from the same contexts"
        )
    return found


def _shuffled(texts: dict[str, Row], examples: list[Row], contexts: dict[str, Row], seed: int) -> dict[str, Row]:
    """Each context's RecCoT replaced by one of other users; a context's users are all who ever have its history."""
    users = {context_id: {context["user_id"]} for context_id, context in contexts.items()}
    for row in examples:
        if row["context_id"] in users:
            users[row["context_id"]].add(row["user_id"])
    givers = shuffle_between_users({context_id: frozenset(names) for context_id, names in users.items()}, seed)
    return {receiver: texts[giver] for receiver, giver in givers.items()}


def _mean_tokens(texts: dict[str, Row] | None) -> float | None:
    counts = [row["num_tokens"] for row in (texts or {}).values()]
    return fmean(counts) if counts and None not in counts else None


def _by_slice(
    rows: list[Row], scores: list[float], settings: EvaluateSettings, seed: int
) -> dict[results.SliceName, results.Measures]:
    masks = measures.slices(
        [row["user_train_rows"] for row in rows], [row["item_train_rows"] for row in rows], settings
    )
    found = {}
    for name, mask in masks.items():
        kept = [(row, score) for row, score, inside in zip(rows, scores, mask, strict=True) if inside]
        found[name] = measures.measure(
            [row["label"] for row, _ in kept],
            [score for _, score in kept],
            [row["user_id"] for row, _ in kept],
            bins=settings.calibration_bins,
            seed=seeds.derive(seed, "bootstrap"),
        )
    return found
