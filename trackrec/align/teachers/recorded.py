"""RecCoTs that a teacher wrote before, kept in a file."""

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# Those that ship with the project, by name.
SHIPPED = {"ml-100k": "ml-100k.jsonl"}


class RecordingError(ValueError):
    """A file of recorded RecCoTs that cannot be used; the message names file and line, and what to do."""


def locate(path: str) -> Path:
    """The file that `distill_data.teacher.path` names: one that ships with the project, or any other.

    Raises:
        RecordingError: there is none.
    """
    if path in SHIPPED:
        return Path(str(resources.files("trackrec.align.teachers") / "texts" / SHIPPED[path]))
    found = Path(path)
    if not found.is_file():
        raise RecordingError(
            f"recorded RecCoTs {path!r}: no such file; give a .jsonl or .parquet file, or the name of one that ships "
            f"with the project ({', '.join(SHIPPED)})"
        )
    return found


def read(path: Path) -> dict[str, str]:
    """Texts by context_id.

    A Parquet file has the columns `context_id` and `text`; a .jsonl file one object a line with these keys. Others (say
    `user_id` and `as_of`) are for its readers.

    Raises:
        RecordingError: the file is neither, a key is missing, a text is empty, or a context comes twice.
    """
    rows = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    texts: dict[str, str] = {}
    for where, row in rows:
        context_id, text = row.get("context_id"), row.get("text")
        if not isinstance(context_id, str) or not isinstance(text, str) or not text.strip():
            raise RecordingError(f"{where}: must have a `context_id` and a `text` that is not empty")
        if context_id in texts:
            raise RecordingError(f"{where}: context {context_id} is recorded before; keep one text a context")
        texts[context_id] = text.strip()
    return texts


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Where each row is (Parquet has no lines), and the row."""
    try:
        rows = pq.read_table(path, columns=["context_id", "text"]).to_pylist()
    except (pa.ArrowException, KeyError, OSError) as error:
        raise RecordingError(f"{path}: no Parquet file with the columns context_id and text: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", row


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Where each line is, and its object."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise RecordingError(f"{where}: not UTF-8: {error}") from error
            except json.JSONDecodeError as error:
                raise RecordingError(f"{where}: no JSON: {error}") from error
            if not isinstance(row, dict):
                raise RecordingError(f"{where}: no JSON object")
            yield where, row
