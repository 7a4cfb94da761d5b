"""`sample`, `score`, `generate` and `encode` cut into shards, and `gather`, which joins their tables."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.stages.decoding_inputs import Killed, contexts, examples, watched
from tests.tables import publish
from trackrec import storage
from trackrec.config import DecodingSettings, EncodeSettings, EngineSettings, SampleSettings, ScoreSettings
from trackrec.data import schema
from trackrec.fetch import fetch
from trackrec.llm.engine import open_engine
from trackrec.shards import WHOLE, Shard
from trackrec.stages import decoding, encode, gather, generate, sample, score

DEFAULT = EngineSettings()
# A stage with its inputs, but for its output and its shard.
Stage = Callable[[Path, Shard], None]
SPEEDS = {"tokens_per_second", "texts_per_second", "seconds_per_recot"}
# One context a batch: then not even rounding depends on which others are worked on.
ALONE = EngineSettings(batch_tokens=1)


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))


@pytest.fixture
def _one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads each model once for all shards; the stages never change it."""
    opened = functools.cache(open_engine)
    for stage in (decoding, score):
        monkeypatch.setattr(stage, "open_engine", opened)


def sampling(root: Path, model: Path, engine: EngineSettings = DEFAULT) -> Stage:
    given = contexts(root / "contexts", train=5)
    settings = SampleSettings(n=2, max_tokens=8, max_contexts=4, engine=engine)
    return lambda out, shard: sample.run(
        settings, contexts=given, base_model=model, generator=model, recots=out, seed=3, iteration=1, shard=shard
    )


def greedy(root: Path, model: Path) -> Stage:
    shown = {"examples": examples(root / "examples", train=3), "contexts": contexts(root / "contexts", train=3)}
    settings, splits = DecodingSettings(max_tokens=8), ["valid", "test"]
    return lambda out, shard: generate.run(
        settings, splits=splits, **shown, base_model=model, generator=model, recots=out, shard=shard
    )


def scoring(root: Path, model: Path, engine: EngineSettings = DEFAULT) -> Stage:
    given = {
        "examples": examples(root / "examples"),
        "contexts": contexts(root / "contexts"),
        "recots": texts(root / "recots"),
    }
    settings = ScoreSettings(engine=engine)
    return lambda out, shard: score.run(settings, **given, base_model=model, validator=model, rewards=out, shard=shard)


def encoding(root: Path, of_history: bool) -> Stage:
    given = {"recots": texts(root / "recots"), "contexts": contexts(root / "contexts")}
    encoder = fetch("all-minilm-l6-v2")
    return lambda out, shard: encode.run(
        EncodeSettings(), **given, encoder=encoder, vectors=out, of_history=of_history, shard=shard
    )


def texts(directory: Path) -> Path:
    """Two RecCoTs of each of four contexts, the contexts not in order."""
    rows = [
        {"context_id": f"c{c}", "sample": s, "text": f"The user likes {'very ' * c}{'old' if s else 'new'} films."}
        for c in (2, 0, 3, 1)
        for s in range(2)
    ]
    return publish(directory, recots=rows)


def joined(stage: Stage, table: str, root: Path, shards: int) -> Path:
    """What `stage` writes in so many shards, gathered in another order than theirs."""
    parts = [root / f"part {number} of {shards}" for number in range(shards)]
    for number, part in enumerate(parts):
        stage(part, Shard(number, shards))
    gather.run(table=table, parts=parts[::-1], joined=root / f"joined {shards}")
    return root / f"joined {shards}"


def whole(stage: Stage, root: Path) -> Path:
    stage(root / "whole", WHOLE)
    return root / "whole"


def counted(directory: Path) -> dict[str, Any]:
    facts = storage.read_manifest(directory).facts
    return {name: pytest.approx(value, abs=1e-5) for name, value in facts.items() if name not in SPEEDS}


@pytest.mark.usefixtures("_one_engine")
@pytest.mark.parametrize("of", [sampling, greedy])
def test_the_real_model_writes_the_same_table_in_any_number_of_shards(
    smollm2: Path, tmp_path: Path, of: Callable[[Path, Path], Stage]
) -> None:
    """Byte for byte: every text and its place."""
    stage = of(tmp_path, smollm2)
    expected = whole(stage, tmp_path)
    assert len({row["text"] for row in schema.rows(expected, "recots")}) > 2
    for shards in (2, 3):
        found = joined(stage, "recots", tmp_path, shards)
        assert storage.content_hash(found) == storage.content_hash(expected)
        facts = storage.read_manifest(found).facts
        assert facts == counted(expected) | {name: facts[name] for name in ("tokens_per_second", "seconds_per_recot")}


@pytest.mark.usefixtures("_one_engine")
def test_the_real_model_gives_the_same_rewards_in_any_number_of_shards(smollm2: Path, tmp_path: Path) -> None:
    """Byte for byte where a batch holds one context; else within what rounding in another batch does."""
    alone, batched = scoring(tmp_path / "a", smollm2, ALONE), scoring(tmp_path / "b", smollm2)
    expected = whole(alone, tmp_path / "a")
    assert storage.content_hash(joined(alone, "rewards", tmp_path / "a", 3)) == storage.content_hash(expected)
    one, three = whole(batched, tmp_path / "b"), joined(batched, "rewards", tmp_path / "b", 3)
    for ours, theirs in zip(schema.rows(three, "rewards"), schema.rows(one, "rewards"), strict=True):
        assert ours == {key: pytest.approx(value, abs=1e-5) for key, value in theirs.items()}
    facts = storage.read_manifest(three).facts
    assert facts.pop("tokens_per_second") > 0
    assert facts == counted(one)


@pytest.mark.parametrize("of_history", [False, True])
def test_the_same_vectors_in_any_number_of_shards(tmp_path: Path, of_history: bool) -> None:
    stage = encoding(tmp_path, of_history)
    one, three = whole(stage, tmp_path), joined(stage, "vectors", tmp_path, 3)
    for ours, theirs in zip(schema.rows(three, "vectors"), schema.rows(one, "vectors"), strict=True):
        assert ours["context_id"] == theirs["context_id"]
        assert ours["vector"] == pytest.approx(theirs["vector"], abs=1e-5)
    facts = storage.read_manifest(three).facts
    assert (facts["texts"], facts["contexts"], facts["width"], facts["cut"]) == (8, 4, 384, 0)


def test_the_seconds_of_a_recot_are_all_pods_seconds_over_their_texts(tmp_path: Path) -> None:
    parts = []
    for number, (decoded, seconds) in enumerate([(3, 1.0), (1, 2.0), (0, 0.0)]):
        row = {"context_id": f"c{number}", "sample": 0, "text": "text", "model": "m"}
        facts = {"recots": 4, "decoded": decoded, "seconds_per_recot": seconds, "shard": number, "shards": 3}
        parts.append(publish(tmp_path / str(number), facts=facts, recots=[row]))
    gather.run(table="recots", parts=parts, joined=tmp_path / "joined")
    facts = storage.read_manifest(tmp_path / "joined").facts
    assert (facts["decoded"], facts["seconds_per_recot"]) == (4, (3 * 1.0 + 1 * 2.0) / 4)


def test_shards_share_the_contexts_without_overlap_and_evenly() -> None:
    names = [f"c{number:02}" for number in range(23)]
    for of in (1, 2, 3, 5, 23, 40):
        owned = [Shard(number, of).own([*reversed(names), "c00"]) for number in range(of)]
        assert list(itertools.chain(*owned)) == names
        assert max(map(len, owned)) - min(map(len, owned)) <= 1


@pytest.mark.parametrize(("number", "of"), [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_that_is_none_is_refused(number: int, of: int) -> None:
    with pytest.raises(ValueError, match=f"there is no shard {number} of {of}"):
        Shard(number, of)


def test_of_fewer_contexts_than_shards_some_write_an_empty_part_without_a_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    for stage in (decoding, score):
        monkeypatch.setattr(stage, "open_engine", watched(None, asked))
    for name, stage, table in (
        ("sample", sampling(tmp_path / "sample", tiny_model, ALONE), "recots"),
        ("score", scoring(tmp_path / "score", tiny_model, ALONE), "rewards"),
    ):
        found = joined(stage, table, tmp_path / name, 7)
        # Four of seven have a context.
        assert asked == [1] * 4
        expected = whole(stage, tmp_path / name)
        assert storage.content_hash(found) == storage.content_hash(expected)
        facts = storage.read_manifest(found).facts
        assert facts.pop("tokens_per_second") > 0
        assert facts.pop("seconds_per_recot", 1) > 0
        assert facts == counted(expected)
        asked.clear()
    encoded = encoding(tmp_path / "encode", of_history=False)
    monkeypatch.setattr(encode, "TextEncoder", None)
    encoded(tmp_path / "empty", Shard(0, 9))
    assert schema.rows(tmp_path / "empty", "vectors") == []


def test_no_context_at_all_is_an_error_in_every_shard(tiny_model: Path, tmp_path: Path) -> None:
    given = contexts(tmp_path / "contexts", train=0)
    for number in range(2):
        with pytest.raises(ValueError, match="no train context to sample"):
            sample.run(
                SampleSettings(),
                contexts=given,
                base_model=tiny_model,
                generator=tiny_model,
                recots=tmp_path / "out",
                shard=Shard(number, 2),
            )


def test_a_killed_shard_goes_on_in_its_own_work_directory(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubeflow retries no task of a loop: a run that is submitted again finishes what the killed one began."""
    stage = sampling(tmp_path, tiny_model)
    asked: list[int] = []
    monkeypatch.setattr(decoding, "open_engine", watched(1, asked))
    with pytest.raises(Killed):
        stage(tmp_path / "part 1 of 2", Shard(1, 2))
    assert not (tmp_path / "part 1 of 2").exists()
    monkeypatch.setattr(decoding, "open_engine", watched(None, asked))
    found = joined(stage, "recots", tmp_path, 2)
    # The killed one had two and wrote one; then the other's two, and the one that was left.
    assert asked == [2, 2, 1]
    assert storage.content_hash(found) == storage.content_hash(whole(stage, tmp_path))


def test_a_shard_reads_its_own_rows_alone(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of histories and texts; of the other contexts it learns no more than their names and splits."""
    read: list[tuple[str, int]] = []
    original = schema.read

    def noting(directory: Path, table: str, columns: list[str] | None = None, *rest: Any) -> Any:
        found = original(directory, table, columns, *rest)
        if {"history", "text", "title"} & set(found.column_names):
            read.append((table, found.num_rows))
        return found

    monkeypatch.setattr(schema, "read", noting)
    for number, stage in enumerate(
        (sampling(tmp_path, tiny_model), scoring(tmp_path / "s", tiny_model), greedy(tmp_path / "g", tiny_model))
    ):
        stage(tmp_path / f"part {number}", Shard(1, 2))
    encoding(tmp_path / "e", of_history=True)(tmp_path / "part", Shard(1, 2))
    # Half of four drawn contexts; of four sampled ones, with two texts and an example each (c0, the one with two
    # examples, is the other shard's); of three held-out ones; of four encoded ones.
    assert read == [
        ("contexts", 2),
        *[("recots", 4), ("contexts", 2), ("examples", 2)],
        ("contexts", 2),
        *[("recots", 4), ("contexts", 2)],
    ]


def test_parts_that_are_not_all_shards_of_one_table_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    stage, other = sampling(tmp_path / "a", tiny_model), sampling(tmp_path / "b", tiny_model, ALONE)
    one, two, foreign = tmp_path / "one", tmp_path / "two", tmp_path / "foreign"
    stage(one, Shard(0, 2))
    stage(two, Shard(1, 2))
    other(foreign, Shard(1, 2))
    for parts, message in (
        ([one], "it got shard 0 of 2$"),
        ([one, one], "it got shard 0 of 2, shard 0 of 2"),
        ([whole(stage, tmp_path)], "it got a whole table"),
        ([], "it got nothing"),
        ([one, foreign], "other settings or inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            gather.run(table="recots", parts=parts, joined=tmp_path / "joined")
        assert not (tmp_path / "joined").exists()
    with (two / "recots.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(storage.CorruptError, match=r"two/recots\.parquet"):
        gather.run(table="recots", parts=[one, two], joined=tmp_path / "joined")


def test_row_groups_do_not_tell_how_a_table_was_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_ROW_GROUP", 4)
    rows = [{"row_id": number, "score": number / 7} for number in range(11)]
    expected = publish(tmp_path / "whole", predictions=rows)
    for cuts in ([0, 11], [0, 1, 2, 11], [0, 5, 5, 9, 11], [0, 4, 8, 11]):
        parts = [
            publish(tmp_path / f"{cuts} {start}-{end} {number}", predictions=rows[start:end])
            for number, (start, end) in enumerate(itertools.pairwise(cuts))
        ]
        out = tmp_path / f"joined {cuts}"
        out.mkdir()
        assert schema.join(parts, out, "predictions") == 11
        assert (out / "predictions.parquet").read_bytes() == (expected / "predictions.parquet").read_bytes()


def test_rows_of_some_contexts_are_read_in_the_tables_order(tmp_path: Path) -> None:
    given = texts(tmp_path / "recots")
    found = schema.rows(given, "recots", ["context_id", "sample"], {"c3", "c2", "unknown"})
    assert [(row["context_id"], row["sample"]) for row in found] == [("c2", 0), ("c2", 1), ("c3", 0), ("c3", 1)]
    assert schema.rows(given, "recots", ["text"], []) == []
