"""docs/cluster.md's section "Running", command by command, against a server in memory and a bucket's emulator."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.cloud.storage import Client

from tests import gcs
from tests.pipelines.cluster.conftest import Run, run_in
from tests.pipelines.cluster.server import KfpServer

# The paper's pipeline has too many tasks to compile for a look at the commands.
SMALLER = ("ranking.backbones=[dcn]", "ranking.controls_of=[]", "ranking.by_iteration_of=[]", "loop.controls=false")
SMALLER_STILL = ("loop.iterations=2",)
# What the reader has filled in.
OWN = (
    "registry=registry.example/trackrec",
    "raw_data=gs://cluster/raw/ml-1m.zip",
    "base_model=gs://cluster/models/qwen",
    "encoder=gs://cluster/models/bert",
)


@pytest.fixture
def bucket() -> Iterator[str]:
    with gcs.server():
        Client().create_bucket("cluster")
        yield "gs://cluster"


def commands() -> list[list[str]]:
    page = Path("docs/cluster.md").read_text(encoding="utf-8")
    [section] = re.findall(r"## Running\n(.*?)\n## ", page, re.DOTALL)
    script = "\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in script.splitlines()]
    return [line[1:] for line in lines if line[:1] == ["trackrec"]]


def test_the_pages_commands_do_what_it_says(
    server: KfpServer, trackrec: Run, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[str]] = {}
    run = ""
    for command, *arguments in commands():
        if "--config" in arguments:
            arguments += [part for setting in SMALLER + SMALLER_STILL + OWN for part in ("--set", setting)]
        if "RUN_ID" in arguments and command != "cancel" and server.runs[run].state == "PENDING":
            server.work(run, bucket=bucket)
            blob = f"v2/{run}/compare/results/table2.csv"
            Client().bucket("cluster").blob(blob).upload_from_string("AUC\n0.7\n")
            Client().bucket("cluster").blob(f"v2/{run}/compare/page").upload_from_string("<html>")
        arguments = [run if part == "RUN_ID" else part for part in arguments]
        arguments = [part.replace("YOUR-BUCKET", "cluster") for part in arguments]
        arguments = [str(tmp_path / part) if part == "results" else part for part in arguments]
        output = trackrec(command, *arguments)
        told.setdefault(command, []).append(output)
        if command in ("submit", "stage"):
            run = run_in(output)

    assert set(told) == {"upload", "submit", "status", "logs", "artifacts", "stage", "cancel", "schedule"}
    assert "uploaded" in told["upload"][0] and "unchanged" in told["submit"][0]
    assert "quickstart" not in told["status"][0] and "PENDING" in told["status"][0]
    assert re.search(r"sample 2 +succeeded", told["status"][1])
    assert "sample 2 at work" in told["logs"][0]
    assert "gs://cluster/v2/" in told["artifacts"][0]
    assert (tmp_path / "results/compare/results/table2.csv").read_text() == "AUC\n0.7\n"
    # Cancelled was the run that `stage` had started.
    assert server.runs[run].state == "CANCELED"
    assert [output.split(": ")[-1].split(",")[0].strip() for output in told["schedule"]] == ["new", "paused", "deleted"]
    assert server.schedules == {}
