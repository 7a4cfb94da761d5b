"""Running the stage over raw files, sound and broken."""

from pathlib import Path
from typing import Any

import pytest

from trackrec.config import IngestSettings
from trackrec.data.raw import RawDataError
from trackrec.data_config import DataSettings
from trackrec.stages import ingest


def run(out: Path, raw: Path | str, dataset: str = "ml-1m", data: DataSettings | None = None, **settings: Any) -> Path:
    given = IngestSettings.model_validate({"dataset": dataset, **settings})
    ingest.run(given, data or DataSettings(), raw=raw, interactions=out, items=out)
    return out


def refused(tmp_path: Path, match: str, dataset: str, raw: Path | str, **settings: Any) -> None:
    """The error names file and line, and nothing appears where the output would be."""
    target = tmp_path / "published" / "out"
    with pytest.raises(RawDataError, match=match):
        run(target, raw, dataset, **settings)
    assert list(target.parent.iterdir()) == []
