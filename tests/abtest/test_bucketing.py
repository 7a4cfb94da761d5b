import subprocess
import sys

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from trackrec.abtest.bucketing import SLOT_SQL, SLOTS, Experiment, slot

# What every other implementation must give, too: docs/abtest.md shows these.
VECTORS = [
    ("exp-1", "1", 8196),
    ("exp-1", "2", 4727),
    ("exp-1", "user-42", 6262),
    ("exp-2", "1", 2583),
    ("e", "é日", 725),
]
SALTS = st.text("abcXYZ019._-", min_size=1, max_size=20)


@pytest.mark.parametrize(("salt", "user", "expected"), VECTORS)
def test_known_vectors(salt: str, user: str, expected: int) -> None:
    assert slot(salt, user) == expected


def test_another_languages_tools_give_the_same() -> None:
    """`sha256sum` and the shell's arithmetic."""
    for salt, user, expected in VECTORS:
        command = 'h=$(printf %s "$1:$2" | sha256sum); echo $(( 0x${h:0:8} % 10000 ))'
        found = subprocess.run(["bash", "-c", command, "bash", salt, user], capture_output=True, text=True, check=True)
        assert int(found.stdout) == expected


@given(SALTS, st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_sql_gives_the_same(salt: str, users: list[str]) -> None:
    users = [user for user in users if "\0" not in user]
    statement = f"SELECT {SLOT_SQL} FROM (SELECT unnest($users::VARCHAR[]) AS user_id)"
    found = duckdb.execute(statement, {"salt": salt, "users": users}).fetchall()
    assert [row[0] for row in found] == [slot(salt, user) for user in users]


@given(st.integers(0, 2**63), SALTS)
def test_a_number_is_its_text(user: int, salt: str) -> None:
    assert slot(salt, user) == slot(salt, str(user))


@given(st.text(min_size=1), SALTS, st.integers(1, SLOTS - 1000))
def test_a_growing_share_keeps_its_users(user: str, salt: str, slots: int) -> None:
    """Ramping the last bucket up moves nobody out of it, nor out of the one before."""
    small = Experiment(salt=salt, shares={"control": 0.1, "treatment": slots / SLOTS})
    large = Experiment(salt=salt, shares={"control": 0.1, "treatment": 0.9})
    assert small.bucket(user) in (None, large.bucket(user))


def test_slots_are_even_and_salts_independent() -> None:
    users = range(40_000)
    first, second = ([slot(salt, user) * 20 // SLOTS for user in users] for salt in ("a", "b"))
    counts = [first.count(k) for k in range(20)]
    assert stats.chisquare(counts).pvalue > 1e-4
    table = [[0] * 20 for _ in range(20)]
    for a, b in zip(first, second, strict=True):
        table[a][b] += 1
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_shares() -> None:
    experiment = Experiment(salt="exp-1", shares={"control": 0.1, "treatment": 0.15})
    for user in range(2000):
        place = slot("exp-1", user)
        assert experiment.bucket(user) == ("control" if place < 1000 else "treatment" if place < 2500 else None)


@pytest.mark.parametrize(
    ("salt", "shares", "message"),
    [
        ("a:b", {"control": 0.5}, "salt"),
        ("", {"control": 0.5}, "salt"),
        ("a", {"control": 0.6, "treatment": 0.5}, "more than 1"),
        ("a", {"control": 0.00005}, "no whole number"),
        ("a", {"control": 0.0}, "greater than 0"),
        ("a", {}, "at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(salt: str, shares: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Experiment(salt=salt, shares=shares)


def test_serving_can_import_it() -> None:
    """Without numpy, pandas, duckdb or torch."""
    code = (
        "import sys, trackrec.abtest.bucketing;"
        "print([m for m in ('numpy', 'pandas', 'duckdb', 'torch', 'pyarrow') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
