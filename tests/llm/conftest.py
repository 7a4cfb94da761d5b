import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def stopping_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with every eighth token ending a sequence: rows of one batch end at different steps."""
    out = tmp_path_factory.mktemp("stopping_model")
    shutil.copytree(tiny_model, out, dirs_exist_ok=True)
    stops = {"eos_token_id": list(range(2, 49152, 8)), "pad_token_id": 2}
    (out / "generation_config.json").write_text(json.dumps(stops), encoding="utf-8")
    return out
