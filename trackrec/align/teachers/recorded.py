"""RecCoTs that a teacher wrote before, kept in a file."""

import json
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
    for number, row in enumerate(rows, start=1):
        context_id, text = row.get("context_id"), row.get("text")
        if not isinstance(context_id, str) or not isinstance(text, str) or not text.strip():
            raise RecordingError(f"{path}: row {number} must have a `context_id` and a `text` that is not empty")
        if context_id in texts:
            raise RecordingError(
                f"{path}: row {number}: context {context_id} is recorded before; keep one text a context"
            )
        texts[context_id] = text.strip()
    return texts


def _parquet(path: Path) -> list[dict[str, object]]:
    try:
        return pq.read_table(path, columns=["context_id", "text"]).to_pylist()
    except (pa.ArrowException, KeyError) as error:
        raise RecordingError(f"{path}: no Parquet file with the columns context_id and text: {error}") from error


def _jsonl(path: Path) -> list[dict[str, object]]:
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise RecordingError(f"{path}: line {number} is no JSON object")
                rows.append(row)
    except UnicodeDecodeError as error:
        raise RecordingError(f"{path}: not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise RecordingError(f"{path}: line {number} is no JSON: {error}") from error
    return rows
