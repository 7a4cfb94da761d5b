"""`trackrec serve` as a process: ready, what it says, and its end."""

import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from pydantic import BaseModel

from tests.ports import free_address
from trackrec import storage
from trackrec.config import EncodeSettings
from trackrec.fetch import fetch
from trackrec.serving import repository, version


class _None(BaseModel):
    pass


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version of the encoder alone: quick to load."""
    out = tmp_path_factory.mktemp("version") / "repository"
    with storage.publish("export", _None(), inputs={}, outputs={"repository": out}) as job:
        folder = job.outputs["repository"]
        contract = repository.write_encoder(folder / "encoder", EncodeSettings(), encoder=fetch("all-minilm-l6-v2"))
        what = version.Version(
            version=version.name_of(folder),
            run="small-1",
            config={},
            models={"encoder": contract.model_dump(mode="json")},
            absent={"generator": "the test has none"},
            metrics={},
            packages={},
            smoke={},
        )
        version.write(folder, what)
    return out


class Served:
    """The command under way, and the lines it has printed."""

    def __init__(self, *arguments: str) -> None:
        self.ports = [free_address().rpartition(":")[2] for _ in range(3)]
        names = ("--port", "--http-port", "--metrics-port")
        options = [part for name, port in zip(names, self.ports, strict=True) for part in (name, port)]
        command = [str(Path(sys.executable).with_name("trackrec")), "serve", *arguments, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def wait_for(self, text: str, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while text not in "".join(self.lines):
            assert self.process.poll() is None and time.monotonic() < end, "".join(self.lines)
            time.sleep(0.1)

    def ended(self, seconds: float = 60) -> int:
        code = self.process.wait(seconds)
        self.reader.join(10)
        return code


@pytest.fixture
def served(published: Path, tmp_path: Path) -> Iterator[Served]:
    link = tmp_path / "release"
    storage.link(link, published)
    one = Served("--repository", str(link))
    yield one
    if one.process.poll() is None:
        one.process.send_signal(signal.SIGTERM)
        one.ended()


def shm_prefix(command: int) -> str:
    """Of the server that the process `command` started."""
    [server] = Path(f"/proc/{command}/task/{command}/children").read_text().split()
    line = Path(f"/proc/{server}/cmdline").read_text()
    return line.partition("shm-region-prefix-name=")[2].partition("\0")[0]


def scraped(port: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        found: bytes = answer.read()
    return found


def test_it_says_what_it_serves_and_where_and_drains_at_the_end(served: Served, published: Path) -> None:
    served.wait_for("ready: encoder")
    told = "".join(served.lines)
    grpc, http, metrics = served.ports
    assert f"version {version.read(published).version} of the run small-1" in told
    assert f"gRPC 127.0.0.1:{grpc}, HTTP 127.0.0.1:{http}" in told and "no generator: the test has none" in told
    prefix = shm_prefix(served.process.pid)
    assert list(Path("/dev/shm").glob(f"{prefix}*"))
    with triton.InferenceServerClient(f"127.0.0.1:{grpc}") as client:
        # Two of these are more than a batch: the second waits for the first, the third for both.
        given = triton.InferInput("text", [20, 1], "BYTES")
        given.set_data_from_numpy(np.array([[b"quiet films about the sea " * 12]] * 20, dtype=object))
        answers: queue.Queue[object] = queue.Queue()
        for _ in range(3):
            client.async_infer("encoder", [given], lambda result, error: answers.put(error or result))
        waiting = b'nv_inference_pending_request_count{model="encoder",version="1"} '
        end = time.monotonic() + 30
        while scraped(metrics).partition(waiting)[2][:1] == b"0":
            assert time.monotonic() < end
        served.process.send_signal(signal.SIGTERM)
        assert served.ended() == 0
        for _ in range(3):
            answer = answers.get(timeout=10)
            assert isinstance(answer, triton.InferResult), answer
            assert answer.as_numpy("embedding").shape == (20, 384)
    assert "requests under way are answered first" in "".join(served.lines)
    assert not list(Path("/dev/shm").glob(f"{prefix}*"))


def test_ctrl_c_while_it_loads_ends_it(served: Served) -> None:
    served.wait_for("loading version")
    served.process.send_signal(signal.SIGINT)
    assert served.ended() == 0
    assert "ready" not in "".join(served.lines)


def failed(*arguments: str) -> str:
    one = Served(*arguments)
    assert one.ended() == 1
    return " ".join("".join(one.lines).split())


def test_what_is_damaged_or_no_version_is_not_served(published: Path, tmp_path: Path) -> None:
    assert "has no version.json" in failed("--repository", str(tmp_path))
    damaged = tmp_path / "repository"
    shutil.copytree(published, damaged)
    with (damaged / "encoder/config.pbtxt").open("a") as file:
        file.write("\n")
    assert "encoder/config.pbtxt is missing or differs from its checksum" in failed("--repository", str(damaged))


def test_without_a_server_it_says_what_to_run(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKREC_TRITON", str(tmp_path / "none"))
    assert "make one with `bash images/triton/venv.sh`" in failed("--repository", str(published))
