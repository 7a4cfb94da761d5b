"""Profiles: what each stage's pod asks for on each kind of cluster, in both documents of every pipeline's IR."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipelines import cli
from pipelines.options import PIPELINES
from trackrec import config_file, profile
from trackrec.config_file import ConfigError
from trackrec.run_config import StageResources

from .conftest import Compiled, compiled

PAPER = Path("pipelines/configs/ml-1m-qwen2.5-7b.yaml")
QUICKSTART = Path("pipelines/configs/quickstart.yaml")
TEACHER_KEY = ("trackrec-teacher", "api-key", "TEACHER_API_KEY")


# By pipeline and profile.
Documents = dict[tuple[str, str | None], Compiled]


@dataclass
class Pod:
    """What a pod is to ask for, written by hand from the clusters' own terms."""

    cpu: str
    memory: str
    scratch: str
    retries: int
    gpus: int = 0
    selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, str]] = field(default_factory=list)
    shm: str | None = None
    claims: tuple[str, ...] = ()
    priority: str | None = None
    secrets: tuple[tuple[str, str, str], ...] = ()
    cached: bool = True


A100 = {"cloud.google.com/gke-accelerator": "nvidia-a100-80gb"}
H100 = {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
OWN = {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
GKE_TAINT = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
ANY_TAINT = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
WORK, MODELS = "trackrec-work", "trackrec-model-cache"
# Of every cluster that has GPUs.
DATA = {
    "tables": Pod("8", "32Gi", "100Gi", 2, priority="trackrec-data"),
    "teacher": Pod("2", "4Gi", "20Gi", 2, claims=(WORK,), priority="trackrec-data", secrets=(TEACHER_KEY,)),
    "clients": Pod("4", "8Gi", "20Gi", 2, claims=(WORK,), priority="trackrec-data"),
    "rollout": Pod("1", "2Gi", "1Gi", 2, priority="trackrec-data"),
    "defaults": Pod("2", "8Gi", "20Gi", 2, priority="trackrec-data"),
}


def with_gpus(train: Pod, generate: Pod) -> dict[str, Pod]:
    train.claims, train.priority = (WORK,), "trackrec-train"
    generate.claims, generate.priority, generate.gpus, generate.shm = (WORK, MODELS), "trackrec-generate", 1, "16Gi"
    return {**DATA, "train": train, "generate": generate}


EXPECTED = {
    "gke-a100": with_gpus(
        Pod("32", "400Gi", "200Gi", 3, 8, A100, GKE_TAINT, "64Gi"), Pod("8", "64Gi", "100Gi", 2, 1, A100, GKE_TAINT)
    ),
    "gke-h100": with_gpus(
        Pod("64", "800Gi", "200Gi", 3, 8, H100, GKE_TAINT, "64Gi"), Pod("16", "128Gi", "100Gi", 2, 1, H100, GKE_TAINT)
    ),
    "on-prem": with_gpus(
        Pod("32", "400Gi", "200Gi", 3, 4, OWN, ANY_TAINT, "32Gi"), Pod("8", "64Gi", "100Gi", 2, 1, OWN, ANY_TAINT)
    ),
    "cpu": {
        "defaults": Pod("1", "4Gi", "10Gi", 1),
        "tables": Pod("1", "4Gi", "10Gi", 1),
        "teacher": Pod("2", "6Gi", "10Gi", 1, claims=(WORK,)),
        "clients": Pod("2", "6Gi", "10Gi", 1, claims=(WORK,)),
        "rollout": Pod("1", "4Gi", "10Gi", 1),
        "train": Pod("2", "12Gi", "10Gi", 1, shm="1Gi", claims=(WORK,)),
        "generate": Pod("2", "6Gi", "10Gi", 1, claims=(WORK,)),
    },
}
# A stage that is not here has the profile's defaults.
CLASS_OF = {
    "ingest": "tables",
    "contexts": "tables",
    "distill_data": "teacher",
    "sft_generator": "train",
    "sample": "generate",
    "score": "generate",
    "sdpo": "train",
    "generate": "generate",
    "rec_tune": "train",
    "evaluate": "generate",
    "encode": "generate",
    # Starts the server, with its GPU, on what it wrote; the batch job's pods are the server's clients alone.
    "export": "generate",
    "deploy": "rollout",
    "active_users": "tables",
    "features": "clients",
}
# What they read and write lies outside of the run.
NEVER_CACHED = {"deploy", "features", "commit_features"}


# A stage or two that tell the pipelines apart.
OWN_STAGES = {
    "trackrec": {"sdpo", "train_ctr"},
    "ablations": {"sdpo", "train_ctr"},
    "backbones": {"train_ctr"},
    "release": {"export", "deploy"},
    "batch_features": {"active_users", "features"},
}


def expected(name: str, stage: str, pipeline: str) -> Pod:
    if stage == "preflight":  # Once, anew each time, and with the secrets of all that follow.
        if name == "cpu":
            return Pod("1", "4Gi", "10Gi", 0, cached=False)
        secrets = () if pipeline in ("backbones", "batch_features") else (TEACHER_KEY,)
        return Pod("1", "2Gi", "1Gi", 0, claims=(WORK,), priority="trackrec-data", secrets=secrets, cached=False)
    if stage == "train_ctr":  # Its rows in memory, but no GPU.
        return EXPECTED[name]["generate" if name == "cpu" else "tables"]
    return replace(EXPECTED[name][CLASS_OF.get(stage, "defaults")], cached=stage not in NEVER_CACHED)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    """The paper's settings where there are GPUs, else the quick start, which also goes without a profile."""
    wanted = [(pipeline, name) for pipeline in PIPELINES for name in (*EXPECTED, None)]
    jobs = [(pipeline, str(QUICKSTART if name in ("cpu", None) else PAPER), name) for pipeline, name in wanted]
    out = tmp_path_factory.mktemp("ir") / "documents.json"
    program = Path(__file__).with_name("compile_all.py")
    subprocess.run([sys.executable, str(program), json.dumps(jobs), str(out)], check=True)
    return {key: Compiled(*both) for key, both in zip(wanted, json.loads(out.read_text()), strict=True)}


def stage_tasks(pipeline: Compiled) -> dict[str, str]:
    """Title to stage of every task but importers, by the image's tag (`STAGE-HASH`)."""
    found = {}
    for title in pipeline.tasks:
        if "container" in (executor := pipeline.executor(title)):
            found[title] = executor["container"]["image"].rpartition(":")[2].rpartition("-")[0]
    return found


def check(pipeline: Compiled, title: str, stage: str, pod: Pod) -> None:
    """A task's pod, in the first document (resources, retries, caching) and in the second (the rest)."""
    container, task, platform = pipeline.executor(title)["container"], pipeline.tasks[title], pipeline.platform(title)
    resources = container["resources"]
    assert resources["resourceCpuLimit"] == resources["resourceCpuRequest"] == pod.cpu
    assert resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"] == pod.memory
    if pod.gpus:
        accelerator = resources["accelerator"]
        assert (accelerator["resourceType"], accelerator["resourceCount"]) == ("nvidia.com/gpu", str(pod.gpus))
    else:
        assert "accelerator" not in resources
    assert task.get("retryPolicy", {}).get("maxRetryCount", 0) == pod.retries
    assert task["cachingOptions"].get("enableCache", False) is pod.cached

    assert platform.get("nodeSelector", {}).get("labels", {}) == pod.selector
    assert platform.get("tolerations", []) == pod.tolerations
    mounts = [(m["mountPath"], m.get("medium"), m["sizeLimit"]) for m in platform["emptyDirMounts"]]
    assert mounts == [("/tmp", None, pod.scratch)] + ([("/dev/shm", "Memory", pod.shm)] if pod.shm else [])
    paths = {WORK: "/tmp/trackrec-work", MODELS: "/tmp/trackrec-model-cache"}
    claims = [(claim["constant"], claim["mountPath"]) for claim in platform.get("pvcMount", [])]
    assert claims == [(claim, paths[claim]) for claim in pod.claims]
    environment = [(variable["name"], variable["value"]) for variable in container.get("env", [])]
    assert environment == ([("XDG_CACHE_HOME", paths[MODELS])] if MODELS in pod.claims else [])
    secrets = [
        (secret["secretName"], pair["secretKey"], pair["envVar"])
        for secret in platform.get("secretAsEnv", [])
        for pair in secret["keyToEnv"]
    ]
    assert secrets == list(pod.secrets)
    labels = {"trackrec/stage": stage} | ({"trackrec/priority-class": pod.priority} if pod.priority else {})
    assert platform["podMetadata"]["labels"] == labels
    # What "restricted" asks of a container beyond Kubeflow's own settings.
    identity = platform["securityContext"]
    assert (int(identity["runAsUser"]), int(identity["runAsGroup"]), identity["runAsNonRoot"]) == (1000, 1000, True)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", EXPECTED)
def test_every_stages_pod_of_every_pipeline_under_every_profile(documents: Documents, name: str, pipeline: str) -> None:
    tasks = stage_tasks(documents[pipeline, name])
    assert OWN_STAGES[pipeline] <= set(tasks.values())
    for title, stage in tasks.items():
        try:
            check(documents[pipeline, name], title, stage, expected(name, stage, pipeline))
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"{title} under {name}") from error


def test_the_pipelines_have_every_stage(documents: Documents) -> None:
    stages = {s for pipeline in PIPELINES for s in stage_tasks(documents[pipeline, None]).values()}
    # Shards are gathered where there are some: tests/pipelines/test_shards.py.
    assert stages == set(StageResources.model_fields) - {"gather"}


def test_the_profiles_are_those_that_are_tested() -> None:
    assert profile.names() == sorted(EXPECTED)


def test_without_a_profile_a_small_config_has_the_defaults(documents: Documents) -> None:
    pipeline = documents["trackrec", None]
    for title, stage in stage_tasks(pipeline).items():
        small = Pod("1", "2Gi", "1Gi", 0, cached=False)
        check(pipeline, title, stage, small if stage == "preflight" else Pod("2", "8Gi", "20Gi", 2))


@pytest.mark.parametrize("config", sorted(Path("pipelines/configs").glob("*7b.yaml")), ids=lambda path: path.stem)
def test_the_papers_settings_say_nothing_of_a_cluster_and_name_the_profiles(config: Path) -> None:
    assert "resources" not in yaml.safe_load(config.read_text())
    done = CliRunner().invoke(cli.app, ["compile", "-c", str(config)])
    assert isinstance(done.exception, ConfigError)
    [line] = str(done.exception).splitlines()[1:]
    named = {name for name in profile.names() if name in line}
    # All that have GPUs.
    assert named == {name for name, pods in EXPECTED.items() if pods["train"].gpus}
    with pytest.raises(ConfigError, match="needs GPUs"):
        config_file.load(config, profile="cpu")


def test_the_docs_commands(tmp_path: Path) -> None:
    """Those that compile; other tests run the others."""
    pages = "".join(Path("docs", page).read_text() for page in ("cluster.md", "multi-node.md")).replace("\\\n", " ")
    commands = re.findall(r"^trackrec compile .*$", pages, re.M)
    assert len(commands) == 5
    for command in commands:
        _, *arguments = shlex.split(command.replace("build/", f"{tmp_path}/"), comments=True)
        subprocess.run([Path(sys.executable).with_name("trackrec"), *arguments], check=True)
    assert len(list(tmp_path.iterdir())) == 5


def test_the_command_lays_a_profile_over(tmp_path: Path) -> None:
    pipeline = compiled("ml-1m-qwen2.5-7b", tmp_path, "resources.sdpo.accelerator.count=8", profile="on-prem")
    assert pipeline.executor("sdpo 1")["container"]["resources"]["accelerator"]["resourceCount"] == "8"
    assert pipeline.executor("rec_tune 1")["container"]["resources"]["accelerator"]["resourceCount"] == "4"
    assert pipeline.platform("sdpo 1")["nodeSelector"]["labels"] == OWN


def written(tmp_path: Path, **sections: object) -> str:
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(sections))
    return str(path)


def test_a_profile_goes_over_the_config_and_an_override_over_both(tmp_path: Path) -> None:
    """Key by key: what the profile does not name stays as the config has it."""
    config = tmp_path / "config.yaml"
    raw = yaml.safe_load(QUICKSTART.read_text())
    raw["resources"] = {"sample": {"cpu": "7", "memory": "7Gi", "shm": "7Gi"}, "score": {"retries": 7}}
    config.write_text(yaml.safe_dump(raw))
    laid = written(
        tmp_path,
        defaults={"cpu": "1", "memory": "1Gi"},
        classes={"gpu": {"memory": "2Gi", "node_selector": {"a": "b"}}},
        stages={"sample": "gpu"},
    )
    resources = config_file.load(config, {"resources.sample.memory": "9Gi"}, profile=laid).resources
    assert (resources.sample.cpu, resources.sample.memory, resources.sample.shm) == ("1", "9Gi", "7Gi")
    assert resources.sample.node_selector == {"a": "b"}
    assert (resources.score.cpu, resources.score.memory, resources.score.retries) == ("1", "1Gi", 7)
    assert resources.ingest.cpu == "1" and resources.ingest.node_selector == {}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"default": {}}, r"default: unknown key; allowed here: classes, defaults, stages"),
        ({"defaults": {"cpus": "1"}}, r"defaults\.cpus: unknown key; allowed here: .*\bcpu\b"),
        ({"classes": {"a": {"memory": "lots"}}, "stages": {"sample": "a"}}, r"classes\.a\.memory: .*'lots'"),
        ({"classes": {"a": {"retries": "2"}}, "stages": {"sample": "a"}}, r"classes\.a\.retries: .*integer"),
        ({"classes": {"a": {"mem": "1Gi"}}, "stages": {"sample": "a"}}, r"classes\.a\.mem: unknown key; .*\bmemory\b"),
        ({"classes": {"a": {}}, "stages": {"sampel": "a"}}, r"`stages` names sampel; the stages are: .*\bsample\b"),
        ({"stages": {"sample": "gpu"}}, r"`stages\.sample` names the class gpu, which `classes` lacks"),
        ({"classes": {"gpu": {}}}, r"`classes` has gpu, which `stages` gives to none"),
    ],
)
def test_a_bad_profile_is_named_with_what_is_allowed(tmp_path: Path, sections: dict[str, object], message: str) -> None:
    path = written(tmp_path, **sections)
    with pytest.raises(ConfigError, match=message) as raised:
        config_file.load(QUICKSTART, profile=path)
    assert str(raised.value).startswith(path)


def test_a_profile_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"--profile gke: .*there are: cpu, gke-a100, gke-h100, on-prem"):
        config_file.load(QUICKSTART, profile="gke")


def test_a_batch_that_the_profiles_gpus_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`sdpo.batch_size` \(4\) must be a multiple .*\(4 processes\)"):
        config_file.load(PAPER, {"sdpo.batch_size": 4, "sdpo.micro_batch_size": 4}, profile="on-prem")
