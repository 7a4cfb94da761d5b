import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from trackrec import storage
from trackrec.cli import app

from .logs import impressions, write


def abtest(log: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["abtest", "--log", str(log), "--bootstrap", "50", *arguments])


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write(tmp_path / "log.parquet", impressions(np.random.default_rng(1), 3000))


def lopsided(path: Path) -> Path:
    """52 : 48 of 10,000 users."""
    columns = impressions(np.random.default_rng(2), 10_000)
    place = [int(user[5:]) for user in columns["user_id"]]
    return write(path, columns | {"bucket": ["control" if one < 5200 else "treatment" for one in place]})


def test_table_4(log: Path, tmp_path: Path) -> None:
    made = abtest(log, "--long-tail-items", "300", "--cuped", "before", "--out", str(tmp_path / "out"))
    assert made.exit_code == 0, made.output
    lines = made.output.splitlines()
    assert lines[0].startswith("The sample ratio is as designed: 50.00% of the users are in 'treatment'")
    assert lines[2] == "| Method | Setting | Revenue | CVR |"
    assert [line.split("|")[1:3] for line in lines[4:8]] == [
        [" control ", " long-tail "], [" control ", " all "], [" treatment ", " long-tail "], [" treatment ", " all "],
    ]  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "abtest.md", "abtest.csv", "abtest.json", "manifest.json",
    }  # fmt: skip
    storage.verify(tmp_path / "out")
    assert (tmp_path / "out" / "abtest.md").read_text() == made.output
    found = json.loads((tmp_path / "out" / "abtest.json").read_text())
    with (tmp_path / "out" / "abtest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["metric"], row["slice"]) for row in rows] == [
        ("revenue", "long-tail"), ("cvr", "long-tail"), ("revenue", "all"), ("cvr", "all"),
    ]  # fmt: skip
    for row, one in zip(rows, found["results"], strict=True):
        assert float(row["lift"]) == one["lift"] and float(row["low"]) < one["lift"] < float(row["high"])
    assert f"{found['results'][2]['lift']:+.1%}" in lines[7]


def test_a_mismatch_is_loud(tmp_path: Path) -> None:
    log = lopsided(tmp_path / "log.parquet")
    made = abtest(log, "--out", str(tmp_path / "out"))
    assert made.exit_code == 1
    assert "DO NOT READ THE LIFTS" in made.stdout.splitlines()[0] and "DO NOT READ THE LIFTS" in made.stderr
    assert "DO NOT READ THE LIFTS" in (tmp_path / "out" / "abtest.md").read_text()
    forced = abtest(log, "--force")
    assert forced.exit_code == 0 and "DO NOT READ THE LIFTS" in forced.output
    designed = abtest(log, "--share", "control=0.52", "--share", "treatment=0.48")
    assert designed.exit_code == 0 and "as designed" in designed.output


def test_from_the_salt(tmp_path: Path) -> None:
    columns = impressions(np.random.default_rng(3), 3000)
    del columns["bucket"]
    log = write(tmp_path / "log.parquet", columns)
    made = abtest(log, "--salt", "exp-1", "--share", "control=0.3", "--share", "other=0.1", "--share", "treatment=0.3")
    assert made.exit_code == 0, made.output
    assert "users are in no bucket of the experiment" in made.output


def test_a_known_lift_is_marked(tmp_path: Path) -> None:
    columns = impressions(np.random.default_rng(4), 3000)
    treated = np.array([bucket == "treatment" for bucket in columns["bucket"]])
    better = abtest(write(tmp_path / "a.parquet", columns | {"revenue": columns["revenue"] * (1 + treated)}))
    worse = abtest(write(tmp_path / "b.parquet", columns | {"revenue": columns["revenue"] * (2 - treated)}))
    found = [one.output.splitlines()[5].split("|")[3].split()[0] for one in (better, worse)]
    assert found[0].startswith("+") and found[0].endswith("%*")
    assert found[1].startswith("-") and found[1].endswith("%−")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--control", "base"), "no user in bucket 'base'; it has: 'control'"),
        (("--control", "treatment"), "the same bucket"),
        (("--share", "treatment"), "BUCKET=SHARE"),
        (("--share", "treatment=2"), "BUCKET=SHARE"),
        (("--share", "treatment=0.1"), "leaves out control"),
        (("--salt", "exp-1"), "every bucket's share"),
        (("--salt", "a:b", "--share", "control=0.1", "--share", "treatment=0.1"), "should match pattern"),
        (("--cuped", "later"), "lacks the column later"),
        (("--cuped", "before", "--cuped", "before"), "twice"),
        (("--cvr-per", "user"), "click or impression"),
        (("--memory-limit", "much"), "quantity of memory"),
    ],
)
def test_what_the_user_can_mend(log: Path, arguments: tuple[str, ...], message: str) -> None:
    made = abtest(log, *arguments)
    assert made.exit_code == 1 and message in made.stderr and "Traceback" not in made.output


def test_nothing_is_left_of_a_failed_call(log: Path, tmp_path: Path) -> None:
    assert abtest(log, "--control", "base", "--out", str(tmp_path / "out")).exit_code == 1
    assert not (tmp_path / "out").exists()


def test_no_log(tmp_path: Path) -> None:
    for path in (tmp_path / "none.parquet", tmp_path):
        made = abtest(path)
        assert made.exit_code == 1 and "no Parquet file" in made.stderr
    text: Any = tmp_path / "text.parquet"
    text.write_text("user_id,bucket\n")
    assert "cannot be read as Parquet" in abtest(text).stderr
