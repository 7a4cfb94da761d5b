"""A Kubeflow Pipelines server in memory: the v2beta1 API, the metadata store's gRPC-web and the pods' logs.

It keeps state as the real one does: names are unique, a version is read back as it was uploaded, a terminated run stays
so. Bodies are checked against the models of `kfp-server-api`: an unknown field or a wrong type is answered by 400, and
what is answered is made of those models.
"""

import json
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

import kfp_server_api as api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec, PlatformSpec
from werkzeug import Request, Response

from pipelines.metadata_messages import CACHED, COMPLETE, OUTPUT, message
from tests.pipelines.cluster.models import Refused, model

HANG = "hang"
PAGE = "page"
SIGN_IN = "sign in"
_JSON = api.ApiClient()
_NOW = "2026-01-01T00:00:00Z"


class KfpServer:
    """
    Attributes:
        faults: what the next requests meet instead of an answer: a status, `HANG` (no answer in time), `PAGE` (a
            proxy's page of an error) or `SIGN_IN` (its page to sign in, as if all were well).
        calls: "METHOD path" of each request.
        token: if set, requests without it are not signed in.
        multi_user: runs need a namespace; "theirs" belongs to somebody else.
    """

    def __init__(self) -> None:
        self.pipelines: dict[str, api.V2beta1Pipeline] = {}
        self.versions: dict[str, api.V2beta1PipelineVersion] = {}
        self.experiments: dict[str, api.V2beta1Experiment] = {}
        self.runs: dict[str, api.V2beta1Run] = {}
        self.schedules: dict[str, api.V2beta1RecurringRun] = {}
        self.metadata: dict[str, list[tuple[Any, list[tuple[str, Any]]]]] = {}
        self.pods: dict[str, dict[str, tuple[str, str]]] = {}
        self.faults: list[int | str] = []
        self.calls: list[str] = []
        self.token: str | None = None
        self.multi_user = False
        self.hang = 3.0
        self.no_metadata = False

    def __call__(self, request: Request) -> Response:
        self.calls.append(f"{request.method} {request.path}")
        try:
            if self.faults:
                self._fail(self.faults.pop(0))
            if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
                raise Refused(401, "Unauthenticated: no token")
            if request.args.get("namespace") == "theirs":
                raise Refused(403, "User 'me' is not authorized with reason: theirs (request: ...)")
            for method, path, answer in self._routes():
                found = re.fullmatch(path, request.path)
                if found and method == request.method:
                    got = answer(request, *found.groups())
                    if isinstance(got, Response):
                        return got
                    return _json(200, _JSON.sanitize_for_serialization(got))
            raise Refused(404, f"Not Found: {request.method} {request.path}")
        except Refused as refused:
            if str(refused) == PAGE:
                return Response("<html>A page</html>", refused.status, content_type="text/html")
            told = {"error": str(refused), "code": 5, "message": f"{refused}\nmore", "details": []}
            return _json(refused.status, told)

    def _fail(self, fault: int | str) -> None:
        if fault == HANG:
            time.sleep(self.hang)
        elif fault in (PAGE, SIGN_IN):
            raise Refused(503 if fault == PAGE else 200, PAGE)
        else:
            assert isinstance(fault, int)
            raise Refused(fault, "not today")

    def _routes(self) -> list[tuple[str, str, Callable[..., Any]]]:
        v2 = "/apis/v2beta1"
        return [
            ("GET", f"{v2}/healthz", lambda request: api.V2beta1GetHealthzResponse(multi_user=self.multi_user)),
            ("POST", f"{v2}/pipelines", self._create_pipeline),
            ("GET", f"{v2}/pipelines/names/([^/]+)", self._pipeline_by_name),
            ("POST", f"{v2}/pipelines/upload_version", self._upload),
            ("GET", f"{v2}/pipelines/([^/]+)/versions", self._list_versions),
            ("GET", f"{v2}/pipelines/([^/]+)/versions/([^/]+)", lambda request, _, key: _get(self.versions, key)),
            ("GET", f"{v2}/experiments", self._list_experiments),
            ("POST", f"{v2}/experiments", self._create_experiment),
            ("POST", f"{v2}/runs", lambda request: self.start(model("V2beta1Run", request.get_json()))),
            ("GET", f"{v2}/runs", self._list_runs),
            ("GET", f"{v2}/runs/([^/:]+)", lambda request, key: _get(self.runs, key)),
            ("POST", f"{v2}/runs/([^/:]+):terminate", self._terminate),
            ("POST", f"{v2}/recurringruns", self._create_schedule),
            ("GET", f"{v2}/recurringruns", self._list_schedules),
            ("DELETE", f"{v2}/recurringruns/([^/:]+)", self._delete_schedule),
            ("POST", f"{v2}/recurringruns/([^/:]+):(enable|disable)", self._switch_schedule),
            ("POST", "/ml_metadata.MetadataStoreService/(.+)", self._metadata),
            ("GET", "/api/v1/namespaces/([^/]+)/pods", self._list_pods),
            ("GET", "/api/v1/namespaces/[^/]+/pods/([^/]+)/log", self._log),
        ]

    # Pipelines and versions.

    def _create_pipeline(self, request: Request) -> api.V2beta1Pipeline:
        made = model("V2beta1Pipeline", request.get_json())
        self._check_namespace(made.namespace)
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", made.name):
            raise Refused(400, f"pipeline's name must be a DNS label: {made.name}")
        if any(one.name == made.name for one in self.pipelines.values()):
            raise Refused(409, f"Already exist error: the pipeline {made.name} already exists")
        made.pipeline_id = str(uuid.uuid4())
        self.pipelines[made.pipeline_id] = made
        return made

    def _pipeline_by_name(self, request: Request, name: str) -> api.V2beta1Pipeline:
        return _get({one.name: one for one in self.pipelines.values()}, name)

    def _upload(self, request: Request) -> api.V2beta1PipelineVersion:
        _get(self.pipelines, request.args["pipelineid"])
        name = request.args["name"]
        if any(one.display_name == name for one in self.versions.values()):
            raise Refused(409, f"Already exist error: the version {name} already exists")
        documents = list(yaml.load_all(request.files["uploadfile"].read(), Loader=yaml.CSafeLoader))
        version = api.V2beta1PipelineVersion(
            pipeline_id=request.args["pipelineid"],
            pipeline_version_id=str(uuid.uuid4()),
            display_name=name,
            name=name,
            created_at=_NOW,
            pipeline_spec=_checked_spec(dict(zip(("pipeline_spec", "platform_spec"), documents, strict=True))),
        )
        self.versions[version.pipeline_version_id] = version
        return version

    def _list_versions(self, request: Request, pipeline: str) -> api.V2beta1ListPipelineVersionsResponse:
        found = [one for one in self.versions.values() if one.pipeline_id == pipeline]
        return api.V2beta1ListPipelineVersionsResponse(pipeline_versions=_filtered(request, found) or None)

    # Experiments and runs.

    def _list_experiments(self, request: Request) -> api.V2beta1ListExperimentsResponse:
        return api.V2beta1ListExperimentsResponse(experiments=_filtered(request, self.experiments.values()) or None)

    def _create_experiment(self, request: Request) -> api.V2beta1Experiment:
        made = model("V2beta1Experiment", request.get_json())
        self._check_namespace(made.namespace)
        if any(one.display_name == made.display_name for one in self.experiments.values()):
            raise Refused(409, f"Already exist error: the experiment {made.display_name} already exists")
        made.experiment_id = str(uuid.uuid4())
        self.experiments[made.experiment_id] = made
        return made

    def start(self, run: api.V2beta1Run) -> api.V2beta1Run:
        """Also what Kubeflow's pages do."""
        _get(self.experiments, run.experiment_id)
        spec = self.spec(run)
        self._check_parameters(spec, run.runtime_config)
        if run.pipeline_spec:
            _checked_spec(run.pipeline_spec)
        run.run_id = str(uuid.uuid4())
        run.state, run.created_at = "PENDING", _NOW
        self.runs[run.run_id] = run
        return run

    def spec(self, run: api.V2beta1Run | api.V2beta1RecurringRun) -> dict[str, Any]:
        if (run.pipeline_spec is None) == (run.pipeline_version_reference is None):
            raise Refused(400, "give a pipeline's spec or its version")
        if reference := run.pipeline_version_reference:
            spec = _get(self.versions, reference.pipeline_version_id).pipeline_spec
        else:
            spec = run.pipeline_spec
        found: dict[str, Any] = spec.get("pipeline_spec", spec)
        return found

    def _list_runs(self, request: Request) -> api.V2beta1ListRunsResponse:
        return api.V2beta1ListRunsResponse(runs=[*self.runs.values()][::-1][: int(request.args["page_size"])])

    def _terminate(self, request: Request, key: str) -> dict[str, Any]:
        run = _get(self.runs, key)
        if run.state not in ("PENDING", "RUNNING", "PAUSED"):
            raise Refused(400, f"Failed to terminate a run {key}. Row not found")
        run.state = "CANCELED"
        return {}

    def work(
        self, run_id: str, *, until: str | None = None, cached: tuple[str, ...] = (), bucket: str = "gs://bucket"
    ) -> None:
        """Does a run's tasks, each after those it reads from, up to the one titled `until`, which fails."""
        run = self.runs[run_id]
        spec = self.spec(run)
        root = 1000 * (len(self.metadata) + 1)
        ended = [(message("Execution", id=root, last_known_state=COMPLETE), [])]
        details, pods = [], {}
        failed = False
        for number, (name, task) in enumerate(_in_order(spec), start=root + 1):
            title = task["taskInfo"]["name"]
            failed = title == until
            state = "FAILED" if failed else "SUCCEEDED"
            detail = {"run_id": run_id, "start_time": _NOW, "end_time": "2026-01-01T00:01:30Z", "state": state}
            details += [{**detail, "display_name": name}, {**detail, "display_name": f"{name}-driver"}]
            details.append({**detail, "display_name": "executor"})
            pods[f"pod-{number}-driver"] = (f"w.root.{name}-driver", "driver at work\n")
            if title not in cached:
                pods[f"pod-{number}"] = (f"w.root.{name}.executor(0)", f"{title} at work ✔\nTraceback\n")
            component = spec["components"][task["componentRef"]["name"]]
            importer = spec["deploymentSpec"]["executors"].get(component.get("executorLabel"), {}).get("importer")
            execution = message("Execution", id=number, last_known_state=CACHED if title in cached else COMPLETE)
            # Kubeflow's importers are known by their titles.
            _put(execution, task_name=title if importer else name, parent_dag_id=root, pod_name=f"pod-{number}")
            # A loop writes nothing: its tasks do, and the one that gathers what they wrote.
            outputs = {} if "dag" in component else component.get("outputDefinitions", {}).get("artifacts", {})
            place = f"{bucket}/v2/{run_id}/{name}"
            uris = {key: _imported(importer, task, spec, run) if importer else f"{place}/{key}" for key in outputs}
            ended.append((execution, [] if failed else [(key, _artifact(uri, key)) for key, uri in uris.items()]))
            if failed:
                execution.last_known_state = 4
                break
        run.run_details = model("V2beta1RunDetails", {"task_details": details})
        run.state, run.finished_at = "FAILED" if failed else "SUCCEEDED", "2026-01-01T01:00:00Z"
        if failed:
            run.error = api.GoogleRpcStatus(code=2, message=f"task {until} failed")
        self.metadata[run_id], self.pods[run_id] = ended, pods

    # Schedules.

    def _create_schedule(self, request: Request) -> api.V2beta1RecurringRun:
        made = model("V2beta1RecurringRun", request.get_json())
        _get(self.experiments, made.experiment_id)
        self._check_parameters(self.spec(made), made.runtime_config)
        if len(made.trigger.cron_schedule.cron.split()) != 6 or not 1 <= int(made.max_concurrency) <= 10:
            raise Refused(400, "Invalid schedule")
        made.recurring_run_id = str(uuid.uuid4())
        made.status = {"ENABLE": "ENABLED", "DISABLE": "DISABLED"}[made.mode]
        self.schedules[made.recurring_run_id] = made
        return made

    def _list_schedules(self, request: Request) -> api.V2beta1ListRecurringRunsResponse:
        return api.V2beta1ListRecurringRunsResponse(recurring_runs=_filtered(request, self.schedules.values()) or None)

    def _delete_schedule(self, request: Request, key: str) -> dict[str, Any]:
        _get(self.schedules, key)
        del self.schedules[key]
        return {}

    def _switch_schedule(self, request: Request, key: str, to: str) -> dict[str, Any]:
        _get(self.schedules, key).status = f"{to.upper()}D"
        return {}

    def _check_namespace(self, namespace: str | None) -> None:
        if bool(namespace) != self.multi_user:
            raise Refused(400, "Invalid input error: a namespace goes with multi-user mode, and only with it")

    def _check_parameters(self, spec: dict[str, Any], config: api.V2beta1RuntimeConfig | None) -> None:
        known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        given = (config.parameters if config else None) or {}
        if unknown := given.keys() - known.keys():
            raise Refused(400, f"Invalid input error: unknown parameter {unknown}")
        if missing := {key for key, one in known.items() if "defaultValue" not in one} - given.keys():
            raise Refused(400, f"Invalid input error: missing parameter {missing}")

    # The metadata store, and Kubernetes.

    def _metadata(self, request: Request, method: str) -> Response:
        if self.no_metadata:
            raise Refused(404, "Not Found")
        data = request.get_data()
        assert request.content_type == "application/grpc-web+proto" and data[0] == 0
        assert int.from_bytes(data[1:5]) == len(data) - 5
        asked = message(f"{method}Request")
        asked.ParseFromString(data[5:])
        answer = message(f"{method}Response")
        everything = [pair for run in self.metadata.values() for pair in run]
        if method == "GetContextByTypeAndName":
            assert asked.type_name == "system.PipelineRun"
            if asked.context_name not in self.metadata:
                return _grpc_web(b"", "5", "No%20context%20was%20found")
            answer.context.id = 1 + [*self.metadata].index(asked.context_name)
        elif method == "GetExecutionsByContext":
            answer.executions.extend(execution for execution, _ in [*self.metadata.values()][asked.context_id - 1])
        elif method == "GetEventsByExecutionIDs":
            for execution, outputs in everything:
                for key, artifact in outputs if execution.id in asked.execution_ids else ():
                    event = answer.events.add(artifact_id=artifact.id, execution_id=execution.id, type=OUTPUT)
                    event.path.steps.add(key=key)
        else:
            artifacts = [artifact for _, outputs in everything for _, artifact in outputs]
            answer.artifacts.extend(artifact for artifact in artifacts if artifact.id in asked.artifact_ids)
        return _grpc_web(answer.SerializeToString(), "0", "")

    def _list_pods(self, request: Request, namespace: str) -> Response:
        run_id = request.args["labelSelector"].removeprefix("pipeline/runid=")
        items = [
            {
                "metadata": {
                    "name": name,
                    "namespace": namespace,
                    "creationTimestamp": _NOW,
                    "annotations": {"workflows.argoproj.io/node-name": node},
                }
            }
            for name, (node, _) in (self.pods.get(run_id, {}) if namespace == "kubeflow" else {}).items()
        ]
        return _json(200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})

    def _log(self, request: Request, pod: str) -> Response:
        assert request.args["container"] == "main"
        [log] = [pods[pod][1] for pods in self.pods.values() if pod in pods]
        lines = log.splitlines(keepends=True)
        text = "".join(lines[-int(request.args.get("tailLines", len(lines))) :])
        # As they come: a character may be cut in two.
        return Response((bytes([byte]) for byte in text.encode()), content_type="text/plain")


def _json(status: int, body: Any) -> Response:
    return Response(json.dumps(body), status, content_type="application/json")


def _grpc_web(body: bytes, status: str, told: str) -> Response:
    trailers = f"grpc-status: {status}\r\ngrpc-message: {told}\r\n".encode()
    frames = b"" if status != "0" else b"\0" + len(body).to_bytes(4) + body
    return Response(frames + b"\x80" + len(trailers).to_bytes(4) + trailers, content_type="application/grpc-web+proto")


def _get(things: dict[str, Any], key: str) -> Any:
    if key not in things:
        raise Refused(404, f"ResourceNotFoundError: {key} not found.")
    return things[key]


def _filtered(request: Request, things: Any) -> list[Any]:
    asked = model("V2beta1Filter", json.loads(request.args["filter"]))
    [predicate] = asked.predicates
    assert predicate.operation == "EQUALS" and predicate.key == "display_name"
    return [one for one in things if one.display_name == predicate.string_value]


def _checked_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """Both documents as the protobufs that the server parses them into."""
    json_format.ParseDict(spec["pipeline_spec"], PipelineSpec())
    json_format.ParseDict(spec["platform_spec"], PlatformSpec())
    return spec


def _in_order(spec: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    tasks, done = dict(spec["root"]["dag"]["tasks"]), []
    while tasks:
        name = next(n for n, task in tasks.items() if not tasks.keys() & set(task.get("dependentTasks", ())))
        done.append((name, tasks.pop(name)))
    return done


def _put(message_: Any, **properties: str | int) -> None:
    for key, value in properties.items():
        entry = message_.custom_properties.add(key=key)
        if isinstance(value, int):
            entry.value.int_value = value
        else:
            entry.value.string_value = value


def _imported(importer: dict[str, Any], task: dict[str, Any], spec: dict[str, Any], run: api.V2beta1Run) -> str:
    uri = importer["artifactUri"]
    if "constant" in uri:
        return str(uri["constant"])
    parameter = task["inputs"]["parameters"][uri["runtimeParameter"]]["componentInputParameter"]
    default = spec["root"]["inputDefinitions"]["parameters"][parameter].get("defaultValue")
    return str(((run.runtime_config.parameters if run.runtime_config else None) or {}).get(parameter, default))


def _artifact(uri: str, key: str) -> Any:
    artifact = message("Artifact", id=hash(uri) & 0x7FFFFFFF, uri=uri)
    _put(artifact, display_name=key, store_session_info="{}", version="7")
    return artifact
