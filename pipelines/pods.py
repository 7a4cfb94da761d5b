"""The logs of a run's pods, from Kubernetes."""

import codecs
import re
from collections.abc import Iterator
from typing import Any

import kubernetes
import urllib3

from pipelines.client import ClusterError

# Where Kubeflow's own installation, and with it every run of a server with one user, lies.
KUBEFLOW = "kubeflow"
_RUN_LABEL = "pipeline/runid"
_NODE = "workflows.argoproj.io/node-name"
# workflow.root.sample-2.executor(0): the task's name, then which of its pods.
_NODE_NAME = re.compile(r".*\.(?P<task>[^.]+?)(?P<pod>\.executor|-driver)(\(\d+\))?$")
# Seconds to connect, and to answer. The generated client ignores a float.
_TIMEOUT = (10.0, 30.0)


class Pods:
    """A run's pods by the task they belong to; a task that never got a pod of its own has its driver's.

    Raises:
        ClusterError: by all of it, if Kubernetes cannot be asked or refuses.
    """

    def __init__(self, run_id: str, namespace: str) -> None:
        self.namespace = namespace or KUBEFLOW
        try:
            kubernetes.config.load_config()
        except kubernetes.config.ConfigException as error:
            raise ClusterError(f"logs are read from Kubernetes, and no kubeconfig was found: {error}") from error
        self._api = kubernetes.client.CoreV1Api()
        listed = self._asked(
            lambda: self._api.list_namespaced_pod(
                self.namespace, label_selector=f"{_RUN_LABEL}={run_id}", _request_timeout=_TIMEOUT
            )
        )
        own: dict[str, list[str]] = {}
        drivers: dict[str, list[str]] = {}
        for pod in sorted(listed.items, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name)):
            if node := _NODE_NAME.match((pod.metadata.annotations or {}).get(_NODE, "")):
                (drivers if node["pod"] == "-driver" else own).setdefault(node["task"], []).append(pod.metadata.name)
        self.by_task = drivers | own
        if not self.by_task:
            raise ClusterError(
                f"no pod of the run {run_id} in the namespace {self.namespace}: name another by --namespace; "
                "the pods of an old run are deleted by and by"
            )

    def log(self, pod: str, *, tail: int | None, follow: bool) -> Iterator[str]:
        """The lines of a pod's container `main`; with `follow`, as they come until it ends."""
        limits: dict[str, Any] = {} if tail is None else {"tail_lines": tail}
        response = self._asked(
            lambda: self._api.read_namespaced_pod_log(
                pod,
                self.namespace,
                container="main",
                follow=follow,
                _preload_content=False,
                _request_timeout=(_TIMEOUT[0], None if follow else _TIMEOUT[1]),
                **limits,
            )
        )
        # A chunk may end within a character.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        rest, chunks = "", response.stream(decode_content=True)
        while (chunk := self._asked(lambda: next(chunks, None))) is not None:
            *lines, rest = (rest + decoder.decode(chunk)).split("\n")
            yield from lines
        if rest:
            yield rest

    def _asked(self, call: Any) -> Any:
        try:
            return call()
        except kubernetes.client.ApiException as error:
            raise ClusterError(
                f"Kubernetes refuses to show the pods of {self.namespace}: HTTP {error.status} {error.reason}"
            ) from error
        except urllib3.exceptions.HTTPError as error:
            raise ClusterError(f"Kubernetes cannot be reached: {str(error).rsplit(': ', 1)[-1]}") from error
