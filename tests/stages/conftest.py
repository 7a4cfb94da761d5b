import os
import shutil
from pathlib import Path

import pytest

from trackrec.config import IngestSettings
from trackrec.stages import ingest

# GroupLens forbids redistribution, so a copy may lie beside the checkout, or where this says.
ML_1M_ENV = "TRACKREC_ML_1M"
_BESIDE = Path(__file__).parents[3] / "shared" / "data" / "ml-1m.zip"


@pytest.fixture(scope="session")
def ml_1m_zip() -> Path:
    """The real ml-1m.zip; the test is skipped where there is none."""
    path = Path(os.environ.get(ML_1M_ENV) or _BESIDE)
    if not path.is_file():
        pytest.skip(f"needs GroupLens's ml-1m.zip: download it and set {ML_1M_ENV} to its path")
    return path


@pytest.fixture(scope="session")
def ml_1m(ml_1m_zip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real ML-1M, ingested."""
    out = tmp_path_factory.mktemp("ml_1m") / "tables"
    ingest.run(IngestSettings(dataset="ml-1m"), raw=ml_1m_zip, interactions=out, items=out)
    return out


@pytest.fixture(scope="session")
def spark() -> None:
    """Skips the test where there is no Java to run Spark on."""
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Spark needs Java 17 or later")
