"""The cluster that a task's pod runs in: its API under the pod's account, and what a task makes there on its own."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

from kubernetes import config
from kubernetes.client import ApiClient, ApiException
from urllib3.exceptions import HTTPError

# To connect, and to read: a connection that died silently must not hold the stage for ever.
TIMEOUT = (10, 60)

# A control plane that is being upgraded may be away for minutes; what runs in the cluster goes on meanwhile.
PATIENCE_SECONDS = 900.0
# Between two tries.
PAUSE_SECONDS = 3.0

_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

T = TypeVar("T")


class OutsideError(RuntimeError):
    """This is no pod, or one without a service account's token."""


class UnreachableError(RuntimeError):
    """The API did not answer for long; what runs in the cluster is left alone, and the stage's next try takes it up."""


@dataclass(frozen=True)
class Cluster:
    api: ApiClient
    namespace: str


def in_cluster(what: str) -> Cluster:
    """The cluster this pod runs in, under its service account.

    Args:
        what: needs it, for the message.

    Raises:
        OutsideError: there is none.
    """
    try:
        config.load_incluster_config()
        return Cluster(ApiClient(), _NAMESPACE.read_text(encoding="utf-8").strip())
    except (config.ConfigException, OSError) as error:
        raise OutsideError(f"{what} needs a pod with a service account's token ({error})") from None


def owners() -> list[dict[str, str]]:
    """The task's pod as an owner: what it owns goes when the run is deleted."""
    if "KFP_POD_UID" not in os.environ:
        return []
    return [{"apiVersion": "v1", "kind": "Pod", "name": os.environ["KFP_POD_NAME"], "uid": os.environ["KFP_POD_UID"]}]


def line(error: ApiException | HTTPError) -> str:
    """What went wrong, on one line: the API's own message, where it sent one."""
    if isinstance(error, ApiException):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return str(json.loads(error.body)["message"])
        return f"{error.status} {error.reason}"
    return " ".join(str(error).split())


class Patience:
    """Calls of the API, made again while its faults are such as pass."""

    def __init__(self) -> None:
        self._heard = time.monotonic()

    def call(self, call: Callable[[], T], passing: tuple[int, ...] = (429,)) -> T:
        """What `call`, which may be made twice, answers in the end.

        Args:
            passing: status codes below 500 that pass, too.

        Raises:
            ApiException: it is refused.
            UnreachableError: no call of this instance has been answered for long.
        """
        while True:
            try:
                answer = call()
                self._heard = time.monotonic()
                return answer
            except (ApiException, HTTPError) as error:
                self.bear(error, passing)

    def bear(self, error: ApiException | HTTPError, passing: tuple[int, ...] = (429,)) -> None:
        """Waits a little after a fault that passes.

        Raises:
            ApiException: it does not: `error` itself.
            UnreachableError: as for `call`.
        """
        if isinstance(error, ApiException) and (error.status or 500) < 500 and error.status not in passing:
            raise error
        if time.monotonic() - self._heard > PATIENCE_SECONDS:
            raise UnreachableError(f"the Kubernetes API has not answered for long: {line(error)}") from None
        time.sleep(PAUSE_SECONDS)


def refusal(error: ApiException, verb: str, what: str, *, absent: str, role: str) -> str:
    """Why a call was refused, and what to do.

    Args:
        absent: the whole message where the API knows no such thing.
        role: what the service account `trackrec` must be bound to.
    """
    if error.status == 404:
        return absent
    if error.status in (401, 403):
        return (
            f"may not {verb} {what}: {line(error)}; run as the service account `trackrec`, bound to the Role `{role}`"
        )
    return f"cannot {verb} {what}: {line(error)}"


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """A cancelled task's pod gets SIGTERM, and half a minute."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the deletion is not to be cut short
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
