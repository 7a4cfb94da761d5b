"""A run's models exported in the triton image, then served in it by the manifests' own commands, in podman."""

import json
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.images import tagged
from pipelines import release
from tests.images.pods import OPTIONS, Pods
from tests.images.test_containers import BUILT, REGISTRY, any_tag, built, compiled, config, paths
from tests.stages import export_inputs
from tests.test_triton_manifests import container, template
from trackrec import storage
from trackrec.serving import version

pytestmark = pytest.mark.skipif(not BUILT, reason="runs from `make test-images`")
MODELS = {"generator", "encoder", "ranker_base", "ranker_trackrec"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The repository that the pipeline `release` writes of tiny models, in the image."""
    folder = tmp_path_factory.mktemp("release")
    given = export_inputs.inputs(folder, tiny_model)
    # Weights are written for their owner alone; the image's user is another.
    subprocess.run(["chmod", "-R", "a+rX", folder, tiny_model], check=True)
    arguments = {name: str(path) for name, path in given.items()}
    made = compiled(_Local, config(**{"resources.export.retries": 0}), folder)
    pods = Pods(made, folder / "root", paths(arguments))
    pods.run(arguments | {"run": export_inputs.RUN, "run_config": export_inputs.CONFIG})
    assert pods.ran == [tagged("export", REGISTRY)]
    return pods.output("export", "repository")


class _Local:
    """The pipeline as on one machine: there is no Deployment."""

    @staticmethod
    def build(loaded: Any) -> Any:
        return release.build(loaded, deployed=False)


def run(image: str, container: dict[str, Any], *options: str) -> list[str]:
    """`podman run` of a container as the manifests write it."""
    entrypoint = f"--entrypoint={json.dumps([container['command'][0]])}"
    arguments = [*container["command"][1:], *container.get("args", [])]
    return [
        "podman",
        "run",
        *OPTIONS,
        "--user=1000:1000",
        "--tmpfs=/tmp:mode=1777",
        *options,
        entrypoint,
        image,
        *arguments,
    ]


def fetch(uri: str, models: Path) -> subprocess.CompletedProcess[str]:
    (init,) = template()["spec"]["initContainers"]
    options = ["--rm", f"--env=VERSION_URI={uri}", f"--volume={models}:/models"]
    if uri:
        options.append(f"--volume={uri}:{uri}:ro")
    return subprocess.run(run(any_tag("triton"), init, *options), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def pod(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server of the exported version, by its container's name."""
    folder = tmp_path_factory.mktemp("pod")
    models = folder / "models"
    models.mkdir()
    models.chmod(0o777)
    done = fetch(str(exported), models)
    assert done.returncode == 0, done.stderr
    storage.verify(models / "repository")
    name = f"trackrec-triton-{uuid.uuid4().hex[:12]}"
    options = [f"--name={name}", "--detach", f"--volume={models}:/models:ro", f"--workdir={container()['workingDir']}"]
    subprocess.run(run(any_tag("triton"), container(), *options, "--shm-size=256m"), check=True, capture_output=True)
    yield name
    subprocess.run(["podman", "rm", "--force", name], capture_output=True, check=False)


def inside(pod: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["podman", "exec", pod, *command], capture_output=True, text=True, check=False)


@built("triton")
def test_a_run_is_exported_in_the_triton_image(exported: Path) -> None:
    """Without a network, on a read-only root: the real server has answered for all models before it is published."""
    storage.verify(exported)
    what = version.read(exported)
    assert what.models.keys() == what.smoke.keys() == MODELS and not what.absent
    assert what.packages["torch"].startswith("2.")


@built("triton")
def test_a_pod_serves_the_exported_version_as_the_manifests_say(pod: str) -> None:
    startup = container()["startupProbe"]["exec"]["command"]
    deadline = time.monotonic() + 300
    while (started := inside(pod, *startup)).returncode:
        logs = subprocess.run(["podman", "logs", pod], capture_output=True, text=True, check=True)
        assert time.monotonic() < deadline, f"{started.stderr}\n{logs.stdout[-5000:]}{logs.stderr[-5000:]}"
        time.sleep(2)
    assert json.loads(started.stdout).keys() == MODELS
    assert inside(pod, *container()["livenessProbe"]["exec"]["command"]).returncode == 0
    script = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8002/metrics').read().decode())"
    metrics = inside(pod, "python3", "-c", script).stdout
    # What the autoscaler's rules read, also of the generator's backend.
    for name in ("nv_inference_queue_duration_us", "nv_inference_request_success", "vllm:num_requests_waiting"):
        assert f'{name}{{model="generator"' in metrics, name
    assert inside(pod, "id", "-u").stdout.strip() == "1000"


@built("triton")
def test_a_pod_ends_by_sigterm_with_its_requests_answered(pod: str) -> None:
    subprocess.run(["podman", "stop", "--time=120", pod], check=True, capture_output=True)
    ended = subprocess.run(
        ["podman", "inspect", "--format={{.State.ExitCode}}", pod], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "0"


@built("triton")
def test_without_a_version_a_pod_says_what_to_do(tmp_path: Path) -> None:
    done = fetch("", tmp_path)
    assert (
        done.returncode == 1
        and done.stderr.strip() == "no version is rolled out yet: trackrec submit --pipeline release"
    )
