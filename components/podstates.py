"""Why the pods of a Deployment are not ready: their states, their events, their last lines."""

from typing import Any

from kubernetes.client import ApiException, CoreV1Api
from urllib3.exceptions import HTTPError

from components.incluster import TIMEOUT, line

# States that end by themselves no more.
_NEVER = {
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ImagePullBackOff",
    "InvalidImageName",
}
# A container that has failed so often fails again: its node or its network had the time to get well.
_RESTARTS = 3
# So many pods that ended (evicted, say), and the next would, too.
_ENDED = 3
_TAIL = 40
_EVENTS = 3


class HopelessError(RuntimeError):
    """A pod that will not become ready; one line with the reason."""


class PodStates:
    """Says once what each pod waits for, and what one that failed wrote last."""

    def __init__(self, api: CoreV1Api, namespace: str) -> None:
        self.api = api
        self.namespace = namespace
        self.said: dict[str, str] = {}
        # By pod and container: the restarts before it was first looked at, which an earlier try may have waited out.
        self.restarts: dict[tuple[str, str], int] = {}
        # Those that had ended before the first look: Kubernetes keeps them listed, also of a rollout long ago.
        self.ended_before: set[str] | None = None

    def find(self, selector: str) -> list[Any]:
        """The pods, oldest first.

        Raises:
            ApiException, HTTPError: as the client does.
        """
        found = self.api.list_namespaced_pod(self.namespace, label_selector=selector, _request_timeout=TIMEOUT).items
        return sorted(found, key=lambda pod: (str(pod.metadata.creation_timestamp), pod.metadata.name))

    def look_at(self, pods: list[Any]) -> None:
        """
        Raises:
            HopelessError: one of them will not become ready, or too many have ended; their last lines are printed.
        """
        ended = [pod for pod in pods if has_ended(pod)]
        if self.ended_before is None:
            self.ended_before = {pod.metadata.name for pod in ended}
        ended = [pod for pod in ended if pod.metadata.name not in self.ended_before]
        for pod in ended:
            self.say(pod.metadata.name, f"pod {pod.metadata.name}: {_state(pod)}")
        if len(ended) >= _ENDED:
            for pod in ended:
                self.print_tail(pod)
            raise HopelessError(self.explain(ended))
        for pod in pods:
            if has_ended(pod):
                continue
            for status in _statuses(pod):
                waiting = status.state.waiting if status.state else None
                failed = status.state.terminated if status.state else None
                never = waiting is not None and waiting.reason in _NEVER
                ends = waiting is not None or (failed is not None and failed.exit_code != 0)
                restarts = status.restart_count or 0
                seen = self.restarts.setdefault((pod.metadata.name, status.name), restarts)
                if never or (ends and restarts - seen >= _RESTARTS):
                    self.print_tail(pod)
                    raise HopelessError(self.explain([pod]))
            if not is_ready(pod):
                self.say(pod.metadata.name, f"pod {pod.metadata.name}: {_state(pod)}")

    def explain(self, pods: list[Any]) -> str:
        """What those that are not ready wait for, with the warnings that Kubernetes has of them."""
        late = [pod for pod in pods if not is_ready(pod)]
        if not late:
            return "no new pod was made; see `kubectl describe` of the Deployment's newest ReplicaSet"
        return "; ".join(" - ".join([f"pod {p.metadata.name}: {_state(p)}", *self._warnings(p)]) for p in late)

    def print_tail(self, pod: Any) -> None:
        """The last lines of the container that keeps `pod` from being ready; of one that was restarted, before that."""
        name = pod.metadata.name
        late = next((status for status in _statuses(pod) if not status.ready), None)
        container = late.name if late else pod.spec.containers[0].name
        restarted = late is not None and bool(late.restart_count) and (late.state is None or late.state.running is None)
        try:
            text = self.api.read_namespaced_pod_log(
                name,
                self.namespace,
                container=container,
                previous=restarted,
                tail_lines=_TAIL,
                _request_timeout=TIMEOUT,
            )
        except (ApiException, HTTPError) as error:
            if not isinstance(error, ApiException) or error.status not in (400, 404):  # not started, or gone
                print(f"the log of {name} cannot be read: {line(error)}", flush=True)
            return
        for entry in (text or "").splitlines():
            # A server's log quotes texts that anyone may have written.
            print(f"[{name}] {''.join(sign if sign.isprintable() else ' ' for sign in entry)}", flush=True)

    def _warnings(self, pod: Any) -> "list[str]":
        try:
            found = self.api.list_namespaced_event(
                self.namespace,
                field_selector=f"involvedObject.name={pod.metadata.name},type=Warning",
                _request_timeout=TIMEOUT,
            ).items
        except (ApiException, HTTPError) as error:
            return [f"its events cannot be read: {line(error)}"]
        return [" ".join(f"{event.reason}: {event.message}".split())[:300] for event in found[-_EVENTS:]]

    def say(self, key: str, what: str) -> None:
        """Prints `what`, unless that was the last thing said of `key`."""
        if self.said.get(key) != what:
            self.said[key] = what
            print(what, flush=True)


def is_ready(pod: Any) -> bool:
    return any(c.type == "Ready" and c.status == "True" for c in pod.status.conditions or [])


def has_ended(pod: Any) -> bool:
    """Whether it runs no more, and never again: evicted, or its node was shut down. Another takes its place."""
    return pod.status.phase in ("Failed", "Succeeded")


def _statuses(pod: Any) -> list[Any]:
    return [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]


def _state(pod: Any) -> str:
    """What the first container that is not ready does."""
    if pod.status.reason:
        return " ".join(f"{pod.status.reason} {pod.status.message or ''}".split())
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"{condition.reason}: {condition.message or ''}"
    for status in _statuses(pod):
        state = status.state
        if state is None or status.ready or (state.terminated and state.terminated.exit_code == 0):
            continue
        last = (status.last_state and status.last_state.terminated) or state.terminated
        ended = f", ended with status {last.exit_code} ({last.reason})" if last else ""
        what = state.waiting.reason if state.waiting else "running, not ready" if state.running else "ended"
        message = f": {' '.join(state.waiting.message.split())}" if state.waiting and state.waiting.message else ""
        return f"container {status.name} {what}{message}{ended}, {status.restart_count or 0} restarts"
    return f"{pod.status.phase}, not ready"
