from pathlib import Path

import pytest

from tests.tables import publish
from trackrec import storage
from trackrec.config import PreferencesSettings
from trackrec.data import schema
from trackrec.stages import preferences


def tables(root: Path, rewards: dict[str, list[float]]) -> dict[str, Path]:
    """One example a context, whose row_id is the context's place; `rewards` by context and sample."""
    recots = [
        {"context_id": c, "sample": s, "text": f"{c}{s}", "num_tokens": 2, "finish_reason": "stop", "model": "m"}
        for c, values in rewards.items()
        for s in range(len(values))
    ]
    scored = [
        {"context_id": c, "row_id": row, "sample": s, "p_yes": value, "p_no": 1 - value, "reward": value}
        for row, (c, values) in enumerate(rewards.items())
        for s, value in enumerate(values)
    ]
    return {
        "recots": publish(root / "recots", recots=recots),
        "rewards": publish(root / "rewards", rewards=scored),
    }


def test_writes_the_table_and_its_counts(tmp_path: Path) -> None:
    given = tables(tmp_path, {"a": [0.1, 0.7, 0.4], "b": [0.5, 0.5, 0.5], "c": [0.8, 0.2, 0.2]})
    preferences.run(PreferencesSettings(), **given, preferences=tmp_path / "out")
    rows = schema.rows(tmp_path / "out", "preferences")
    assert [(row["context_id"], row["chosen"], row["rejected"]) for row in rows] == [
        ("a", "a1", ["a0", "a2"]),
        ("c", "c0", ["c1", "c2"]),
    ]
    facts = storage.read_manifest(tmp_path / "out").facts
    assert facts == {
        "contexts": 3,
        "preferences": 2,
        "dropped_equal": 1,
        "dropped_same_text": 0,
        "removed_same_text": 0,
        # (.1 + .7 + .4 + 3 x .5 + .8 + .2 + .2) / 9; chosen .7 and .8; rejected means .25 and .2.
        "mean_reward": pytest.approx(3.9 / 9),
        "chosen_reward": pytest.approx(0.75),
        "rejected_reward": pytest.approx(0.225),
    }


def test_nothing_to_learn_from_is_an_error_that_leaves_no_output(tmp_path: Path) -> None:
    given = tables(tmp_path, {"a": [0.5, 0.5]})
    with pytest.raises(preferences.NothingToLearnError, match=r"1 have all rewards within.*sample.temperature"):
        preferences.run(PreferencesSettings(), **given, preferences=tmp_path / "out")
    assert not (tmp_path / "out").exists()
