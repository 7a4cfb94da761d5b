"""A version of the models, rolled out to the Triton Deployment of `manifests/components/triton`, or rolled back.

The Deployment's pods fetch the version that their template's annotations name, so a rollout is one patch of two
annotations: Kubernetes starts a new pod beside the old ones (maxSurge 1, maxUnavailable 0), and takes an old one away
only once the new one has been ready for `minReadySeconds`. Meanwhile this module, in the pod of the stage `deploy`,
asks each new pod for a smoke inference. The Deployment's own annotations say which version last proved good: what a
failed rollout goes back to, also one whose stage was killed.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from kubernetes.client import ApiException, AppsV1Api, CoreV1Api

from components.incluster import TIMEOUT, Cluster, Patience, UnreachableError, in_cluster, refusal, sigterm_as_exit
from components.podstates import HopelessError, PodStates, has_ended, is_ready
from trackrec.serving.smoke import SlowError, SmokeError
from trackrec.serving_config import DeploySettings
from trackrec.stages.deploy import Roll

# On the template: what its pods serve. On the Deployment: what last proved good, and before that.
VERSION, URI = "trackrec/version", "trackrec/version-uri"
PREVIOUS, PREVIOUS_URI = "trackrec/previous-version", "trackrec/previous-version-uri"
# On the Deployment: a version that was put back, and by which run, so that the run's next tries do not repeat it.
REFUSED = "trackrec/refused"

_POLL_SECONDS = 3.0
# One lost connection condemns no version. All tries end before an old pod goes (minReadySeconds).
_SMOKE_TRIES = 3

T = TypeVar("T")


class RolloutError(RuntimeError):
    """The version is not rolled out; the message says why, and what serves now."""


@dataclass(frozen=True)
class Version:
    """A version and where its repository lies: what `trackrec get` takes."""

    name: str
    uri: str


@dataclass
class Rollout:
    """What was done.

    Args:
        was_there: the version had been rolled out and proved before: nothing was done.
        smoke: what each new pod answered, by pod.
    """

    version: Version
    previous: Version | None
    was_there: bool = False
    smoke: dict[str, dict[str, Any]] = field(default_factory=dict)


def roll(
    cluster: Cluster,
    deployment: str,
    version: Version,
    smoke: Callable[[str], dict[str, Any]],
    *,
    timeout_s: float,
    run: str = "",
) -> Rollout:
    """Rolls `version` out, or takes up what a killed try of the same has begun; goes back if it does not prove good.

    On SIGTERM the old version is put back, too, and not waited for: the pod has half a minute.

    Args:
        smoke: asks the server at HOST:PORT for an answer of every model; raises SmokeError, or SlowError, after which
            the pod is asked again.
        timeout_s: without any progress (a pod more that is new, ready, asked, or gone) the old version is put back.
        run: what a stage's tries have in common; what one of them has put back, the next does not roll out again.

    Raises:
        RolloutError: it is not rolled out; as one line, why. The new pods' last lines stand above.
        UnreachableError: the API is away.
    """
    return _Roll(cluster, deployment, version, smoke, timeout_s, run).rolled()


def roller(settings: DeploySettings, run: str) -> Roll:
    """`roll` in the cluster of this pod, for the stage.

    Args:
        run: the pipeline's run.

    Raises:
        OutsideError: this is no pod.
    """
    cluster = in_cluster("the stage `deploy`")

    def rolled(name: str, uri: str, smoke: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        done = roll(cluster, settings.deployment, Version(name, uri), smoke, timeout_s=settings.timeout_s, run=run)
        return asdict(done)

    return rolled


class _OvertakenError(RolloutError):
    """Someone else has rolled something else out meanwhile: theirs is left alone."""


class _Roll:
    def __init__(
        self,
        cluster: Cluster,
        deployment: str,
        version: Version,
        smoke: Callable[[str], dict[str, Any]],
        timeout_s: float,
        run: str,
    ) -> None:
        self.apps = AppsV1Api(cluster.api)
        self.states = PodStates(CoreV1Api(cluster.api), cluster.namespace)
        self.namespace = cluster.namespace
        self.name = deployment
        self.version = version
        self.smoke = smoke
        self.timeout_s = timeout_s
        self.refused = f"{version.name} {run}" if run else ""
        self.patience = Patience()
        # What pods did not answer in time: they serve already, so it may be others' requests that they wait for.
        self.slow: dict[str, str] = {}

    def rolled(self) -> Rollout:
        with sigterm_as_exit():
            found = self._get()
            if self.refused and (found.metadata.annotations or {}).get(REFUSED) == self.refused:
                raise RolloutError(
                    f"an earlier try of this run has put {self.version.name} back, and its log says why; mend that, "
                    "then release again"
                )
            if not found.spec.replicas:
                raise RolloutError(
                    f"Deployment {self.name} has no replicas, so no pod can prove the version; run: kubectl scale "
                    f"deployment {self.name} --namespace {self.namespace} --replicas=1"
                )
            serves, proved = _serves(found), _version_of(found.metadata.annotations)
            if serves is not None and serves != self.version and _is_complete(found):
                # All its pods have answered their startup probes. The annotation may name what somebody has undone.
                proved = serves
            self.rollout = Rollout(self.version, proved)
            if serves == proved == self.version and _is_complete(found):
                print(f"Deployment {self.name}: {self.version.name} is there already", flush=True)
                before = _version_of(found.metadata.annotations, PREVIOUS, PREVIOUS_URI)
                return Rollout(self.version, before, was_there=True)
            try:
                self._go(is_begun=serves == self.version)
            except (_OvertakenError, UnreachableError):
                raise
            except RolloutError as error:
                outcome = self._go_back()
                self._remember()
                raise RolloutError(f"{self.version.name} is not rolled out: {error}; {outcome}") from None
            except BaseException:  # SIGTERM among them
                self._put_back()
                raise
        return self.rollout

    def _go(self, is_begun: bool) -> None:
        if is_begun:
            print(f"Deployment {self.name}: the rollout of {self.version.name} is taken up", flush=True)
        else:
            self._patch(self.version)
            before = self.rollout.previous.name if self.rollout.previous else "none"
            print(f"Deployment {self.name}: from version {before} to {self.version.name}", flush=True)
        self._until(self.version, self.rollout.smoke)
        previous = self.rollout.previous
        proved: dict[str, str | None] = {VERSION: self.version.name, URI: self.version.uri}
        if previous and previous != self.version:
            proved |= {PREVIOUS: previous.name, PREVIOUS_URI: previous.uri}
        self._send({"metadata": {"annotations": proved}})
        print(f"Deployment {self.name}: {self.version.name} is rolled out", flush=True)

    def _until(self, version: Version | None, asked: dict[str, dict[str, Any]] | None) -> None:
        """Waits until all pods are of `version` and ready; with `asked`, also until each has answered.

        Raises:
            RolloutError: it goes on no more.
        """
        progress: tuple[Any, ...] = ()
        since = time.monotonic()
        while True:
            found = self._get()
            if _serves(found) != version:
                other = _serves(found)
                raise _OvertakenError(
                    f"Deployment {self.name} was given version {other.name if other else 'none'} by someone else "
                    f"while {version.name if version else 'none'} was rolled out; it is left as it is"
                )
            listed = self._pods(found, version)
            pods = [pod for pod in listed if not has_ended(pod)]
            ready = [pod for pod in pods if is_ready(pod)]
            if asked is not None:
                for pod in ready:
                    if pod.metadata.name not in asked and (answer := self._ask(found, pod)) is not None:
                        asked[pod.metadata.name] = answer
            if _is_complete(found) and (asked is None or (ready and {p.metadata.name for p in ready} <= asked.keys())):
                return
            status = found.status
            now = (len(pods), len(ready), len(asked or ()), status.replicas, status.updated_replicas)
            if now != progress:
                progress, since = now, time.monotonic()
                self.states.say(
                    self.name, f"Deployment {self.name}: {len(ready)} of {found.spec.replicas} pods are new"
                )
            if asked is not None:
                self._may_go_on(listed, pods, time.monotonic() - since)
            elif time.monotonic() - since > self.timeout_s:
                raise RolloutError(f"no progress for {self.timeout_s:g} s")
            time.sleep(_POLL_SECONDS)

    def _may_go_on(self, listed: list[Any], pods: list[Any], waited: float) -> None:
        """
        Args:
            listed: `pods`, and those that have ended.

        Raises:
            RolloutError: a new pod cannot become ready, or none has for too long.
        """
        try:
            self.states.look_at(listed)
        except HopelessError as error:
            raise RolloutError(str(error)) from None
        # Kubernetes' own ProgressDeadlineExceeded is no verdict: it may be of the rollout before, and stays until the
        # controller sees progress.
        if waited > self.timeout_s:
            for pod in pods:
                if not is_ready(pod):
                    self.states.print_tail(pod)
            ready = [pod.metadata.name for pod in pods if is_ready(pod)]
            reasons = [f"pod {name}: {self.slow[name]}" for name in ready if name in self.slow]
            if len(reasons) < len(pods) or not pods:
                reasons.append(self.states.explain(pods))
            raise RolloutError(f"no progress for {self.timeout_s:g} s ({'; '.join(reasons)})")

    def _ask(self, found: Any, pod: Any) -> dict[str, Any] | None:
        """None: not in time, or it is gone.

        Raises:
            RolloutError: the pod answers wrongly, or not at all.
        """
        ports = [port for c in found.spec.template.spec.containers for port in c.ports or [] if port.name == "grpc"]
        if not ports:
            raise RolloutError(f"Deployment {self.name} names no container port `grpc`")
        host = f"[{pod.status.pod_ip}]" if ":" in pod.status.pod_ip else pod.status.pod_ip
        name = pod.metadata.name
        for attempt in range(_SMOKE_TRIES):
            try:
                answer = self.smoke(f"{host}:{ports[0].container_port}")
                print(f"pod {name}: the smoke inference passed", flush=True)
                self.slow.pop(name, None)
                return answer
            except SlowError as error:
                self.slow[name] = str(error)
                self.states.say(name, f"pod {name}: is asked again, for it is slow: {error}")
                return None
            except SmokeError as error:
                if attempt == _SMOKE_TRIES - 1:
                    if not any(
                        other.metadata.name == name and is_ready(other) for other in self._pods(found, self.version)
                    ):
                        return None  # evicted, or scaled away, while it was asked
                    self.states.print_tail(pod)
                    raise RolloutError(f"the smoke inference of pod {name} failed: {error}") from None
            time.sleep(_POLL_SECONDS)
        raise AssertionError

    def _go_back(self) -> str:
        """Puts the old version back and waits until it is well; says what serves then."""
        previous = self.rollout.previous
        if not self._put_back():
            return f"and it is not rolled back: see `kubectl rollout status deployment {self.name}`"
        if previous is None or previous == self.version:
            return "no other version has proved good, so none was put back"
        try:
            self._until(previous, None)
        except (RolloutError, UnreachableError) as error:
            return f"version {previous.name} was put back, but: {error}"
        return f"version {previous.name} was put back, and serves"

    def _put_back(self) -> bool:
        """The patch alone: the controller does the rest."""
        previous = self.rollout.previous
        if previous == self.version:
            return True  # it had proved good once, so there is nothing better to serve
        try:
            if _serves(self._get()) == self.version:
                self._patch(previous)
                print(f"Deployment {self.name}: back to version {previous.name if previous else 'none'}", flush=True)
            return True
        except (RolloutError, UnreachableError) as error:
            print(f"Deployment {self.name}: {error}", flush=True)
            return False

    def _remember(self) -> None:
        if self.refused:
            try:
                self._send({"metadata": {"annotations": {REFUSED: self.refused}}})
            except (RolloutError, UnreachableError) as error:
                print(f"Deployment {self.name}: {error}", flush=True)

    def _pods(self, found: Any, version: Version | None) -> list[Any]:
        selector = ",".join(f"{key}={value}" for key, value in sorted(found.spec.selector.match_labels.items()))
        pods = self._try(lambda: self.states.find(selector), "list the pods of")
        return [
            pod
            for pod in pods
            if _version_of(pod.metadata.annotations) == version and not pod.metadata.deletion_timestamp
        ]

    def _patch(self, version: Version | None) -> None:
        """Gives the template a version; None leaves it without one, as it was applied."""
        annotations = {VERSION: version.name if version else None, URI: version.uri if version else None}
        self._send({"spec": {"template": {"metadata": {"annotations": annotations}}}})

    def _send(self, body: dict[str, Any]) -> None:
        def send() -> Any:
            return self.apps.patch_namespaced_deployment(self.name, self.namespace, body, _request_timeout=TIMEOUT)

        self._try(send, "patch")

    def _get(self) -> Any:
        return self._try(
            lambda: self.apps.read_namespaced_deployment(self.name, self.namespace, _request_timeout=TIMEOUT), "read"
        )

    def _try(self, call: Callable[[], T], verb: str) -> T:
        """
        Raises:
            RolloutError: it is refused.
            UnreachableError: the API has not answered for long.
        """
        try:
            return self.patience.call(call, passing=(409, 429))
        except ApiException as error:
            what = f"Deployment {self.name} in namespace {self.namespace}"
            absent = (
                f"there is no {what}; apply an overlay that takes manifests/components/triton, or name yours as "
                "`deploy.deployment` (docs/deploy.md says what it needs)"
            )
            raise RolloutError(refusal(error, verb, what, absent=absent, role="trackrec-deploy")) from None


def _version_of(annotations: dict[str, str] | None, name: str = VERSION, uri: str = URI) -> Version | None:
    given = annotations or {}
    return Version(given[name], given[uri]) if given.get(name) and given.get(uri) else None


def _serves(deployment: Any) -> Version | None:
    return _version_of(deployment.spec.template.metadata.annotations)


def _is_complete(deployment: Any) -> bool:
    """Whether all pods are of the template as it is, and available: what `kubectl rollout status` waits for."""
    status, wanted = deployment.status, deployment.spec.replicas or 0
    if (status.observed_generation or 0) < deployment.metadata.generation:
        return False
    updated, there, available = status.updated_replicas or 0, status.replicas or 0, status.available_replicas or 0
    return bool(updated >= wanted and there <= updated and available >= updated)
