"""The commands that docs/storage.md shows, on a bucket."""

from pathlib import Path

import pytest
from google.cloud.storage import Client
from typer.testing import CliRunner

from pipelines.cli import local_inputs
from tests.data.raw_files import ML_1M_ROWS, read_rows, write_ml_1m
from tests.storage.directories import files_of, write
from trackrec import config_file, fetch, storage
from trackrec.cli import app

MODEL = {"config.json": b"{}", "model.safetensors": b"weights"}
CONFIGS = Path(__file__).parents[2] / "pipelines" / "configs"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))
    monkeypatch.setenv(fetch.CACHE_ENV, str(tmp_path / "cache"))


def run(*command: str, fails: bool = False) -> str:
    done = CliRunner().invoke(app, list(command))
    assert (done.exit_code != 0) == fails, done.output
    return done.output.strip()


def test_a_model_is_put_and_got(bucket: str, tmp_path: Path) -> None:
    write(tmp_path / "model", MODEL)
    uri = run("put", str(tmp_path / "model"), f"{bucket}/models/tiny")
    assert uri == storage.resolve(f"{bucket}/models/tiny")
    run("get", f"{bucket}/models/tiny", str(tmp_path / "back"))
    assert files_of(tmp_path / "back") == MODEL
    (tmp_path / "model" / "config.json").write_bytes(b"{1}")
    assert run("put", str(tmp_path / "model"), f"{bucket}/models/tiny", fails=True).startswith("error: gs://")
    assert run("put", str(tmp_path / "model"), f"{bucket}/models/tiny", "--replace") != uri
    said = run("get", f"{bucket}/models", str(tmp_path / "other"), fails=True)
    assert said.startswith(f"error: {bucket}/models has no published.json") and "\n" not in said


def test_raw_data_is_read_from_a_bucket(bucket: str, tmp_path: Path) -> None:
    raw = write_ml_1m(tmp_path / "raw")
    for name, data in files_of(raw).items():
        Client().bucket(bucket.removeprefix("gs://")).blob(f"raw/ml-1m/{name}").upload_from_string(data)
    out = tmp_path / "out"
    run("ingest", "--dataset", "ml-1m", "--raw", f"{bucket}/raw/ml-1m", "--out", str(out))
    assert read_rows(out) == ML_1M_ROWS
    said = run("ingest", "--dataset", "ml-1m", "--raw", f"{bucket}/raw/ml-2m", "--out", str(out), fails=True)
    assert said == f"error: {bucket}/raw/ml-2m: nothing lies there; check the name"


def test_a_run_takes_its_inputs_from_a_bucket(bucket: str, tmp_path: Path) -> None:
    raw = tmp_path / "ml-100k.zip"
    raw.write_bytes(b"raw")
    Client().bucket(bucket.removeprefix("gs://")).blob("ml-100k.zip").upload_from_filename(raw)
    model = write(tmp_path / "model", MODEL)
    uri = storage.upload(model, f"{bucket}/models/tiny")
    overrides = {"raw_data": f"{bucket}/ml-100k.zip", "base_model": uri}
    found, versions = local_inputs(config_file.load(CONFIGS / "quickstart.yaml", overrides), ["raw_data", "base_model"])
    assert versions["raw_data_version"] == storage.content_hash(raw)
    assert versions["base_model_version"] == storage.content_hash(model)
    assert Path(found["raw_data"]).read_bytes() == b"raw" and files_of(Path(found["base_model"])) == MODEL
