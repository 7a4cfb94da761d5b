"""Rollouts against a server that speaks the Kubernetes API's paths, with a real Triton server as the new pods."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.client import ApiClient, Configuration

from components import incluster, rollout
from components.rollout import PREVIOUS, PREVIOUS_URI, REFUSED, URI, VERSION, Rollout, RolloutError, Version
from tests.components import deployment_api
from tests.components.deployment_api import NAME, NAMESPACE, DeploymentApi
from tests.serving import versions
from trackrec.serving import server, smoke
from trackrec.serving_config import DeploySettings

OLD, NEW = Version("v-1", "gs://b/v-1"), Version("v-2", "gs://b/v-2")


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[smoke.Expected, int]]:
    """What a new pod must serve, and the port of a server that does."""
    folder = tmp_path_factory.mktemp("triton")
    repository = versions.write(folder / "repository", "g-2")
    with server.running(repository, folder / "log") as running:
        yield smoke.expected(repository), int(running.grpc.rpartition(":")[2])


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(incluster, "PAUSE_SECONDS", 0.05)


@pytest.fixture
def cluster() -> Iterator[Callable[..., DeploymentApi]]:
    made: list[DeploymentApi] = []

    def make(version: str | None = OLD.name, **given: Any) -> DeploymentApi:
        made.append(DeploymentApi(version, **given))
        return made[-1]

    yield make
    for api in made:
        api.close()


def passes(address: str) -> dict[str, Any]:
    return {"generator": {"text": address}}


def roll(
    api: DeploymentApi, ask: Callable[[str], dict[str, Any]] = passes, timeout_s: float = 20, run: str = ""
) -> Rollout:
    client = ApiClient(Configuration(host=api.url))
    return rollout.roll(incluster.Cluster(client, NAMESPACE), NAME, NEW, ask, timeout_s=timeout_s, run=run)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_the_old_version_serves(api: DeploymentApi) -> None:
    assert api.serves == OLD.name
    assert api.available == [OLD.name] * 2 and api.least_available == 2
    assert api.annotations == {VERSION: OLD.name, URI: OLD.uri}


def test_a_version_is_rolled_out_pod_by_pod_and_every_new_pod_is_asked(
    cluster: Callable[..., DeploymentApi], triton: tuple[smoke.Expected, int]
) -> None:
    expected, port = triton
    api = cluster(grpc_port=port)
    done = roll(api, lambda address: smoke.check(address, expected))
    assert (done.version, done.previous, done.was_there) == (NEW, OLD, False)
    assert sorted(done.smoke) == sorted(api.pods) and len(done.smoke) == 2
    assert {answer["generator"]["text"] for answer in done.smoke.values()} == {"quiet films"}
    # Never fewer than wanted served, never more than one besides.
    assert api.available == [NEW.name] * 2 and (api.least_available, api.most_pods) == (2, 3)
    assert api.annotations == {VERSION: NEW.name, URI: NEW.uri, PREVIOUS: OLD.name, PREVIOUS_URI: OLD.uri}
    template = {"metadata": {"annotations": {VERSION: NEW.name, URI: NEW.uri}}}
    assert api.patches[0] == {"spec": {"template": template}} and len(api.patches) == 2


def test_a_pod_that_serves_something_else_is_rolled_back(
    cluster: Callable[..., DeploymentApi], triton: tuple[smoke.Expected, int]
) -> None:
    other = smoke.Expected({"generator": "g-3"})
    api = cluster(grpc_port=triton[1])
    api.logs[NEW.name] += ["loaded generator", "\x1b[31mserving"]
    with pytest.raises(
        RolloutError, match=r"generator at .* is of version g-2, not g-3; version v-1 was put back, and"
    ):
        roll(api, lambda address: smoke.check(address, other))
    assert_the_old_version_serves(api)


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (deployment_api.never, r"no progress for 1 s \(pod pod-2: container triton running, not ready, 0 restarts - "),
        (
            deployment_api.crashes,
            r"pod pod-2: container triton CrashLoopBackOff: .* ended with status 1 \(Error\), 3 r",
        ),
        (deployment_api.evicted, r"is not rolled out: (pod pod-\d: Evicted The node was low on resource: .*){3}"),
        (deployment_api.unpullable, "pod pod-2: container triton ImagePullBackOff: not found, 0 restarts - "),
    ],
)
def test_a_pod_that_does_not_become_ready_is_rolled_back(
    cluster: Callable[..., DeploymentApi],
    capfd: pytest.CaptureFixture[str],
    behaviour: deployment_api.Behaviour,
    message: str,
) -> None:
    api = cluster()
    api.behaviours[NEW.name] = behaviour
    api.events[NEW.name].append("Startup probe failed: error: the generator wrote ''")
    api.logs[NEW.name] += ["loading", "OutOfMemoryError: CUDA\x07"]
    with pytest.raises(RolloutError, match=message) as caught:
        roll(api, timeout_s=1 if behaviour is deployment_api.never else 20)
    error = str(caught.value)
    assert "Unhealthy: Startup probe failed: error: the generator wrote ''" in error
    assert error.endswith("; version v-1 was put back, and serves")
    assert error.startswith("v-2 is not rolled out: ") and "\n" not in error
    assert_the_old_version_serves(api)
    # Without what a terminal would take for a command.
    assert "[pod-2] loading\n[pod-2] OutOfMemoryError: CUDA \n" in capfd.readouterr().out


def test_pods_that_ended_before_the_rollout_do_not_count(cluster: Callable[..., DeploymentApi]) -> None:
    """Kubernetes goes on listing them; the version may have been served, and have been evicted, once before."""
    api = cluster()
    api.behaviours[NEW.name] = deployment_api.evicted
    with pytest.raises(RolloutError, match="Evicted"):
        roll(api)
    del api.behaviours[NEW.name]
    assert len(roll(api).smoke) == 2 and api.available == [NEW.name] * 2


def test_a_pod_that_goes_while_it_is_asked_condemns_no_version(cluster: Callable[..., DeploymentApi]) -> None:
    api = cluster()
    asked: list[str] = []

    def drained(address: str) -> dict[str, Any]:
        asked.append(address)
        if len(asked) > rollout._SMOKE_TRIES:
            return passes(address)
        with api.lock:
            for name in [name for name, pod in api.pods.items() if deployment_api._version(pod) == NEW.name]:
                del api.pods[name]
        raise smoke.SmokeError("generator: UNAVAILABLE")

    assert len(roll(api, drained).smoke) == 2
    assert api.available == [NEW.name] * 2 and REFUSED not in api.annotations


def test_a_version_that_cannot_be_fetched_is_rolled_back(
    cluster: Callable[..., DeploymentApi], capfd: pytest.CaptureFixture[str]
) -> None:
    api = cluster()
    api.behaviours[NEW.name] = deployment_api.crashes
    api.at_fault[NEW.name] = "fetch"
    api.logs[NEW.name].append("error: gs://b/v-2 has no published.json")
    with pytest.raises(RolloutError, match="container fetch CrashLoopBackOff"):
        roll(api)
    assert "[pod-2] error: gs://b/v-2 has no published.json" in capfd.readouterr().out
    assert_the_old_version_serves(api)


def test_a_deadline_that_was_missed_before_the_rollout_condemns_no_version(
    cluster: Callable[..., DeploymentApi],
) -> None:
    """The manifests are applied, and the first version comes hours later: till then pods fail, since there is none."""
    api = cluster(None)
    api.miss_the_deadline()
    assert roll(api).version == NEW
    assert api.available == [NEW.name] * 2 and REFUSED not in api.annotations


def test_one_lost_connection_condemns_no_version(cluster: Callable[..., DeploymentApi]) -> None:
    asked: list[str] = []

    def once_away(address: str) -> dict[str, Any]:
        asked.append(address)
        if len(asked) == 1:
            raise smoke.SmokeError("unavailable")
        return passes(address)

    api = cluster(grpc_port=8001)
    assert len(roll(api, once_away).smoke) == 2
    assert asked == ["127.0.0.1:8001"] * 3


def test_a_pod_that_is_only_slow_is_asked_again(cluster: Callable[..., DeploymentApi]) -> None:
    asked: list[str] = []

    def under_load(address: str) -> dict[str, Any]:
        asked.append(address)
        if len(asked) <= 2 * rollout._SMOKE_TRIES:
            raise smoke.SlowError("the generator did not answer within 30 s")
        return passes(address)

    api = cluster()
    done = roll(api, under_load)
    assert sorted(done.smoke) == sorted(api.pods) and api.available == [NEW.name] * 2


def test_a_pod_that_stays_slow_is_rolled_back(cluster: Callable[..., DeploymentApi]) -> None:
    def hangs(address: str) -> dict[str, Any]:
        raise smoke.SlowError("the generator did not answer within 30 s")

    api = cluster()
    with pytest.raises(
        RolloutError, match=r"no progress for 1 s \(pod pod-2: the generator did not .* version v-1 was put back"
    ):
        roll(api, hangs, timeout_s=1)
    assert_the_old_version_serves(api)


def test_what_one_try_of_a_run_has_put_back_the_next_does_not_roll_out_again(
    cluster: Callable[..., DeploymentApi],
) -> None:
    def refuses(address: str) -> dict[str, Any]:
        raise smoke.SmokeError("the generator says nothing")

    api = cluster()
    with pytest.raises(RolloutError, match="says nothing; version v-1 was put back"):
        roll(api, refuses, run="run-1")
    assert api.serves == OLD.name and api.annotations[REFUSED] == f"{NEW.name} run-1"
    sent = len(api.patches)
    with pytest.raises(RolloutError, match="an earlier try of this run has put v-2 back"):
        roll(api, run="run-1")
    assert len(api.patches) == sent
    # Another run is somebody's decision.
    assert not roll(api, run="run-2").was_there and api.serves == NEW.name


def test_a_version_that_is_there_costs_nothing(cluster: Callable[..., DeploymentApi]) -> None:
    api = cluster(NEW.name)
    done = roll(api, lambda address: pytest.fail("asked"))
    assert done == Rollout(NEW, None, was_there=True)
    assert not api.patches


def test_the_first_version_has_nothing_to_go_back_to(cluster: Callable[..., DeploymentApi]) -> None:
    api = cluster(None)
    api.behaviours[NEW.name] = deployment_api.crashes
    with pytest.raises(RolloutError, match="no other version has proved good, so none was put back"):
        roll(api)
    assert api.serves is None and api.annotations == {}
    del api.behaviours[NEW.name]
    assert roll(api).previous is None
    assert api.available == [NEW.name] * 2 and api.annotations == {VERSION: NEW.name, URI: NEW.uri}


def test_a_version_that_somebody_has_undone_is_not_put_back(cluster: Callable[..., DeploymentApi]) -> None:
    """`kubectl rollout undo` changes the template alone: the Deployment still says that the later version is good."""
    api = cluster()
    undone = {VERSION: "v-9", URI: "gs://b/v-9"}
    api.patch({"metadata": {"annotations": undone}})
    api.behaviours[NEW.name] = deployment_api.crashes
    with pytest.raises(RolloutError, match="version v-1 was put back, and serves"):
        roll(api)
    assert api.serves == OLD.name and api.available == [OLD.name] * 2
    del api.behaviours[NEW.name]
    assert roll(api).previous == OLD
    assert api.annotations == {VERSION: NEW.name, URI: NEW.uri, PREVIOUS: OLD.name, PREVIOUS_URI: OLD.uri}


def test_a_cancelled_rollout_is_rolled_back(cluster: Callable[..., DeploymentApi]) -> None:
    api = cluster()
    api.behaviours[NEW.name] = deployment_api.never

    def cancel() -> None:
        until(lambda: NEW.name in {pod["metadata"]["annotations"][VERSION] for pod in api.pods.values()})
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=cancel, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        roll(api)
    assert caught.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
    until(lambda: api.available == [OLD.name] * 2 and len(api.pods) == 2)
    assert_the_old_version_serves(api)


def _rolls_for_ever(url: str) -> None:
    cluster = incluster.Cluster(ApiClient(Configuration(host=url)), NAMESPACE)
    rollout.roll(cluster, NAME, NEW, passes, timeout_s=1000)


@pytest.mark.parametrize("ends_well", [True, False])
def test_what_a_killed_stage_began_is_taken_up(
    cluster: Callable[..., DeploymentApi], capfd: pytest.CaptureFixture[str], ends_well: bool
) -> None:
    api = cluster()
    api.behaviours[NEW.name] = deployment_api.never
    process = multiprocessing.get_context("spawn").Process(target=_rolls_for_ever, args=(api.url,))
    process.start()
    until(lambda: api.serves == NEW.name)
    process.kill()
    process.join()
    assert api.available == [OLD.name] * 2
    if ends_well:
        api.behaviours[NEW.name] = deployment_api.good
        done = roll(api)
        assert done.previous == OLD and len(done.smoke) == 2 and len(api.patches) == 2
        assert api.annotations == {VERSION: NEW.name, URI: NEW.uri, PREVIOUS: OLD.name, PREVIOUS_URI: OLD.uri}
        assert "the rollout of v-2 is taken up" in capfd.readouterr().out
    else:  # what it goes back to outlived the stage
        with pytest.raises(RolloutError, match="version v-1 was put back, and serves"):
            roll(api, timeout_s=0.5)
        assert_the_old_version_serves(api)


def test_another_rollout_is_left_alone(cluster: Callable[..., DeploymentApi]) -> None:
    api = cluster()
    api.behaviours[NEW.name] = deployment_api.never
    other = {VERSION: "v-9", URI: "gs://b/v-9"}

    def interfere() -> None:
        until(lambda: api.serves == NEW.name)
        api.patch({"spec": {"template": {"metadata": {"annotations": other}}}})

    threading.Thread(target=interfere, daemon=True).start()
    with pytest.raises(RolloutError, match="was given version v-9 by someone else while v-2 was rolled out"):
        roll(api)
    assert api.serves == "v-9" and len(api.patches) == 1


@pytest.mark.parametrize(
    ("request_", "fault", "message"),
    [
        (
            "GET deployment",
            (403, "no get"),
            "may not read Deployment trackrec-triton in namespace ns: no get; run as the",
        ),
        (
            "PATCH deployment",
            (403, "no patch"),
            "may not patch .*: no patch; run as .* bound to the Role `trackrec-deploy`",
        ),
        (
            "GET pods",
            (403, "no list"),
            "v-2 is not rolled out: may not list the pods of .* version v-1 was put back, and",
        ),
        (
            "GET deployment",
            (404, "not found"),
            "there is no Deployment trackrec-triton in namespace ns; apply .* `deploy.deployment` .docs/deploy.md says",
        ),
    ],
)
def test_what_the_cluster_refuses_is_one_line(
    cluster: Callable[..., DeploymentApi], request_: str, fault: tuple[int, str], message: str
) -> None:
    api = cluster()
    api.faults[request_].append(fault)
    with pytest.raises(RolloutError, match=message) as caught:
        roll(api)
    assert "\n" not in str(caught.value)
    assert_the_old_version_serves(api)


def test_events_and_logs_that_may_not_be_read_are_said(
    cluster: Callable[..., DeploymentApi], capfd: pytest.CaptureFixture[str]
) -> None:
    api = cluster()
    api.behaviours[NEW.name] = deployment_api.crashes
    api.faults["GET events"].append((403, "no events"))
    api.faults["GET log"].append((403, "no logs"))
    with pytest.raises(RolloutError, match="its events cannot be read: no events"):
        roll(api)
    assert "the log of pod-2 cannot be read: no logs" in capfd.readouterr().out


def test_no_replicas_prove_nothing(cluster: Callable[..., DeploymentApi]) -> None:
    api = cluster(replicas=0)
    with pytest.raises(RolloutError, match="has no replicas, so no pod can prove the version; run: kubectl scale"):
        roll(api)
    assert not api.patches


def test_an_api_that_is_away_for_a_while_costs_nothing(cluster: Callable[..., DeploymentApi]) -> None:
    api = cluster()
    api.faults["GET deployment"] += [(503, "being upgraded"), (429, "too many requests")]
    api.faults["PATCH deployment"] += [(409, "the object has been modified")]
    api.faults["GET pods"] += [(500, "etcd")]
    assert len(roll(api).smoke) == 2
    assert not any(api.faults.values())


def test_an_api_that_stays_away_leaves_the_rollout_to_the_next_try(
    cluster: Callable[..., DeploymentApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incluster, "PATIENCE_SECONDS", 0.3)
    api = cluster()
    api.faults["GET pods"] += [(503, "gone for good")] * 1000
    with pytest.raises(incluster.UnreachableError, match="has not answered for long: gone for good"):
        roll(api)
    assert api.serves == NEW.name
    api.faults.clear()
    assert roll(api).previous == OLD


def test_outside_of_a_cluster_nothing_is_rolled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(incluster.OutsideError, match="the stage `deploy` needs a pod with a service account's token"):
        rollout.roller(DeploySettings(), "run-1")


def test_the_stages_settings_reach_the_rollout(
    cluster: Callable[..., DeploymentApi], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    api = cluster()
    own = incluster.Cluster(ApiClient(Configuration(host=api.url)), NAMESPACE)
    monkeypatch.setattr(rollout, "in_cluster", lambda what: own)
    rolled = rollout.roller(DeploySettings(deployment=NAME, timeout_s=20), "run-1")
    done = rolled(NEW.name, NEW.uri, passes)
    assert (done["version"]["name"], done["previous"]["name"], len(done["smoke"])) == ("v-2", "v-1", 2)
