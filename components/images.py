"""Which image runs which stage, and how images are named: the one place for both.

An image is one dependency set (`images/<image>/Dockerfile`). A pipeline names it with a tag that derives from the
sources that can affect the stage: the stage's own module, everything of `trackrec` it imports (and of `components`,
where its component's body does), its image's Dockerfile and locks. So an unchanged stage keeps its tag, and its cached
results, whatever else changes.
"""

import functools
import hashlib
import re
from pathlib import Path

import grimp

import trackrec

ROOT = Path(trackrec.__file__).parents[1]

IMAGE_OF = {
    "preflight": "data",
    "ingest": "data",
    "contexts": "data",
    "distill_data": "data",
    "sft_generator": "train",
    "sample": "generate",
    "score": "generate",
    "preferences": "data",
    "sdpo": "train",
    "generate": "generate",
    "gather": "data",
    "rec_tune": "train",
    "evaluate": "generate",
    "tabulate": "data",
    "encode": "rank",
    "train_ctr": "rank",
    "tabulate_ctr": "data",
    "compare": "rank",
    "export": "triton",
    "deploy": "data",
    "active_users": "data",
    "features": "data",
    "commit_features": "data",
}

# The files of `requirements/` that an image installs.
LOCKS_OF = {
    "data": ("build", "data"),
    "train": ("build", "train", "cuda", "torch"),
    "generate": ("generate", "generate-torch"),
    "rank": ("rank", "cuda", "torch"),
    "triton": ("triton-cpu", "torch"),
}

# The served models' own code, which the server imports by its name.
SERVED = {f"trackrec.serving.{name}_model" for name in ("encoder", "experiment", "generator", "ranker")}


def released(stage: str) -> str:
    """The image that a component on its own names: the release's."""
    return f"trackrec/{IMAGE_OF[stage]}:{trackrec.__version__}"


def tagged(stage: str, registry: str) -> str:
    """The image that a pipeline names, e.g. `registry/generate:sample-0123456789ab`."""
    return f"{registry}/{IMAGE_OF[stage]}:{stage}-{source_hash(stage)}"


@functools.cache
def source_hash(stage: str) -> str:
    """Twelve hex digits over every source that can affect what the stage writes."""
    digest = hashlib.sha256()
    for path in sources(stage):
        digest.update(f"{path.relative_to(ROOT)}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def sources(stage: str) -> list[Path]:
    """The files behind `source_hash`, sorted."""
    graph = _imports()
    image = IMAGE_OF[stage]
    modules = {f"trackrec.stages.{stage}"} | _imported_in_a_pod(graph, stage)
    if image == "train":
        modules.add("trackrec.stages.node")  # what a TrainJob's nodes run
    if stage == "export":
        modules |= SERVED  # what the server runs that tries the models
    found: set[Path] = set()
    for name in modules.union(*map(graph.find_upstream_modules, modules)):
        *packages, own = (ROOT / Path(*name.split(".")[: depth + 1]) for depth in range(name.count(".") + 1))
        if own.is_dir():
            packages.append(own)
        else:
            found.add(own.with_suffix(".py"))
        for package in packages:
            found.add(package / "__init__.py")
            found.update(_data_files(package))
    # And what the Dockerfile copies beside it.
    text = (ROOT / "images" / image / "Dockerfile").read_text(encoding="utf-8")
    found.update(ROOT / name for name in re.findall(rf"\bimages/{image}/[\w.]+", text))
    if stage == "export":
        found.update((ROOT / "trackrec/serving/backends").rglob("*.py"))
    found.add(ROOT / "images" / image / "Dockerfile")
    found.update(ROOT / "requirements" / f"{lock}.txt" for lock in LOCKS_OF[image])
    return sorted(found)


def _imported_in_a_pod(graph: grimp.ImportGraph, stage: str) -> set[str]:
    """What a component's body imports of `components`: its image holds that beside the library."""
    imported = graph.find_modules_directly_imported_by(f"components.{stage}.component")
    return {name for name in imported if name.startswith("components.")} - {__name__}


def _data_files(package: Path) -> list[Path]:
    """What a package carries beside code (prompt templates, recorded RecCoTs), its subpackages' left out."""
    files = (path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc"))
    return [path for path in files if next(p for p in path.parents if (p / "__init__.py").is_file()) == package]


@functools.cache
def _imports() -> grimp.ImportGraph:
    return grimp.build_graph("trackrec", "components", cache_dir=None)
