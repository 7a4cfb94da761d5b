"""What a check says."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "fault", "unchecked"]
_MARKS: dict[Level, str] = {"ok": "✔", "fault": "✘", "unchecked": "–"}


class PreflightError(RuntimeError):
    """The run would fail later; the message has a line for each fault, which says what to do."""


@dataclass(frozen=True)
class Finding:
    """`unchecked`: nothing is known to be wrong, and the text says why it could not be looked at."""

    level: Level
    text: str

    def __str__(self) -> str:
        return f"{_MARKS[self.level]} {self.text}"


def ok(text: str) -> Finding:
    return Finding("ok", text)


def fault(text: str) -> Finding:
    return Finding("fault", text)


def unchecked(text: str) -> Finding:
    return Finding("unchecked", text)


def faults_or(good: str, faults: Iterable[str]) -> Iterator[Finding]:
    """A fault for each line, or that all is well."""
    found = [fault(line) for line in faults]
    yield from found or [ok(good)]
