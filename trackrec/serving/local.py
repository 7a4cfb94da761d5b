"""`trackrec serve`: a version on this machine, in the foreground."""

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from trackrec import storage
from trackrec.serving import server, version

_LOOK_SECONDS = 0.5


def serve(
    repository: Path,
    *,
    address: str,
    ports: tuple[int, int, int],
    features: str | None,
    ready_seconds: float,
    say: Callable[[str], None],
) -> None:
    """Serves until SIGTERM or SIGINT; requests under way are answered first, for `server.EXIT_SECONDS`.

    Args:
        repository: a published version; a link is followed once, so that a newer release changes nothing here.
        ports: gRPC, HTTP, metrics.
        features: where `dt=…` partitions are committed, a folder or gs://; none: rankers know no user.
        say: prints a line.

    Raises:
        NotPublishedError, CorruptError: the repository is none, or differs from its checksums.
        ServerError: no server is installed, a port is in use, it does not load the models, or it ended by itself.
    """
    repository = repository.resolve()
    served = version.read(repository)
    storage.verify(repository)
    if features is not None and not storage.is_remote(features):
        # The server's working folder is the repository.
        features = str(Path(features).resolve())
    # Before the log is touched: it may be that of the server which has the ports.
    server.check_free(address, ports)
    # Each of a machine's users has a file of their own.
    log = Path(tempfile.gettempdir()) / f"trackrec-serve-{os.getuid()}-{ports[0]}.log"
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        environment = {} if features is None else {server.FEATURES_ENV: features}
        running = server.start(repository, log, address=address, ports=ports, environment=environment, outlives=False)
        try:
            say(f"loading version {served.version} of the run {served.run}; the server's log is {log}")
            if _ready(running, ready_seconds, ended):
                models = ", ".join(served.models)
                say(f"ready: {models}\ngRPC {running.grpc}, HTTP {running.http}, metrics {running.metrics}/metrics")
                for name, why in served.absent.items():
                    say(f"no {name}: {why}")
            while not ended.wait(_LOOK_SECONDS):
                if running.process.poll() is not None:
                    running.wait_ready(0)  # raises, with the log's end
            say(f"ending: requests under way are answered first, for {server.EXIT_SECONDS} s at most")
        finally:
            running.stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ready(running: server.Server, seconds: float, ended: threading.Event) -> bool:
    """Waits for it; False where it is to end before that."""
    waited = 0.0
    while not ended.is_set():
        if running.process.poll() is not None or waited >= seconds:
            running.wait_ready(0)
        if running.ready():
            return True
        ended.wait(_LOOK_SECONDS)
        waited += _LOOK_SECONDS
    return False
