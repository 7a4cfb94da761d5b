from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.serving import fakes
from trackrec import storage
from trackrec.features import job, table
from trackrec.features.commit import commit
from trackrec.features.job import Done
from trackrec.serving import server
from trackrec.serving.server import Server
from trackrec.serving_config import FeaturesSettings

WIDTH = 8


@dataclass
class Fake:
    """A running server with the fakes, and what its generator was asked for."""

    server: Server
    repository: Path
    log: Path

    def asked(self) -> list[str]:
        """Hashes of the prompts since the last call."""
        lines = self.log.read_text(encoding="ascii").splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def settings(self, **given: object) -> FeaturesSettings:
        defaults = {"triton": self.server.grpc, "shard_users": 50, "concurrency": 16, "encoder_batch": 8}
        return FeaturesSettings.model_validate({**defaults, "deadline_s": 30, "retries": 3, **given})


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    folder = tmp_path_factory.mktemp("fake")
    repository = fakes.repository(folder / "repository", width=WIDTH, log=folder / "asked")
    with server.running(repository, folder / "log") as running:
        yield Fake(running, repository, folder / "asked")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))
    return tmp_path / "work"


def rows(out: Path | str, dt: str) -> pa.Table:
    """A date's rows without the one column that tells times."""
    paths = sorted(Path(out, table.date_folder(dt)).glob("shard=*/part.parquet"))
    tables = [pq.ParquetFile(path).read() for path in paths]
    return pa.concat_tables(each.replace_schema_metadata() for each in tables).drop_columns("seconds")


def run(settings: FeaturesSettings, users: Path, out: Path, dt: str = "2026-11-28") -> Done:
    """The job and its commit."""
    done = job.run_shards(settings, users, str(out), dt)
    commit(settings, str(out), dt)
    return done
