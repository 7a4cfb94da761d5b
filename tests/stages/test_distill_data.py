import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.align.test_teachers import KEY, Reply, answer, completion, serving, spent, teacher
from tests.tables import publish
from trackrec import storage
from trackrec.align.teachers import endpoint, recorded
from trackrec.config import DistillDataSettings, RecordedTeacher
from trackrec.data import schema
from trackrec.prompts.render import cot_prompt
from trackrec.stages import distill_data


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    return tmp_path / "work"


def context(number: int, split: str = "train") -> dict:
    history = [{"title": f"Film {number} (1990)", "rating": 4.0, "label": 1}]
    return {
        "context_id": f"{split}{number}",
        "user_id": "u",
        "as_of": 1,
        "split": split,
        "domain": "movies",
        "history": history,
    }


@pytest.fixture
def contexts(tmp_path: Path) -> Path:
    """Forty of train, ten of test."""
    rows = [context(i) for i in range(40)] + [context(i, "test") for i in range(10)]
    return publish(tmp_path / "contexts", contexts=rows)


def recording(path: Path, names: list[str]) -> RecordedTeacher:
    path.write_text("".join(json.dumps({"context_id": name, "text": f"about {name}"}) + "\n" for name in names))
    return RecordedTeacher(path=str(path))


def test_recorded_texts_of_train_contexts_in_the_table_are_used(tmp_path: Path, contexts: Path) -> None:
    kept = [f"train{i}" for i in range(12)]
    given = recording(tmp_path / "mine.jsonl", [*kept, "test0", "elsewhere"])
    distill_data.run(DistillDataSettings(share=1, teacher=given), contexts=contexts, recots=tmp_path / "out")
    rows = schema.rows(tmp_path / "out", "recots")
    assert {row["context_id"] for row in rows} == set(kept)
    assert rows[0] == {
        "context_id": rows[0]["context_id"],
        "sample": 0,
        "text": f"about {rows[0]['context_id']}",
        "num_tokens": None,
        "finish_reason": "stop",
        "model": "recorded:mine.jsonl",
    }
    manifest = storage.read_manifest(tmp_path / "out")
    assert manifest.facts == {"train_contexts": 40, "asked": 12, "recots": 12}
    assert manifest.inputs["recorded"] == storage.content_hash(Path(given.path))


def test_the_share_is_of_the_train_contexts_and_taken_among_the_recorded(tmp_path: Path, contexts: Path) -> None:
    given = recording(tmp_path / "r.jsonl", [f"train{i}" for i in range(20)])
    settings = DistillDataSettings(share=0.25, teacher=given)
    for name, seed in [("one", 1), ("again", 1), ("two", 2)]:
        distill_data.run(settings, contexts=contexts, recots=tmp_path / name, seed=seed)
    drawn = {
        name: [row["context_id"] for row in schema.rows(tmp_path / name, "recots")] for name in ("one", "again", "two")
    }
    assert len(drawn["one"]) == 10 and drawn["one"] == drawn["again"] and set(drawn["one"]) != set(drawn["two"])


def test_too_few_recordings_are_refused(tmp_path: Path, contexts: Path) -> None:
    given = recording(tmp_path / "r.jsonl", [f"train{i}" for i in range(9)] + ["a", "b"])
    settings = DistillDataSettings(share=1, teacher=given)
    with pytest.raises(recorded.RecordingError, match=r"9 of 11 RecCoTs .* fit the 40 train contexts"):
        distill_data.run(settings, contexts=contexts, recots=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_endpoint_is_asked_for_the_share(tmp_path: Path, contexts: Path, work: Path) -> None:
    prompts = {cot_prompt("movies", context(i)["history"]): i for i in range(40)}

    def script(prompt: str, _: int) -> Reply:
        number = prompts[prompt]
        if number % 4 == 0:
            return completion(None, "content_filter")
        return completion(f"about {number}", "length" if number % 4 == 1 else "stop", tokens=number + 1)

    with serving(script) as server:
        settings = DistillDataSettings(share=0.5, teacher=teacher(server))
        distill_data.run(settings, contexts=contexts, recots=tmp_path / "out", seed=3)
        assert len(server.requests) == 20
        # A larger share pays for the new ones alone, though the stage had succeeded.
        larger = DistillDataSettings(share=0.75, teacher=teacher(server))
        distill_data.run(larger, contexts=contexts, recots=tmp_path / "larger", seed=3)
        assert len(server.requests) == 30 and max(server.asked().values()) == 1
    rows = schema.rows(tmp_path / "out", "recots")
    asked = [prompts[request["messages"][0]["content"]] for request in server.requests[:20]]
    assert {row["context_id"] for row in rows} == {f"train{i}" for i in asked if i % 4}
    for row in rows:
        number = int(row["context_id"].removeprefix("train"))
        assert row["text"] == f"about {number}" and row["num_tokens"] == number + 1 and row["model"] == "teacher-1"
        assert row["finish_reason"] == ("length" if number % 4 == 1 else "stop")
    facts = storage.read_manifest(tmp_path / "out").facts
    refused, cut = sum(i % 4 == 0 for i in asked), sum(i % 4 == 1 for i in asked)
    assert facts == {"train_contexts": 40, "asked": 20, "recots": 20 - refused, "refused": refused, "cut": cut}
    written = [*(tmp_path / "out").iterdir(), *work.rglob("*.jsonl")]
    assert len(written) == 3 and not any(KEY.encode() in path.read_bytes() for path in written)


def test_the_cap_stops_the_stage_and_a_higher_one_pays_for_the_rest(tmp_path: Path, contexts: Path, work: Path) -> None:
    with serving(answer) as server:
        low = DistillDataSettings(share=0.5, teacher=teacher(server, max_cost_usd=6e-4))
        with pytest.raises(endpoint.TeacherError, match="spending cap"):
            distill_data.run(low, contexts=contexts, recots=tmp_path / "out")
        paid = len(server.requests)
        [journal] = work.rglob("*.jsonl")
        assert 0 < paid < 20 and spent(journal) == 30 * paid <= 600
        assert not (tmp_path / "out").exists()
        high = DistillDataSettings(share=0.5, teacher=teacher(server, max_cost_usd=1))
        distill_data.run(high, contexts=contexts, recots=tmp_path / "out")
        assert len(server.requests) == 20
    assert len(schema.rows(tmp_path / "out", "recots")) == 20


def test_refusals_only_are_an_error(tmp_path: Path, contexts: Path) -> None:
    with serving(lambda *_: completion(None, "content_filter")) as server:
        settings = DistillDataSettings(share=0.1, teacher=teacher(server))
        with pytest.raises(endpoint.TeacherError, match="all 4 answers of teacher-1 are refusals or empty"):
            distill_data.run(settings, contexts=contexts, recots=tmp_path / "out")


@pytest.mark.parametrize("stage", ["distill_data", "preferences", "tabulate", "tabulate_ctr"])
def test_the_data_image_needs_no_torch(stage: str) -> None:
    heavy = "{'torch', 'transformers', 'sklearn'}"
    code = f"import sys; import trackrec.stages.{stage}; assert not {heavy} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
