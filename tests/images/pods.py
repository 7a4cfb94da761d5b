"""Runs a compiled pipeline with every task in its own image, as its pod would: from the IR alone, in podman."""

import json
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import components, local
from kfp.local import config, pipeline_orchestrator, status, subprocess_task_handler
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec
from kubernetes.utils import parse_quantity

# Whatever the image and the node: no network, no root, no writable place but what the IR mounts.
OPTIONS = ("--pull=never", "--network=none", "--read-only", "--read-only-tmpfs=false")


class Pods:
    """The executors of one compiled pipeline.

    Args:
        readable: files and folders from outside the run that tasks read, mounted at the same path.
        root: where artifacts go, mounted at the same path; the claims' volumes lie beside it.
    """

    def __init__(self, ir: Path, root: Path, readable: Sequence[Path]) -> None:
        self.ir = ir
        self.root = root
        self.readable = readable
        self.spec: PipelineSpec = components.load_component_from_file(str(ir)).pipeline_spec
        self.ran: list[str] = []
        spec, platform = [*yaml.safe_load_all(ir.read_text(encoding="utf-8")), {}][:2]
        settings = platform.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
        # A stage's executors differ in nothing that a pod sees but their arguments.
        self.options: dict[str, list[str]] = {}
        for label, executor in spec["deploymentSpec"]["executors"].items():
            if container := executor.get("container"):
                options = self._options(container, settings.get(label, {}))
                assert self.options.setdefault(container["image"], options) == options, container["image"]

    def run(self, arguments: dict[str, Any], *, only: Sequence[str] = ()) -> None:
        """
        Args:
            only: tasks by name, with all they read from; the whole pipeline without any.

        Raises:
            RuntimeError: a container failed; what would have followed did not run.
        """
        tasks = self.spec.root.dag.tasks
        for name in [name for name in tasks if only and name not in only]:
            del tasks[name]
        with _executors_are_pods(self):
            artifacts = self.root / "artifacts"
            artifacts.mkdir(parents=True)
            artifacts.chmod(0o777)  # as a pod's volume is: the images' user owns nothing here
            local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(artifacts), enable_caching=False)
            pipeline_orchestrator.run_local_pipeline(self.spec, arguments)

    def output(self, task: str, name: str) -> Path:
        """Where the one task of that component wrote its output."""
        [found] = self.root.glob(f"artifacts/*/{task}/{name}")
        return found

    def arguments(self, image: str, command: Sequence[str], environment: dict[str, str]) -> list[str]:
        variables = [f"--env={name}={value}" for name, value in environment.items()]
        entrypoint = f"--entrypoint={json.dumps([command[0]])}"
        return [*self.options[image], *variables, entrypoint, image, *command[1:]]

    def _options(self, container: dict[str, Any], platform: dict[str, Any]) -> list[str]:
        options = list(OPTIONS)
        if limit := container.get("resources", {}).get("resourceMemoryLimit"):
            options.append(f"--memory={parse_quantity(limit)}")
        if context := platform.get("securityContext"):
            options.append(f"--user={context['runAsUser']}:{context['runAsGroup']}")
        for mount in platform.get("emptyDirMounts", []):
            size = f",size={parse_quantity(mount['sizeLimit'])}" if "sizeLimit" in mount else ""
            if mount["mountPath"] == "/dev/shm":
                options.append(f"--shm-size={parse_quantity(mount['sizeLimit'])}")
            else:
                options.append(f"--tmpfs={mount['mountPath']}:mode=1777{size}")
        for mount in platform.get("pvcMount", []):
            claim = self.root / "claims" / mount["mountPath"].strip("/").replace("/", "-")
            claim.mkdir(parents=True, exist_ok=True)
            claim.chmod(0o777)
            options.append(f"--volume={claim}:{mount['mountPath']}")
        options.append(f"--volume={self.root}:{self.root}")
        return options + [f"--volume={path}:{path}:ro" for path in self.readable]


@contextmanager
def _executors_are_pods(pods: Pods) -> Iterator[None]:
    """In kfp's local runner, puts a container in the place of each process. (Its own containers cannot fail a run.)"""

    class Pod:
        def __init__(
            self,
            image: str,
            full_command: list[str],
            pipeline_root: str,
            runner: config.SubprocessRunner,
            env_vars: dict[str, str] | None = None,
        ) -> None:
            pods.ran.append(image)
            self.name = f"trackrec-{uuid.uuid4().hex[:12]}"
            self.command = [
                "podman",
                "run",
                f"--name={self.name}",
                *pods.arguments(image, full_command, env_vars or {}),
            ]

        def run(self) -> status.Status:
            try:
                with subprocess.Popen(
                    self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                ) as process:
                    assert process.stdout is not None
                    for line in process.stdout:
                        print(line, end="")
                return status.Status.FAILURE if self._exit_code() else status.Status.SUCCESS
            finally:
                subprocess.run(["podman", "rm", "--force", self.name], capture_output=True, check=False)

        def _exit_code(self) -> int:
            """The container's own: on a busy machine `podman run` may return before it is known, with a 125."""
            while True:
                asked = ["podman", "inspect", "--format={{.State.Running}} {{.State.ExitCode}}", self.name]
                running, code = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
                if running == "false":
                    return int(code)
                time.sleep(0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess_task_handler, "SubprocessTaskHandler", Pod)
        yield
