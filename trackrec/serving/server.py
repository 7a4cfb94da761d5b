"""Triton Inference Server on this machine, as a child process.

The server is NVIDIA's own: in the production image its installation; elsewhere the one inside the `nvidia-pytriton`
wheel, in an environment of its own (`requirements/venv.sh`), which brings no vLLM. There `backends/vllm`, a
backend of the same name and contract over transformers, serves the same repository.
"""

import contextlib
import ipaddress
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import IO

# Where NVIDIA's images have it.
INSTALLED = Path("/opt/tritonserver")
# Where the rankers find the feature table.
FEATURES_ENV = "TRACKREC_FEATURES"
# Names another environment with the wheel in it.
ENV = "TRACKREC_TRITON"
_BACKENDS = Path(__file__).parent / "backends"
# A drained server ends by itself; a stuck model is given up on.
EXIT_SECONDS = 8
_POLL_SECONDS = 0.05
# The models are processes that share the cores. A thread that spins while it waits for the others of its operation, as
# OpenMP's do, keeps them from running: beside another busy process a decoding step took ten times as long.
_SHARED = {"OMP_WAIT_POLICY": "PASSIVE"}
# Before a command: SIGTERM where its parent is gone, which could stop it no more. Of util-linux, as every base has it.
_TIED = ("setpriv", "--pdeathsig", "TERM", "--")
# Of an environment's python: where its packages and its own libraries are, and its release.
_ASKED = """
import json, sys, sysconfig
release = ".".join(map(str, sys.version_info[:2]))
print(json.dumps([sysconfig.get_path("purelib"), sysconfig.get_config_var("LIBDIR"), release]))
"""


class ServerError(RuntimeError):
    """The server is not installed, or does not get ready; the message says what to do, or ends with its log."""


@dataclass
class Server:
    """A running server. Its process group holds the models' processes as well."""

    process: subprocess.Popen[bytes]
    grpc: str
    http: str
    metrics: str
    log: Path
    # Its own, and what it calls itself, too.
    shm_prefix: str
    # What lives as long as the server.
    scratch: contextlib.ExitStack = field(repr=False)

    def ready(self) -> bool:
        """Whether it runs and has loaded its models. One that is unloaded later changes nothing: ask the model."""
        if self.process.poll() is not None:
            return False
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2", timeout=5) as answer:
                # Another server that has the port would answer for this one.
                if f'"{self.shm_prefix}"'.encode() not in answer.read():
                    return False
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5):
                return True
        except (OSError, HTTPException):
            return False

    def wait_ready(self, seconds: float) -> None:
        """
        Raises:
            ServerError: it ended, or is not ready within `seconds`; the log's last lines are in the message.
        """
        end = time.monotonic() + seconds
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > end:
                what = "ended" if self.process.poll() is not None else f"was not ready within {seconds:g} s"
                lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
                raise ServerError("\n".join([f"the Triton server {what}; the end of {self.log}:", *lines]))
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Ends it as Kubernetes does: requests under way are answered first, for `EXIT_SECONDS`."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(EXIT_SECONDS + 5)
        self.kill()

    def kill(self) -> None:
        """Ends it at once, its models' processes too, and removes what they leave in shared memory."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for left in Path("/dev/shm").glob(f"{self.shm_prefix}*"):
            left.unlink(missing_ok=True)
        self.scratch.close()


def start(
    repository: Path,
    log: Path,
    *,
    models: Sequence[str] = (),
    address: str = "127.0.0.1",
    ports: tuple[int, int, int] | None = None,
    environment: dict[str, str] | None = None,
    outlives: bool = True,
) -> Server:
    """Starts the server with `repository` as its working folder: paths in a model's files are relative to it.

    Args:
        log: what the server writes; replaced.
        models: those to load; all by default.
        ports: gRPC, HTTP and metrics; free ones by default.
        environment: further variables of the server and its models; the feature table is inherited from nobody.
        outlives: it stays if this process is killed; else it ends as by `stop`, also when the calling thread ends.

    Raises:
        ServerError: no server is installed here.
    """
    scratch = contextlib.ExitStack()
    try:
        command, variables = _installation(Path(scratch.enter_context(tempfile.TemporaryDirectory())))
        grpc, http, metrics = ports or _free_ports(address)
        prefix = f"trackrec-{secrets.token_hex(6)}-"
        command += [f"--model-repository={repository.resolve()}", "--allow-gpu-metrics=false" if not _has_gpu() else ""]
        command += ["--model-control-mode=explicit", *(f"--load-model={name}" for name in models or ["*"])]
        command += [f"--{kind}-address={address}" for kind in ("grpc", "http", "metrics")]
        command += [f"--grpc-port={grpc}", f"--http-port={http}", f"--metrics-port={metrics}"]
        command += _closed(address)
        command += [f"--id={prefix}", f"--backend-config=python,shm-region-prefix-name={prefix}"]
        command += [f"--exit-timeout-secs={EXIT_SECONDS}"]
        # A shell's own, set for another server, would be served here.
        inherited = {name: value for name, value in os.environ.items() if name != FEATURES_ENV}
        out: IO[bytes] = scratch.enter_context(log.open("wb"))
        process = subprocess.Popen(
            [*([] if outlives else _TIED), *(part for part in command if part)],
            cwd=repository,
            env={**_SHARED, **inherited, **variables, **(environment or {})},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except BaseException:
        scratch.close()
        raise
    return Server(process, f"{address}:{grpc}", f"{address}:{http}", f"{address}:{metrics}", log, prefix, scratch)


@contextlib.contextmanager
def running(
    repository: Path,
    log: Path,
    *,
    models: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    ready_seconds: float = 300,
) -> Iterator[Server]:
    """`start`, ready; stopped at the end."""
    server = start(repository, log, models=models, environment=environment, outlives=False)
    try:
        server.wait_ready(ready_seconds)
        yield server
    finally:
        server.stop()


def check_installed() -> None:
    """
    Raises:
        ServerError: no server is installed here.
    """
    if not (INSTALLED / "bin/tritonserver").is_file():
        _environment()


def check_free(address: str, ports: Sequence[int]) -> None:
    """
    Raises:
        ServerError: one cannot be had.
    """
    for port in ports:
        with socket.socket() as tried:
            # As the server binds it: connections of an earlier one that are still being closed do not count.
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((address, port))
            except OSError as error:
                raise ServerError(
                    f"port {port} of {address} cannot be had ({error.strerror}): end what has it, or give other ports"
                ) from error


def _closed(address: str) -> list[str]:
    """Options that close what runs a caller's code, maps memory or writes files: it takes a key that nobody has.

    HTTP's doors are closed everywhere, since a web page in a browser on this machine reaches them. No page speaks gRPC:
    on this machine alone its clients may load models, as the batch job does with one whose process has died.
    """
    key = secrets.token_hex(16)
    doors = "shared-memory,trace,logging"
    local = all(ipaddress.ip_address(found[4][0]).is_loopback for found in socket.getaddrinfo(address, None))
    return [
        f"--http-restricted-api=model-repository,{doors}:key={key}",
        f"--grpc-restricted-protocol={'' if local else 'model-repository,'}{doors}:key={key}",
    ]


def _installation(scratch: Path) -> tuple[list[str], dict[str, str]]:
    """The command and the variables of the server that is installed here."""
    if (INSTALLED / "bin/tritonserver").is_file():
        # With its own backends, as the pods of a Deployment have it: what answers here answers there.
        return [str(INSTALLED / "bin/tritonserver")], {}
    python = _environment()
    answer = subprocess.run([python, "-c", _ASKED], capture_output=True, text=True, check=True).stdout
    where, libraries, version = json.loads(answer)
    packages = Path(where)
    bundled = packages / "pytriton/tritonserver"
    backend = scratch / "backends/python"
    backend.mkdir(parents=True)
    # Copied, never linked: the backend looks for its stub beside itself.
    for source in (
        bundled / "backends/python/libtriton_python.so",
        bundled / "backends/python/triton_python_backend_utils.py",
        bundled / f"python_backend_stubs/{version}/triton_python_backend_stub",
    ):
        shutil.copy(source, backend)
    shutil.copytree(_BACKENDS / "vllm", scratch / "backends/vllm")
    variables = {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        # Without the python's own libraries the system's libpython is loaded, which has other packages.
        "LD_LIBRARY_PATH": f"{packages / 'nvidia_pytriton.libs'}:{libraries}",
    }
    command = [str(bundled / "bin/tritonserver"), f"--backend-directory={scratch / 'backends'}"]
    return [*command, "--pinned-memory-pool-byte-size=0"], variables


def _environment() -> Path:
    """The python of the environment that has the server's wheel."""
    venv = Path(os.environ.get(ENV, ".venv-triton")).absolute()
    python = venv / "bin/python"
    if not python.is_file():
        raise ServerError(
            f"no Triton server: {INSTALLED} is not there, nor is an environment in {venv}; make one with "
            f"`bash requirements/venv.sh triton`, or name one by {ENV}"
        )
    return python


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


def _free_ports(address: str) -> tuple[int, int, int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind((address, 0))
        first, second, third = (each.getsockname()[1] for each in sockets)
    return first, second, third
