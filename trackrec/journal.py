"""Finished pieces of long work, one JSON object a line, so that a killed stage asks only for the rest."""

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class JournalBusyError(RuntimeError):
    """Another process writes this journal."""


class Journal:
    """An append-only file of JSON objects; `records` holds those that earlier tries wrote.

    A record is on the disk when `append` returns. A line that a kill left unfinished is cut off on opening.

    Raises:
        JournalBusyError: on opening, while another process has it open.
        ValueError: on opening, a whole line that is no record: the file was changed.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise JournalBusyError(f"{path} is being written by another run; wait for it to end") from error
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)
        self.records: list[dict[str, Any]] = []
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                self.records.append(json.loads(line))
            except ValueError as error:
                self._file.close()
                raise ValueError(f"{path}:{number}: no record: {error}; delete the file to start over") from error

    def append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
