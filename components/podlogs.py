"""What a job's pods write, and why those that do not run do not."""

import datetime as dt
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from kubernetes.client import ApiException, CoreV1Api
from urllib3.exceptions import HTTPError

from components.incluster import TIMEOUT, line

_INDEX = "batch.kubernetes.io/job-completion-index"
_JOB = "jobset.sigs.k8s.io/jobset-name"
# Kept of each pod, for when it fails.
_TAIL = 60
# A pod's clock may be so far from ours.
_SKEW_SECONDS = 60


@dataclass
class _Pod:
    newest: str = ""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL))
    said: str = ""


class PodLogs:
    """Prints the first node's log, whichever pod is that node by then, and of the others the last lines once they fail.

    Args:
        job: the name of the pods' JobSet.
        container: whose log is read.
    """

    def __init__(self, api: CoreV1Api, namespace: str, job: str, container: str) -> None:
        self.api = api
        self.namespace = namespace
        self.selector = f"{_JOB}={job}"
        self.container = container
        self.pods: dict[str, _Pod] = {}

    def read(self, failed: bool = False) -> None:
        """Prints what is new. A log that cannot be read now is not worth a training: that is said, no more.

        Args:
            failed: the job has, so that every node's last lines count.
        """
        try:
            pods = self.api.list_namespaced_pod(
                self.namespace, label_selector=self.selector, _request_timeout=TIMEOUT
            ).items
        except (ApiException, HTTPError) as error:
            self._say("", f"the nodes' pods cannot be listed: {line(error)}")
            return
        for pod in sorted(pods, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name)):
            self._read(pod, failed)

    def _read(self, pod: Any, job_failed: bool) -> None:
        name, index = pod.metadata.name, pod.metadata.labels.get(_INDEX, "?")
        known = self.pods.setdefault(name, _Pod())
        if pod.status.phase == "Pending":
            self._say(name, f"node {index} waits: {_waits_for(pod)}")
            return
        fresh = self._new_lines(name, known)
        if index == "0":
            for text in fresh:
                print(text, flush=True)
        known.tail.extend(fresh)
        failed = pod.status.phase == "Failed"
        if not failed and not job_failed:
            return
        lines = "" if index == "0" else "".join(f"\n[node {index}] {text}" for text in known.tail)
        reason = f": {pod.status.reason}" if pod.status.reason else _exit(pod)
        self._say(name, f"node {index} ({name}) {'failed' if failed else 'was there'}{reason}{lines}")

    def _new_lines(self, name: str, known: _Pod) -> list[str]:
        since = {}
        if known.newest:
            then = dt.datetime.fromisoformat(known.newest[:19] + "+00:00")
            since["since_seconds"] = int((dt.datetime.now(dt.UTC) - then).total_seconds()) + _SKEW_SECONDS
        try:
            text: str = self.api.read_namespaced_pod_log(
                name, self.namespace, container=self.container, timestamps=True, _request_timeout=TIMEOUT, **since
            )
        except (ApiException, HTTPError) as error:
            if not isinstance(error, ApiException) or error.status not in (400, 404):  # not started yet, or gone
                self._say(name, f"the log of {name} cannot be read: {line(error)}")
            return []
        fresh = []
        for entry in (text or "").splitlines():
            stamp, _, rest = entry.partition(" ")
            if _sortable(stamp) > known.newest:
                fresh.append(rest)
                last = _sortable(stamp)
        if fresh:
            known.newest = last
        return fresh

    def _say(self, pod: str, what: str) -> None:
        """Prints `what` of a pod, unless that was the last thing said of it."""
        known = self.pods.setdefault(pod, _Pod())
        if known.said != what:
            known.said = what
            print(what, flush=True)


def _sortable(stamp: str) -> str:
    """RFC 3339 leaves trailing zeros of the nanoseconds out."""
    seconds, _, fraction = stamp.removesuffix("Z").partition(".")
    return f"{seconds}.{fraction:0<9}"


def _waits_for(pod: Any) -> str:
    for status in pod.status.container_statuses or []:
        if status.state and status.state.waiting:
            waiting = status.state.waiting
            return f"{waiting.reason} {waiting.message or ''}".strip()
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"{condition.message or condition.reason}"
    return "being started"


def _exit(pod: Any) -> str:
    for status in pod.status.container_statuses or []:
        if status.state and status.state.terminated:
            return f" with status {status.state.terminated.exit_code}"
    return ""
