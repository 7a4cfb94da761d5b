"""`trackrec serve` as a process: ready, what it says, and its end."""

import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from pydantic import BaseModel

from tests.ports import free_address
from trackrec import storage
from trackrec.config import EncodeSettings
from trackrec.fetch import fetch
from trackrec.serving import repository, server, version


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

    def __init__(self, *arguments: str, ports: Sequence[str] = ()) -> None:
        self.ports = list(ports) or [free_address().rpartition(":")[2] for _ in range(3)]
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
    one = Served("--repository", str(link), "--features", "runs/features")
    yield one
    if one.process.poll() is None:
        one.process.send_signal(signal.SIGTERM)
        one.ended()


def process_of(command: int) -> Path:
    """The server that the process `command` started, in /proc."""
    [process] = Path(f"/proc/{command}/task/{command}/children").read_text().split()
    return Path("/proc", process)


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
    process = process_of(served.process.pid)
    # Its working folder is the repository, and the path was meant from here.
    assert f"{server.FEATURES_ENV}={Path('runs/features').resolve()}" in (process / "environ").read_text().split("\0")
    prefix = (process / "cmdline").read_text().partition("shm-region-prefix-name=")[2].partition("\0")[0]
    assert list(Path("/dev/shm").glob(f"{prefix}*"))
    # A web page's request, which would run its code.
    load = urllib.request.Request(f"http://127.0.0.1:{http}/v2/repository/models/theirs/load", data=b"{}")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(load, timeout=10)
    with triton.InferenceServerClient(f"127.0.0.1:{grpc}") as client:
        # The batch job loads a dead model anew.
        assert [model.name for model in client.get_model_repository_index().models] == ["encoder"]
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


class Other(BaseHTTPRequestHandler):
    """A Triton server that is ready, of someone else."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"name": "triton"}')

    def log_message(self, *_: object) -> None:
        pass


def test_where_another_server_has_the_port_nothing_is_started(published: Path) -> None:
    with serving(Other) as port:
        free = free_address().rpartition(":")[2]
        log = Path(tempfile.gettempdir()) / f"trackrec-serve-{os.getuid()}-{free}.log"
        log.write_text("the other's")
        try:
            told = failed("--repository", str(published), ports=(free, port, free_address().rpartition(":")[2]))
            assert f"port {port} of 127.0.0.1 cannot be had (Address already in use)" in told and "loading" not in told
            assert log.read_text() == "the other's"
        finally:
            log.unlink()


def test_another_servers_answer_is_not_its_own(tmp_path: Path) -> None:
    """One that has taken the port since it was found free."""
    (tmp_path / "log").write_text("address already in use")
    with serving(Other) as port, subprocess.Popen(["sleep", "60"]) as process:
        one = server.Server(process, "", f"127.0.0.1:{port}", "", tmp_path / "log", "own-", contextlib.ExitStack())
        assert not one.ready()
        one.shm_prefix = "triton"
        assert one.ready()
        process.kill()
        process.wait()
        assert not one.ready()
        with pytest.raises(server.ServerError, match=r"ended; the end of (?s:.*)already in use"):
            one.wait_ready(5)


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        try:
            yield str(found.server_port)
        finally:
            found.shutdown()
            thread.join()


@pytest.mark.parametrize(("address", "local"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_models_are_loaded_by_nobody_or_by_this_machines_grpc_clients(address: str, local: bool) -> None:
    http, grpc = server._closed(address)
    assert re.fullmatch("--http-restricted-api=model-repository,shared-memory,trace,logging:key=[0-9a-f]{32}", http)
    assert grpc.startswith("--grpc-restricted-protocol=") and "shared-memory,trace,logging:key=" in grpc
    assert ("model-repository" not in grpc) == local


@pytest.mark.parametrize("given", [{}, {server.FEATURES_ENV: "/own"}])
def test_the_shells_feature_table_is_not_served(
    given: dict[str, str], published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(server.FEATURES_ENV, "/of/another/server")
    running = server.start(published, tmp_path / "log", environment=given, outlives=False)
    try:
        end = time.monotonic() + 10
        # Empty while the process becomes the server.
        while not (variables := Path(f"/proc/{running.process.pid}/environ").read_text()):
            assert time.monotonic() < end
    finally:
        running.kill()
    found = [each for each in variables.split("\0") if each.startswith(f"{server.FEATURES_ENV}=")]
    assert found == [f"{name}={value}" for name, value in given.items()]


def test_ctrl_c_while_it_loads_ends_it(served: Served) -> None:
    served.wait_for("loading version")
    served.process.send_signal(signal.SIGINT)
    assert served.ended() == 0
    assert "ready" not in "".join(served.lines)


def test_a_killed_command_takes_its_server_with_it(served: Served) -> None:
    """Which would hold the ports."""
    served.wait_for("loading version")
    process = process_of(served.process.pid)
    served.process.kill()
    end = time.monotonic() + 60
    while process.exists():
        assert time.monotonic() < end
        time.sleep(0.1)


def failed(*arguments: str, ports: Sequence[str] = ()) -> str:
    one = Served(*arguments, ports=ports)
    assert one.ended() == 1
    return " ".join("".join(one.lines).split())


def test_what_is_damaged_or_no_version_is_not_served(published: Path, tmp_path: Path) -> None:
    assert "has no version.json" in failed("--repository", str(tmp_path))
    damaged = tmp_path / "repository"
    shutil.copytree(published, damaged)
    with (damaged / "encoder/config.pbtxt").open("a") as file:
        file.write("\n")
    assert "encoder/config.pbtxt is missing or differs from its checksum" in failed("--repository", str(damaged))


def test_the_servers_environment_may_lie_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one of this release with nothing but the files that are looked for."""
    environment = tmp_path / "of two words"
    venv.create(environment, with_pip=False)
    release = f"{sys.version_info.major}.{sys.version_info.minor}"
    bundled = environment / f"lib/python{release}/site-packages/pytriton/tritonserver"
    for name in (
        "backends/python/libtriton_python.so",
        "backends/python/triton_python_backend_utils.py",
        f"python_backend_stubs/{release}/triton_python_backend_stub",
    ):
        (bundled / name).parent.mkdir(parents=True, exist_ok=True)
        (bundled / name).touch()
    monkeypatch.setenv(server.ENV, str(environment))
    command, variables = server._installation(tmp_path / "scratch")
    assert command[0] == str(bundled / "bin/tritonserver")
    assert variables["LD_LIBRARY_PATH"].startswith(f"{bundled.parents[1]}/nvidia_pytriton.libs:/")
    backends = tmp_path / "scratch/backends"
    assert {path.name for path in backends.glob("*/*")} >= {"triton_python_backend_stub", "model.py"}


def test_without_a_server_it_says_what_to_run(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKREC_TRITON", str(tmp_path / "none"))
    assert "make one with `bash requirements/venv.sh triton`" in failed("--repository", str(published))
