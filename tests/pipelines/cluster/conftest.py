"""A server in memory, a config for it, and the command that talks to it."""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from kfp.client import Client
from pytest_httpserver import HTTPServer

from pipelines import cli, client, cluster_cli
from tests.pipelines.cluster.server import KfpServer

Run = Callable[..., str]
BUCKET = {"raw_data": "gs://bucket/ml-100k.zip", "base_model": "gs://bucket/smollm2", "encoder": "gs://bucket/minilm"}


def callers() -> list[tuple[None, None, None, str]]:
    """What kfp reads of `inspect.stack()` at every setting of a task; all of it takes minutes under pytest."""
    own = sys._getframe(1)
    assert own.f_back
    return [(None, None, None, frame.f_code.co_name) for frame in (own, own.f_back)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KfpServer]:
    """A server that the environment points to, as it would to a real one."""
    server = KfpServer()
    httpserver = HTTPServer(threaded=True)
    httpserver.expect_request(re.compile(".*")).respond_with_handler(server)
    httpserver.start()
    for name in ("KF_PIPELINES_SA_TOKEN_PATH", "KF_PIPELINES_DEFAULT_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", httpserver.url_for(""))
    monkeypatch.setattr(Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    monkeypatch.setattr(cluster_cli, "WATCH", 0.05)
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": httpserver.url_for("")}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "me"}}],
        "current-context": "test",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(kubeconfig))
    monkeypatch.setattr("kubernetes.config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(inspect, "stack", callers)
    yield server
    httpserver.check_assertions()
    httpserver.stop()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of a server that gives no answer in time."""
    monkeypatch.setattr(client, "TIMEOUT", (1.0, 1.0))


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The quick start in a bucket, cut down to what compiles quickly."""
    raw = yaml.safe_load(Path("pipelines/configs/quickstart.yaml").read_text()) | BUCKET
    raw["loop"] = {"iterations": 1, "controls": False}
    raw["ranking"] = {"backbones": ["dcn"], "controls_of": [], "by_iteration_of": []}
    path = tmp_path_factory.mktemp("config") / "cluster.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


@pytest.fixture
def trackrec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; its output, or with `fails` its message."""

    def run(*arguments: str, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["trackrec", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        assert ended.value.code == (1 if fails else 0), told.out + told.err
        assert "Traceback" not in told.err
        return told.err if fails else told.out

    return run


def run_in(output: str) -> str:
    found = re.search(r"run ([0-9a-f-]{36}) ", output)
    assert found, output
    return found[1]
