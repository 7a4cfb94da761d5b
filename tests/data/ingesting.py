"""Running the stage over raw files, sound and broken."""

from pathlib import Path
from typing import Any

import pytest

from trackrec.config import IngestSettings
from trackrec.data.raw import RawDataError
from trackrec.stages import ingest


def run(out: Path, raw: Path, dataset: str = "ml-1m", **settings: Any) -> Path:
    ingest.run(IngestSettings.model_validate({"dataset": dataset, **settings}), raw=raw, interactions=out, items=out)
    return out


def refused(tmp_path: Path, match: str, dataset: str, raw: Path, **settings: Any) -> None:
    """The error names file and line, and nothing appears where the output would be."""
    target = tmp_path / "published" / "out"
    with pytest.raises(RawDataError, match=match):
        run(target, raw, dataset, **settings)
    assert list(target.parent.iterdir()) == []
