"""What a run's tasks wrote, from the metadata store beside Kubeflow Pipelines.

Kubeflow's own API knows the tasks' states and not their artifacts (2.17: the lists of artifacts in `task_details` stay
empty); its pages read those from ML Metadata by gRPC-web, under the same address as the API. So does this module, with
four reads.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from google.protobuf import json_format

from pipelines.client import Cluster, ClusterError
from pipelines.metadata_messages import CACHED, COMPLETE, OUTPUT, message

_SERVICE = "/ml_metadata.MetadataStoreService/"
_RUN = "system.PipelineRun"
# What Kubeflow adds to an artifact's own metadata.
_KUBEFLOWS = ("display_name", "store_session_info")
_FRAME = struct.Struct(">BI")
_TRAILER = 0x80
_NOT_FOUND = "5"


@dataclass
class Artifact:
    uri: str
    metadata: dict[str, Any]


@dataclass
class Execution:
    """A task's last execution; `pod` is where it ran, empty if its outputs came from the cache."""

    cached: bool
    pod: str
    outputs: dict[str, Artifact] = field(default_factory=dict)


def executions(cluster: Cluster, run_id: str, titles: Mapping[str, str]) -> dict[str, Execution]:
    """A run's finished tasks by their names in the IR's root.

    Args:
        titles: the tasks' titles by their names; the store knows importers by their titles.

    Raises:
        ClusterError: the store cannot be read.
    """
    asked = message("GetContextByTypeAndNameRequest", type_name=_RUN, context_name=run_id)
    context = _read(cluster, "GetContextByTypeAndName", asked).context
    if not context.id:
        return {}  # its first driver has not started yet
    answer = _read(cluster, "GetExecutionsByContext", message("GetExecutionsByContextRequest", context_id=context.id))
    properties = {one.id: _properties(one) for one in answer.executions}
    roots = {number for number, its in properties.items() if "parent_dag_id" not in its}
    names = {title: name for name, title in titles.items()} | {name: name for name in titles}
    found: dict[str, Execution] = {}
    by_id: dict[int, Execution] = {}
    # A retried task has several; the last one counts.
    for one in sorted(answer.executions, key=lambda one: one.id):
        its = properties[one.id]
        name = names.get(its.get("task_name", ""))
        if name and its.get("parent_dag_id") in roots and one.last_known_state in (COMPLETE, CACHED):
            cached = one.last_known_state == CACHED or bool(its.get("cached_execution_id"))
            by_id[one.id] = found[name] = Execution(cached, "" if cached else its.get("pod_name", ""))
    if not by_id:
        return {}
    asked = message("GetEventsByExecutionIDsRequest", execution_ids=list(by_id))
    events = _read(cluster, "GetEventsByExecutionIDs", asked).events
    # By id and not by context: what came from the cache belongs to the run that wrote it.
    ids = sorted({event.artifact_id for event in events if event.type == OUTPUT})
    if not ids:
        return found
    answer = _read(cluster, "GetArtifactsByID", message("GetArtifactsByIDRequest", artifact_ids=ids))
    artifacts = {
        one.id: Artifact(one.uri, {k: v for k, v in _properties(one).items() if k not in _KUBEFLOWS})
        for one in answer.artifacts
    }
    for event in events:
        if event.type == OUTPUT:
            by_id[event.execution_id].outputs[event.path.steps[0].key] = artifacts[event.artifact_id]
    return found


def _read(cluster: Cluster, method: str, request: Any) -> Any:
    payload = request.SerializeToString()
    answer = cluster.post(f"{_SERVICE}{method}", _FRAME.pack(0, len(payload)) + payload, "application/grpc-web+proto")
    body, trailers = b"", {name.lower(): value for name, value in answer.headers.items()}
    if not trailers.get("content-type", "").startswith("application/grpc-web"):
        raise ClusterError(
            f"{cluster.host} answers for Kubeflow Pipelines and not for its metadata store, which knows the artifacts; "
            "give the address of Kubeflow's pages (the service ml-pipeline-ui) as --host"
        )
    data, at = answer.data, 0
    while at + _FRAME.size <= len(data):
        flag, length = _FRAME.unpack_from(data, at)
        chunk = data[at + _FRAME.size : at + _FRAME.size + length]
        at += _FRAME.size + length
        if flag & _TRAILER:
            lines = (line.partition(":") for line in chunk.decode("ascii", "replace").splitlines())
            trailers |= {name.strip().lower(): value.strip() for name, _, value in lines}
        else:
            body += chunk
    status = trailers.get("grpc-status", "0" if at == len(data) and data else "")
    if status not in ("0", _NOT_FOUND):
        told = unquote(trailers.get("grpc-message", "")) or "the answer is cut off"
        raise ClusterError(f"cannot read the metadata store ({method}): {told}")
    response = message(f"{method}Response")
    response.ParseFromString(body)
    return response


def _properties(one: Any) -> dict[str, Any]:
    return {entry.key: _plain(entry.value) for entry in one.custom_properties}


def _plain(value: Any) -> Any:
    for kind in ("string_value", "int_value", "double_value", "bool_value"):
        if value.HasField(kind):
            return getattr(value, kind)
    return json_format.MessageToDict(value.struct_value)
