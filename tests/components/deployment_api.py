"""A server that speaks the Kubernetes API's paths of a rollout, with a deployment controller and a kubelet behind it.

The controller keeps Kubernetes' rules for RollingUpdate with maxSurge 1 and maxUnavailable 0: a new pod beside the old
ones, and one old pod less only where the rest that are available suffice.
"""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from components.rollout import URI, VERSION

NAMESPACE = "ns"
NAME = "trackrec-triton"
DEPLOYMENT = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{NAME}"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
EVENTS = f"/api/v1/namespaces/{NAMESPACE}/events"
LABELS = {"app.kubernetes.io/name": NAME}
MIN_READY_SECONDS = 0.3

# What the container's state becomes, by seconds since the pod was made; with `pod`, also the pod's.
Behaviour = Callable[[float], dict[str, Any]]


def good(age: float) -> dict[str, Any]:
    return {"ready": age > 0.2, "state": {"running": {}}, "restartCount": 0}


def never(age: float) -> dict[str, Any]:
    return {"ready": False, "state": {"running": {}}, "restartCount": 0}


def crashes(age: float) -> dict[str, Any]:
    """Three restarts in 0.6 s; a kubelet takes about a minute."""
    ended = {"terminated": {"exitCode": 1, "reason": "Error"}}
    waiting = {"reason": "CrashLoopBackOff", "message": "back-off restarting failed container"}
    restarts = min(int(age / 0.2), 3)
    return {"ready": False, "state": {"waiting": waiting}, "lastState": ended, "restartCount": restarts}


def unpullable(age: float) -> dict[str, Any]:
    reason = "ErrImagePull" if age < 0.3 else "ImagePullBackOff"
    return {"ready": False, "state": {"waiting": {"reason": reason, "message": "not found"}}, "restartCount": 0}


def evicted(age: float) -> dict[str, Any]:
    pod = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: ephemeral-storage."}
    return never(age) | {"pod": pod if age > 0.2 else {}}


class DeploymentApi:
    """One Deployment and its pods.

    Args:
        version: what its pods serve at the start, having proved good; none: it was never rolled out.
        grpc_port: of every pod, all at 127.0.0.1.
    """

    def __init__(self, version: str | None, *, replicas: int = 2, grpc_port: int = 1) -> None:
        self.lock = threading.RLock()
        self.behaviours: dict[str | None, Behaviour] = defaultdict(lambda: good)
        self.at_fault: dict[str | None, str] = {}  # the init container "fetch", of a version, else "triton"
        self.logs: dict[str | None, list[str]] = defaultdict(list)
        self.events: dict[str | None, list[str]] = defaultdict(list)
        # Answers with an error instead, each once, by "METHOD kind".
        self.faults: dict[str, list[tuple[int, str]]] = defaultdict(list)
        self.patches: list[dict[str, Any]] = []
        self.progressed: tuple[int, ...] = ()
        self.in_time = True
        self.made: dict[str, float] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.least_available: int | None = None
        self.most_pods = 0
        annotations = {VERSION: version, URI: f"gs://b/{version}"} if version else {}
        container = {"name": "triton", "image": "i", "ports": [{"name": "grpc", "containerPort": grpc_port}]}
        self.deployment: dict[str, Any] = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": NAME, "namespace": NAMESPACE, "generation": 1, "annotations": dict(annotations)},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": LABELS},
                "template": {
                    "metadata": {"labels": LABELS, "annotations": dict(annotations)},
                    "spec": {"containers": [container]},
                },
            },
            "status": {},
        }
        if not version:
            self.behaviours[None] = crashes
        for _ in range(replicas):
            self._make_pod(age=60)
        api = self

        class Handler(_Handler):
            state = api

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.stopped = threading.Event()
        self._control()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def serves(self) -> str | None:
        """The version that the template names."""
        return _version(self.deployment["spec"]["template"])

    @property
    def _living(self) -> dict[str, dict[str, Any]]:
        """Without those that have ended, which stay listed."""
        return {name: pod for name, pod in self.pods.items() if pod["status"]["phase"] == "Running"}

    @property
    def available(self) -> list[str | None]:
        """The versions of the pods that requests reach."""
        with self.lock:
            return sorted((_version(pod) for pod in self._living.values() if self._is_available(pod)), key=str)

    @property
    def annotations(self) -> dict[str, str]:
        found: dict[str, str] = self.deployment["metadata"]["annotations"]
        return found

    def miss_the_deadline(self) -> None:
        with self.lock:
            self.in_time = False
            self._control()

    def patch(self, body: dict[str, Any]) -> None:
        """A strategic merge; of what is patched here (no lists) the same as a plain one."""
        with self.lock:
            before = json.dumps(self.deployment["spec"])
            _merge(self.deployment, body)
            if json.dumps(self.deployment["spec"]) != before:
                self.deployment["metadata"]["generation"] += 1

    def _run(self) -> None:
        while not self.stopped.wait(0.03):
            with self.lock:
                self._control()

    def _control(self) -> None:
        """One look of the controller, and of the kubelets."""
        for pod in self._living.values():
            self._live(pod)
        wanted = self.deployment["spec"]["replicas"]
        new = [name for name, pod in self._living.items() if _version(pod) == self.serves]
        old = [name for name in self._living if name not in new]
        if len(new) < wanted and len(self._living) < wanted + 1:
            self._live(self._make_pod(age=0))
        available = [name for name, pod in self._living.items() if self._is_available(pod)]
        # What is not available serves nobody, so it goes first.
        for name in sorted(old, key=lambda name: name in available):
            if name not in available or len(available) > wanted:
                del self.pods[name]
                available = [other for other in available if other != name]
                break
        counted = len(available)
        self.least_available = counted if self.least_available is None else min(self.least_available, counted)
        self.most_pods = max(self.most_pods, len(self._living))
        updated = sum(_version(pod) == self.serves for pod in self._living.values())
        progressed, self.progressed = self.progressed, (updated, counted)
        # A missed deadline stays missed until there is progress.
        self.in_time |= any(now > before for now, before in zip(self.progressed, progressed, strict=False))
        reason = "ReplicaSetUpdated" if self.in_time else "ProgressDeadlineExceeded"
        self.deployment["status"] = {
            "observedGeneration": self.deployment["metadata"]["generation"],
            "replicas": len(self._living),
            "updatedReplicas": updated,
            "availableReplicas": counted,
            "conditions": [{"type": "Progressing", "status": str(self.in_time), "reason": reason}],
        }

    def _make_pod(self, age: float) -> dict[str, Any]:
        name = f"pod-{len(self.made)}"
        self.made[name] = time.monotonic() - age
        template = self.deployment["spec"]["template"]["metadata"]
        metadata = {"name": name, "creationTimestamp": f"2026-01-01T00:00:{len(self.made):02}Z", **template}
        self.pods[name] = {"metadata": json.loads(json.dumps(metadata)), "spec": {"containers": [{"name": "triton"}]}}
        self._live(self.pods[name])
        return self.pods[name]

    def _live(self, pod: dict[str, Any]) -> None:
        version = _version(pod)
        status = self.behaviours[version](time.monotonic() - self.made[pod["metadata"]["name"]])
        pod_status = status.pop("pod", {})
        status |= {"image": "i", "imageID": "i", "name": self.at_fault.get(version, "triton")}
        kind = "initContainerStatuses" if status["name"] == "fetch" else "containerStatuses"
        ready = [{"type": "Ready", "status": str(status["ready"])}]
        pod["status"] = {"phase": "Running", "podIP": "127.0.0.1", "conditions": ready, kind: [status]} | pod_status

    def _is_available(self, pod: dict[str, Any]) -> bool:
        since = time.monotonic() - self.made[pod["metadata"]["name"]]
        behaviour = self.behaviours[_version(pod)]
        return bool(behaviour(since)["ready"] and behaviour(since - MIN_READY_SECONDS)["ready"])


class _Handler(BaseHTTPRequestHandler):
    state: DeploymentApi

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        with self.state.lock:
            if url.path == DEPLOYMENT:
                if not self._faulty("GET deployment"):
                    self._answer(200, self.state.deployment)
            elif url.path == PODS:
                assert query["labelSelector"] == ",".join(f"{key}={value}" for key, value in LABELS.items())
                if not self._faulty("GET pods"):
                    self._list("PodList", list(self.state.pods.values()))
            elif url.path == EVENTS:
                fields = dict(part.split("=") for part in query["fieldSelector"].split(","))
                assert fields.pop("type") == "Warning"
                pod = self.state.pods[fields.pop("involvedObject.name")]
                events = [
                    {"reason": "Unhealthy", "message": text, "metadata": {"name": "e"}, "involvedObject": {}}
                    for text in self.state.events[_version(pod)]
                ]
                if not self._faulty("GET events"):
                    self._list("EventList", events)
            elif url.path.startswith(f"{PODS}/") and url.path.endswith("/log"):
                pod = self.state.pods[url.path.removeprefix(f"{PODS}/").removesuffix("/log")]
                version = _version(pod)
                assert query["container"] == self.state.at_fault.get(version, "triton")
                lines = self.state.logs[version][-int(query["tailLines"]) :]
                if not self._faulty("GET log"):
                    self._send(200, "text/plain", "".join(f"{line}\n" for line in lines).encode())
            else:
                self._error(404, f"{url.path} not found")

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Content-Type"] == "application/strategic-merge-patch+json"
        with self.state.lock:
            if urlsplit(self.path).path != DEPLOYMENT:
                self._error(404, "not found")
            elif not self._faulty("PATCH deployment"):
                self.state.patches.append(body)
                self.state.patch(body)
                self._answer(200, self.state.deployment)

    def _list(self, kind: str, items: list[dict[str, Any]]) -> None:
        self._answer(200, {"apiVersion": "v1", "kind": kind, "metadata": {}, "items": items})

    def _faulty(self, request: str) -> bool:
        if not self.state.faults[request]:
            return False
        self._error(*self.state.faults[request].pop(0))
        return True

    def _error(self, status: int, message: str) -> None:
        self._answer(status, {"kind": "Status", "status": "Failure", "message": message, "code": status})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(body).encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _version(item: dict[str, Any]) -> str | None:
    found: str | None = item["metadata"].get("annotations", {}).get(VERSION)
    return found


def _merge(target: dict[str, Any], change: dict[str, Any]) -> None:
    for key, value in change.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            _merge(target.setdefault(key, {}), value)
        else:
            assert not isinstance(value, list)
            target[key] = value
