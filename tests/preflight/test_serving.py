"""Whether Triton serves what the batch feature job needs: a real server, sound and not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import fakes
from trackrec import config_file
from trackrec.preflight import serving as checks
from trackrec.preflight.findings import Finding, PreflightError
from trackrec.serving import server
from trackrec.stages import preflight

QUICKSTART = Path("pipelines/configs/quickstart.yaml")


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    """Its generator is for books; its encoder's config is another release's."""
    folder = tmp_path_factory.mktemp("triton")
    repository = fakes.repository(folder / "repository", generator={"domain": "books", "model_version": "g" * 64})
    config = repository / "encoder/config.pbtxt"
    whole = config.read_text(encoding="utf-8")
    config.write_text(whole.replace("pooling", "pooled"), encoding="utf-8")
    with server.running(repository, folder / "log") as running:
        yield running


def texts(found: Iterator[Finding]) -> list[str]:
    return [str(finding) for finding in found]


def test_a_server_that_serves_what_is_needed(tmp_path: Path) -> None:
    with server.running(fakes.repository(tmp_path / "repository"), tmp_path / "log") as running:
        found = texts(checks.triton(running.grpc, "movies", 8))
        where = f"✔ Triton at {running.grpc} serves the"
        assert found == [f"{where} generator, version g1", f"{where} encoder, version e1"]

        out, loaded = tmp_path / "checks.md", config_file.load(QUICKSTART)
        uris = {"root": str(tmp_path), "raw_data": str(QUICKSTART), "base_model": "", "encoder": ""}
        job = {"triton": running.grpc, "out": str(tmp_path / "features")}
        preflight.run(loaded, **uris, **job, checks=out)
        assert f"features can be written to {tmp_path / 'features'}" in out.read_text()
        # The ranking models' encoder is none of this job's.
        assert "encoder has" not in out.read_text()
        with pytest.raises(PreflightError, match=r"1 thing to mend.*\n.*features\.out: s3://b/f is no place"):
            preflight.run(loaded, **uris, **(job | {"out": "s3://b/f"}), checks=tmp_path / "none.md")
        assert not (tmp_path / "none.md").exists() and not (tmp_path / "features").exists()


def test_models_of_another_domain_or_release_are_told_apart(triton: server.Server) -> None:
    domain, release = texts(checks.triton(triton.grpc, "movies", 8))
    assert "its generator was aligned on prompts of the domain 'books', and `contexts.domain` is 'movies'" in domain
    assert "the model encoder has another contract" in release and release.startswith("✘")
    sound, _ = texts(checks.triton(triton.grpc, "books", 8))
    assert sound == f"✔ Triton at {triton.grpc} serves the generator, version {'g' * 12}"


def test_shorter_histories_than_the_generators_are_told(triton: server.Server) -> None:
    short, _ = texts(checks.triton(triton.grpc, "books", 7))
    assert "was aligned on prompts of 8 items, and the users' table will have 7; give the config" in short


def test_a_model_that_is_not_loaded(tmp_path: Path) -> None:
    repository = fakes.repository(tmp_path / "repository")
    with server.running(repository, tmp_path / "log", models=["generator"]) as running:
        _, lacking = texts(checks.triton(running.grpc, "movies", 8))
    assert lacking.startswith("✘") and "serves no model 'encoder', or it is not loaded" in lacking


def test_a_server_that_does_not_answer() -> None:
    [found] = texts(checks.triton("127.0.0.1:9", "movies", 8))
    assert found.startswith("✘ Triton at 127.0.0.1:9 does not answer (") and "mend `features.triton`" in found


def test_a_place_that_goes_with_the_pod_or_cannot_be_written(tmp_path: Path) -> None:
    [lost] = texts(checks.features(str(tmp_path), pod=True))
    assert "is a folder of this pod and goes with it; give gs://BUCKET/PATH" in lost
    (tmp_path / "file").write_text("")
    [shut] = texts(checks.features(str(tmp_path / "file" / "below"), pod=False))
    assert shut.startswith("✘ features.out: ") and "cannot write" in shut
