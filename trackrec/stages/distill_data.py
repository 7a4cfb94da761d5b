"""A teacher's RecCoTs for a sampled share of the train contexts (paper 3.5)."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trackrec import storage
from trackrec.align.teachers import choose, endpoint, recorded
from trackrec.align.teachers.ledger import Answer
from trackrec.config import DistillDataSettings, OpenAITeacher, RecordedTeacher
from trackrec.data import schema
from trackrec.prompts.render import cot_prompt

Row = dict[str, Any]


def run(settings: DistillDataSettings, *, contexts: Path, recots: Path, seed: int = 0) -> None:
    """Writes the teacher's texts as table `recots`; an endpoint's refusals are left out.

    An endpoint's answers are kept in the work root beyond the stage's success, so a larger share, a higher cap or
    another seed pays only for what is new.

    Facts: `train_contexts`, `asked` (the share of them, or as many as are recorded), `recots`, and for an endpoint
    `refused` (left out) and `cut` (at the token limit).

    Raises:
        RecordingError: the recordings cannot be read, or too few fit the train contexts.
        TeacherError: the endpoint cannot be asked any further; what it answered is kept.
    """
    teacher = settings.teacher
    inputs = {"contexts": contexts}
    if isinstance(teacher, RecordedTeacher):
        inputs["recorded"] = recorded.locate(teacher.path)
    with storage.publish("distill_data", settings, inputs=inputs, outputs={"recots": recots}, seed=seed) as job:
        train = {row["context_id"]: row for row in schema.rows(contexts, "contexts") if row["split"] == "train"}
        number = max(1, round(settings.share * len(train)))
        job.facts["train_contexts"] = len(train)
        if isinstance(teacher, RecordedTeacher):
            texts = recorded.read(inputs["recorded"])
            fitting = train.keys() & texts.keys()
            if len(fitting) < teacher.min_matches:
                raise recorded.RecordingError(
                    f"{len(fitting)} of {len(texts)} RecCoTs in {teacher.path!r} fit the {len(train)} train contexts, "
                    f"and `distill_data.teacher.min_matches` is {teacher.min_matches}. A recording fits one history as "
                    "shown: give the `contexts` settings and seed it was made with, other recordings, or a teacher of "
                    "kind `openai`."
                )
            chosen = choose(fitting, number, seed)
            model = f"recorded:{Path(teacher.path).name}"
            rows = [_row(context_id, Answer(texts[context_id], "stop", None), model) for context_id in chosen]
        else:
            chosen = choose(train, number, seed)
            rows = _ask(teacher, [train[context_id] for context_id in chosen], contexts, job.facts)
        job.facts |= {"asked": len(chosen), "recots": len(rows)}
        schema.write(job.outputs["recots"], "recots", rows)


def _ask(teacher: OpenAITeacher, asked: Iterable[Row], contexts: Path, facts: dict[str, Any]) -> list[Row]:
    prompts = {row["context_id"]: cot_prompt(row["domain"], row["history"]) for row in asked}
    # By what an answer depends on, not by the settings: a higher cap or a larger share finds the earlier answers.
    origin = [teacher.base_url, teacher.model, teacher.temperature, teacher.max_tokens, storage.content_hash(contexts)]
    name = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]
    answers = endpoint.ask(teacher, prompts, storage.work_root() / "teacher" / f"{name}.jsonl")
    usable = {
        name: answer for name, answer in answers.items() if answer.text and answer.finish_reason in ("stop", "length")
    }
    facts["refused"] = len(answers) - len(usable)
    facts["cut"] = sum(answer.finish_reason == "length" for answer in usable.values())
    if not usable:
        raise endpoint.TeacherError(f"all {len(answers)} answers of {teacher.model} are refusals or empty")
    return [_row(name, answer, teacher.model) for name, answer in usable.items()]


def _row(context_id: str, answer: Answer, model: str) -> Row:
    return {
        "context_id": context_id,
        "sample": 0,
        "text": answer.text,
        "num_tokens": answer.num_tokens,
        "finish_reason": answer.finish_reason,
        "model": model,
    }
