"""Kubeflow Pipelines as the commands need it: what it is asked, what is asked again, and its refusals in one line.

Host, namespace and credentials are found as `kfp.Client` finds them: the environment (KF_PIPELINES_ENDPOINT, ...),
~/.config/kfp/context.json, a pod's own service account, the kubeconfig.
"""

import json
import os
import warnings
from collections.abc import Callable
from typing import Any

import kfp
import kfp_server_api as api
import urllib3
from kfp.client import ServiceAccountTokenVolumeCredentials
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

# Seconds to connect, and to answer (a list of runs takes several). The generated client ignores a float.
TIMEOUT = (10.0, 30.0)
ATTEMPTS = 4
# What passes by itself: too many requests, and a server that is restarting or out of reach.
_PASSING = (429, 502, 503, 504)
_UNKNOWN_USER = (
    "you are not signed in: give a token file by KF_PIPELINES_SA_TOKEN_PATH, or a header or cookie in "
    "~/.config/kfp/context.json"
)
_MEANING = {
    200: f"a web page came in place of an answer; mend --host, or {_UNKNOWN_USER}",
    # To a page where one signs in.
    302: _UNKNOWN_USER,
    303: _UNKNOWN_USER,
    307: _UNKNOWN_USER,
    400: "it was refused",
    401: _UNKNOWN_USER,
    403: "you are signed in, but may not do this; ask for the right, or name your own --namespace",
    404: "it does not exist there; mind --host and --namespace",
    409: "it exists already",
    503: "the server is not ready; try again later",
}
_PAGE = 100


class ClusterError(RuntimeError):
    """The cluster refused or could not be reached; the message says what was asked, what came, and what to do.

    Attributes:
        status: the HTTP status, where there was an answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _Sdk(kfp.Client):
    """`kfp.Client` that asks for the server's health once: it would log five tracebacks in 25 seconds."""

    def get_kfp_healthz(self, sleep_duration: int = 0) -> api.V2beta1GetHealthzResponse:
        client = self._healthz_api.api_client
        _asks_once(client)
        answer = self._healthz_api.healthz_service_get_healthz(_request_timeout=TIMEOUT)
        _refuse_page(client)
        return answer


class Cluster:
    """One Kubeflow Pipelines server and a namespace ("" where it has but one user).

    Raises:
        ClusterError: by every method that asks the server.
    """

    def __init__(self, host: str | None, namespace: str | None) -> None:
        credentials = ServiceAccountTokenVolumeCredentials() if os.environ.get("KF_PIPELINES_SA_TOKEN_PATH") else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sdk = self._asked(
                f"connect to {host or os.environ.get('KF_PIPELINES_ENDPOINT') or 'the cluster'}",
                lambda: _Sdk(host=host, namespace=namespace or "kubeflow", credentials=credentials),
            )
        # The generated client under the SDK's: its calls take a time-out and a filter, the SDK's do not.
        self.api: api.ApiClient = sdk._run_api.api_client
        _asks_once(self.api)
        self.host: str = self.api.configuration.host
        self.namespace: str = sdk.get_user_namespace()
        self._pipelines = api.PipelineServiceApi(self.api)
        self._uploads = api.PipelineUploadServiceApi(self.api)
        self._experiments = api.ExperimentServiceApi(self.api)
        self._runs = api.RunServiceApi(self.api)
        self._schedules = api.RecurringRunServiceApi(self.api)

    def upload(self, name: str, version: str, package: str) -> tuple[api.V2beta1PipelineVersion, bool]:
        """The pipeline's version of that name, uploaded from the IR file `package` unless it is there.

        Returns:
            The version, and whether it is new.
        """
        pipeline_id = self._pipeline(name)
        if found := self._version(pipeline_id, version):
            return found, False
        try:
            uploaded = self._asked(
                f"upload version {version} of the pipeline {name}",
                lambda: self._uploads.upload_pipeline_version(
                    package, name=version, pipelineid=pipeline_id, _request_timeout=TIMEOUT
                ),
            )
        except ClusterError as error:
            # Someone else was faster, or an answer was lost on the way: the name is the content.
            if error.status == 409 and (found := self._version(pipeline_id, version)):
                return found, False
            raise
        return uploaded, True

    def experiment(self, name: str) -> str:
        """The id of the experiment of that name, made if there is none."""
        if found := self._experiment(name):
            return found
        experiment = api.V2beta1Experiment(display_name=name, namespace=self.namespace or None)
        try:
            made = self._asked(
                f"make the experiment {name!r}",
                lambda: self._experiments.experiment_service_create_experiment(experiment, _request_timeout=TIMEOUT),
            )
        except ClusterError as error:
            # Someone else was faster, or an answer was lost on the way.
            if error.status == 409 and (found := self._experiment(name)):
                return found
            raise
        return str(made.experiment_id)

    def submit(self, run: api.V2beta1Run) -> api.V2beta1Run:
        """Starts a run. Not asked twice: a second answer would be a second run."""
        return self._asked(
            f"start the run {run.display_name}",
            lambda: self._runs.run_service_create_run(run, _request_timeout=TIMEOUT),
            again=False,
        )

    def run(self, run_id: str) -> api.V2beta1Run:
        return self._asked(
            f"read the run {run_id}", lambda: self._runs.run_service_get_run(run_id, _request_timeout=TIMEOUT)
        )

    def newest(self, count: int) -> list[api.V2beta1Run]:
        """The newest runs of the namespace, newest first."""
        listed = self._asked(
            "list the runs",
            lambda: self._runs.run_service_list_runs(
                namespace=self.namespace, page_size=count, sort_by="created_at desc", _request_timeout=TIMEOUT
            ),
        )
        return listed.runs or []

    def cancel(self, run_id: str) -> None:
        try:
            self._asked(
                f"cancel the run {run_id}",
                lambda: self._runs.run_service_terminate_run(run_id, _request_timeout=TIMEOUT),
            )
        except ClusterError as error:
            # Kubeflow finds no row of a run that runs no more: it has ended, or an answer was lost on the way.
            if error.status != 400:
                raise
            state = self.run(run_id).state
            if state not in ("CANCELING", "CANCELED"):
                raise ClusterError(f"cannot cancel the run {run_id}: it is {state} already", 400) from error

    def spec(self, run: api.V2beta1Run) -> dict[str, Any]:
        """The first document of the IR that a run executes, whoever started it, and from where."""
        spec = run.pipeline_spec
        if spec is None:
            if (source := run.pipeline_version_reference) is None:
                raise ClusterError(f"the run {run.run_id} tells neither its pipeline nor its version")
            spec = self._asked(
                f"read the pipeline of the run {run.run_id}",
                lambda: self._pipelines.pipeline_service_get_pipeline_version(
                    source.pipeline_id, source.pipeline_version_id, _request_timeout=TIMEOUT
                ),
            ).pipeline_spec
        found: dict[str, Any] = spec.get("pipeline_spec", spec)
        return found

    def schedules(self, name: str) -> list[api.V2beta1RecurringRun]:
        """The recurring runs of that name; Kubeflow allows several, this client keeps one."""
        listed = self._asked(
            f"look up the schedule {name!r}",
            lambda: self._schedules.recurring_run_service_list_recurring_runs(
                namespace=self.namespace, page_size=_PAGE, filter=_named(name), _request_timeout=TIMEOUT
            ),
        )
        return listed.recurring_runs or []

    def schedule(self, wanted: api.V2beta1RecurringRun) -> str:
        """Makes the schedule of `wanted`'s name be as `wanted`.

        Returns:
            "new", "replaced", "resumed" or "unchanged".
        """
        name = wanted.display_name
        old = self.schedules(name)
        same = [schedule for schedule in old if _same(schedule, wanted)]
        if same:
            kept, done = same[0], "unchanged"
            if kept.status != "ENABLED":
                self._asked(
                    f"resume the schedule {name!r}",
                    lambda: self._schedules.recurring_run_service_enable_recurring_run(
                        kept.recurring_run_id, _request_timeout=TIMEOUT
                    ),
                )
                done = "resumed"
        else:
            # The new one first: what fails in between leaves the old schedule, never none.
            kept = self._asked(
                f"make the schedule {name!r}",
                lambda: self._schedules.recurring_run_service_create_recurring_run(wanted, _request_timeout=TIMEOUT),
                again=False,
            )
            done = "replaced" if old else "new"
        for schedule in old:
            if schedule.recurring_run_id != kept.recurring_run_id:
                self.delete_schedule(schedule)
        return done

    def delete_schedule(self, schedule: api.V2beta1RecurringRun) -> None:
        self._asked(
            f"delete the schedule {schedule.display_name!r}",
            lambda: self._schedules.recurring_run_service_delete_recurring_run(
                schedule.recurring_run_id, _request_timeout=TIMEOUT
            ),
        )

    def pause_schedule(self, schedule: api.V2beta1RecurringRun) -> None:
        self._asked(
            f"pause the schedule {schedule.display_name!r}",
            lambda: self._schedules.recurring_run_service_disable_recurring_run(
                schedule.recurring_run_id, _request_timeout=TIMEOUT
            ),
        )

    def post(self, path: str, body: bytes, content_type: str) -> urllib3.BaseHTTPResponse:
        """A read beside the API proper, under the same address and credentials."""
        headers = {**self.api.default_headers, "Content-Type": content_type}
        self.api.update_params_for_auth(headers, [], ["Bearer"])
        if self.api.cookie:
            headers["Cookie"] = self.api.cookie

        def answer() -> urllib3.BaseHTTPResponse:
            got = self.api.rest_client.pool_manager.request(
                "POST",
                f"{self.host}{path}",
                body=body,
                headers=headers,
                timeout=urllib3.Timeout(*TIMEOUT),
                redirect=False,
            )
            if got.status != 200:
                raise api.ApiException(status=got.status, reason=got.reason)
            return got

        return self._asked(f"read {path.lstrip('/')}", answer)

    def _pipeline(self, name: str) -> str:
        try:
            return str(self._by_name(name).pipeline_id)
        except ClusterError as error:
            if error.status != 404:
                raise
        pipeline = api.V2beta1Pipeline(name=name, display_name=name, namespace=self.namespace or None)
        try:
            made = self._asked(
                f"make the pipeline {name}",
                lambda: self._pipelines.pipeline_service_create_pipeline(pipeline, _request_timeout=TIMEOUT),
            )
        except ClusterError as error:
            if error.status != 409:
                raise
            made = self._by_name(name)
        return str(made.pipeline_id)

    def _experiment(self, name: str) -> str | None:
        listed = self._asked(
            f"look up the experiment {name!r}",
            lambda: self._experiments.experiment_service_list_experiments(
                filter=_named(name), namespace=self.namespace, _request_timeout=TIMEOUT
            ),
        )
        return str(listed.experiments[0].experiment_id) if listed.experiments else None

    def _by_name(self, name: str) -> api.V2beta1Pipeline:
        return self._asked(
            f"look up the pipeline {name}",
            lambda: self._pipelines.pipeline_service_get_pipeline_by_name(
                name, namespace=self.namespace, _request_timeout=TIMEOUT
            ),
        )

    def _version(self, pipeline_id: str, name: str) -> api.V2beta1PipelineVersion | None:
        listed = self._asked(
            f"look up the version {name}",
            lambda: self._pipelines.pipeline_service_list_pipeline_versions(
                pipeline_id, filter=_named(name), _request_timeout=TIMEOUT
            ),
        )
        return listed.pipeline_versions[0] if listed.pipeline_versions else None

    def _asked(self, what: str, call: Callable[[], Any], *, again: bool = True) -> Any:
        """The answer to `call`; a failure that passes is asked again where that does no harm."""
        attempts = Retrying(
            retry=retry_if_exception(_passes),
            stop=stop_after_attempt(ATTEMPTS if again else 1),
            wait=wait_exponential_jitter(initial=0.3, max=10, jitter=0.2),
            reraise=True,
        )
        try:
            answer = attempts(call)
            if hasattr(self, "api"):
                _refuse_page(self.api)
            return answer
        except api.ApiException as error:
            status = error.status or 0
            means = _MEANING.get(503 if status in _PASSING else status, "the server failed")
            raise ClusterError(f"cannot {what}: {means} (HTTP {status}: {_reason(error)})", status) from error
        except urllib3.exceptions.HTTPError as error:
            if _is_timeout(error):
                hint = "" if again else "; it may have been done all the same: look before you try again"
                raise ClusterError(f"cannot {what}: no answer within {TIMEOUT[1]:g} s{hint}") from error
            where = getattr(self, "host", "") or "the cluster"
            raise ClusterError(
                f"cannot {what}: {where} cannot be reached; give --host or set KF_PIPELINES_ENDPOINT ({_short(error)})"
            ) from error


def _asks_once(client: api.ApiClient) -> None:
    """Asking again is this module's, with a pause in between."""
    client.rest_client.pool_manager.connection_pool_kw["retries"] = False


def _refuse_page(client: api.ApiClient) -> None:
    """A sign-in page, or another program's: the generated client would read it as an answer that says nothing."""
    last = getattr(client, "last_response", None)
    kind = (last.getheader("content-type") if last else None) or ""
    if "html" in kind:
        raise api.ApiException(status=200, reason=kind)


def _passes(error: BaseException) -> bool:
    if isinstance(error, api.ApiException):
        return error.status in _PASSING
    return isinstance(error, urllib3.exceptions.ProtocolError) or _is_timeout(error)


def _is_timeout(error: BaseException) -> bool:
    # A refused connection is a kind of time-out to urllib3, and will be refused again.
    refused = isinstance(error, urllib3.exceptions.NewConnectionError)
    return isinstance(error, urllib3.exceptions.TimeoutError) and not refused


def _reason(error: api.ApiException) -> str:
    """The server's own words, the first line of them; a proxy's page is no words."""
    try:
        told = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        return str(error.reason or "no reason given")
    return (str(told).splitlines() or [""])[0]


def _short(error: Exception) -> str:
    return str(error).rsplit(": ", 1)[-1]


def _named(name: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "string_value": name}]})


def _same(one: api.V2beta1RecurringRun, other: api.V2beta1RecurringRun) -> bool:
    def read(schedule: api.V2beta1RecurringRun) -> tuple[object, ...]:
        return (
            schedule.pipeline_version_reference.pipeline_version_id if schedule.pipeline_version_reference else None,
            schedule.trigger.cron_schedule.cron if schedule.trigger and schedule.trigger.cron_schedule else None,
            schedule.runtime_config.parameters or {} if schedule.runtime_config else {},
            schedule.experiment_id,
            schedule.service_account,
            str(schedule.max_concurrency),
            schedule.no_catchup,
        )

    return read(one) == read(other)
