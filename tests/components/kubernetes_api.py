"""A server that speaks the paths of the Kubernetes API which a TrainJob takes: TrainJobs, pods, logs."""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

NAMESPACE = "ns"
JOBS = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


class KubernetesApi:
    """The state of the namespace; a test's `plays` are what controllers and kubelets would do once a job is made."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.version = 0
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, list[str]] = defaultdict(list)
        self.made: list[dict[str, Any]] = []
        self.deleted: list[str] = []
        self.watches = 0
        # Answers with an error instead, each once, by "METHOD kind".
        self.faults: dict[str, list[tuple[int, str]]] = defaultdict(list)
        self.plays: list[Callable[[], None]] = []
        api = self

        class Handler(_Handler):
            state = api

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def put_job(self, body: dict[str, Any]) -> None:
        with self.changed:
            self.version += 1
            body["metadata"] |= {"resourceVersion": str(self.version), "namespace": NAMESPACE, "uid": "u"}
            self.jobs[body["metadata"]["name"]] = body
            self.changed.notify_all()

    def end_job(self, name: str, kind: str, message: str = "") -> None:
        job = self.jobs[name]
        condition = {"type": kind, "status": "True", "reason": "JobsDone", "message": message}
        job["status"] = {"conditions": [{**condition, "lastTransitionTime": "2026-01-01T00:00:00Z"}]}
        self.put_job(job)

    def put_pod(self, name: str, job: str, index: int, phase: str, **status: Any) -> None:
        labels = {"jobset.sigs.k8s.io/jobset-name": job, "batch.kubernetes.io/job-completion-index": str(index)}
        created = (
            self.pods.get(name, {})
            .get("metadata", {})
            .get("creationTimestamp", f"2026-01-01T00:00:{len(self.pods):02}Z")
        )
        with self.changed:
            self.pods[name] = {
                "metadata": {"name": name, "labels": labels, "creationTimestamp": created},
                "status": {"phase": phase, **status},
            }

    def log(self, pod: str, *lines: str) -> None:
        """Lines with stamps of now, as a kubelet gives them: trailing zeros are left out."""
        for line in lines:
            seconds, nanoseconds = divmod(time.time_ns(), 10**9)
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
            fraction = f"{nanoseconds:09}".rstrip("0")
            self.logs[pod].append(f"{stamp}.{fraction}Z {line}")


class _Handler(BaseHTTPRequestHandler):
    state: KubernetesApi

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._faulty("POST job"):
            return
        if body["metadata"]["name"] in self.state.jobs:
            self._error(409, f'trainjobs "{body["metadata"]["name"]}" already exists')
            return
        TrainerV1alpha1TrainJob.from_dict(body)
        self.state.made.append(json.loads(json.dumps(body)))
        self.state.put_job(body)
        if self.state.plays:
            threading.Thread(target=self.state.plays.pop(0), daemon=True).start()
        self._answer(201, body)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path == JOBS:
            self._watch(query)
        elif url.path.startswith(f"{JOBS}/"):
            job = self.state.jobs.get(url.path.rpartition("/")[2])
            if not self._faulty("GET job"):
                self._answer(200, job) if job else self._error(404, "not found")
        elif url.path == PODS:
            label, _, value = query["labelSelector"].partition("=")
            items = [pod for pod in list(self.state.pods.values()) if pod["metadata"]["labels"][label] == value]
            if not self._faulty("GET pods"):
                self._answer(200, {"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": items})
        else:
            pod = url.path.removeprefix(f"{PODS}/").removesuffix("/log")
            assert (query["container"], query["timestamps"]) == ("node", "True")
            if pod not in self.state.pods:
                self._error(404, f'pods "{pod}" not found')
            elif not self._faulty("GET log"):
                self._send(200, "text/plain", "".join(f"{line}\n" for line in self.state.logs[pod]).encode())

    def do_DELETE(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        if self._faulty("DELETE job"):
            return
        with self.state.changed:
            gone = self.state.jobs.pop(name, None)
            self.state.deleted.append(name)
            self.state.changed.notify_all()
        self._answer(200, gone) if gone else self._error(404, "not found")

    def _watch(self, query: dict[str, str]) -> None:
        assert query["watch"] == "True"
        [field, name] = query["fieldSelector"].split("=")
        assert field == "metadata.name"
        self.state.watches += 1
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.state.faults["WATCH job"]:
            status, message = self.state.faults["WATCH job"].pop(0)
            self._event("ERROR", _status(status, message))
            return
        end = time.monotonic() + int(query["timeoutSeconds"])
        seen = int(query["resourceVersion"])
        with self.state.changed:
            while (left := end - time.monotonic()) > 0:
                job = self.state.jobs.get(name)
                if job is None:
                    self._event("DELETED", {"metadata": {"name": name, "resourceVersion": str(seen + 1)}})
                    return
                if int(job["metadata"]["resourceVersion"]) > seen:
                    seen = int(job["metadata"]["resourceVersion"])
                    self._event("MODIFIED", job)
                self.state.changed.wait(left)

    def _event(self, kind: str, what: dict[str, Any]) -> None:
        self.wfile.write(json.dumps({"type": kind, "object": what}).encode() + b"\n")
        self.wfile.flush()

    def _faulty(self, request: str) -> bool:
        if not self.state.faults[request]:
            return False
        self._error(*self.state.faults[request].pop(0))
        return True

    def _error(self, status: int, message: str) -> None:
        self._answer(status, _status(status, message))

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(body).encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _status(status: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "status": "Failure", "message": message, "reason": "Because", "code": status}
