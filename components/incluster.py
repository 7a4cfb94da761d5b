"""The cluster that a task's pod runs in: its API under the pod's account, and what a task makes there on its own."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from kubernetes import config
from kubernetes.client import ApiClient, ApiException
from urllib3.exceptions import HTTPError

# To connect, and to read: a connection that died silently must not hold the stage for ever.
TIMEOUT = (10, 60)

_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class OutsideError(RuntimeError):
    """This is no pod, or one without a service account's token."""


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
