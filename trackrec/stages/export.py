"""A run's last G, its encoder and its rankers as a versioned Triton model repository, tried before it is published."""

import shutil
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from trackrec import storage
from trackrec.config import DecodingSettings, Domain, EncodeSettings, Positive
from trackrec.llm.models import check_whole
from trackrec.serving import repository as repositories
from trackrec.serving import server, smoke, version
from trackrec.serving.contract import Contract, RankerContract
from trackrec.serving.version import ModelName, Version
from trackrec.serving_config import ExportSettings

# What has a part in the bytes that are written or in the answers.
_LIBRARIES = ("numpy", "peft", "safetensors", "tokenizers", "torch", "transformers", "tritonclient", "nvidia-pytriton")
_NO_ENCODER = "the run has no encoder (`encoder` in its config)"
_NO_RANKER = "the run trained no ranking model (`ranking` in its config)"


class _Export(BaseModel):
    """What the stage's manifest names as its settings."""

    model_config = ConfigDict(extra="forbid")

    export: ExportSettings
    generate: DecodingSettings
    encode: EncodeSettings
    domain: Domain
    history_length: Positive
    run: str


def run(
    settings: ExportSettings,
    *,
    generate: DecodingSettings,
    encode: EncodeSettings,
    domain: str,
    history_length: int,
    run: str,
    run_config: str,
    base_model: Path,
    generator: Path,
    metrics: Path,
    repository: Path,
    encoder: Path | None = None,
    items: Path | None = None,
    ranker_base: Path | None = None,
    ranker_trackrec: Path | None = None,
) -> None:
    """Writes the model repository (`trackrec.serving.repository`) with its `version.json`.

    Before it is published the real server is started on it; every model must show its contract and answer. Whatever
    fails, nothing is published.

    Args:
        generate, encode: how the run's RecCoTs were decoded and encoded; so they are in serving.
        domain, history_length: of the contexts that G was aligned on; so are prompts in serving.
        run, run_config: the run's name and its settings as YAML, for the record.
        metrics: of the last evaluation of V, for the record.
        encoder: none of a run without; no vectors are served then.
        ranker_base, ranker_trackrec: `train_ctr`'s models of one backbone, without RecCoTs and with; both or none.
        items: table `items`, the rankers' catalogue; goes with them.

    Facts: `bytes` of the repository, `models` in it, `ready_seconds` of the server, and of each model the seconds that
    it took to answer.

    Raises:
        ValueError: `run_config` is no YAML mapping, or inputs contradict one another.
        ServerError: there is no server, or it does not load the models; SmokeError: one of them does not answer as it
            should.
    """
    asked = {"domain": domain, "history_length": history_length}
    arm = _Export.model_validate({"export": settings, "generate": generate, "encode": encode, "run": run, **asked})
    config = yaml.safe_load(run_config)
    if not isinstance(config, dict):
        raise ValueError("`run_config` is no YAML mapping; give the run's config.yaml")
    rankers: dict[ModelName, Path | None] = {"ranker_base": ranker_base, "ranker_trackrec": ranker_trackrec}
    ranked = [path for path in (ranker_base, ranker_trackrec, items) if path is not None]
    if ranked and (len(ranked) < 3 or encoder is None):
        raise ValueError("the rankers go together with `items` and `encoder`: give all four, or none of them")
    if settings.experiment is not None and not ranked:
        raise ValueError("`export.experiment` is a test of two rankers: give them, or leave it out")
    optional = {"encoder": encoder, "items": items, "ranker_base": ranker_base, "ranker_trackrec": ranker_trackrec}
    inputs = {"base_model": base_model, "generator": generator, "metrics": metrics}
    inputs |= {name: path for name, path in optional.items() if path is not None}

    server.check_installed()  # before minutes of writing weights
    with storage.publish("export", arm, inputs=inputs, outputs={"repository": repository}) as job:
        for path in (generator, *ranked):
            check_whole(base_model, path)
        out = job.outputs["repository"]
        writes = repositories.write_generator(
            out / "generator",
            settings,
            generate,
            domain=arm.domain,
            history_length=arm.history_length,
            base_model=base_model,
            generator=generator,
        )
        models: dict[ModelName, Contract] = {"generator": writes}
        absent: dict[ModelName, str] = {}
        if encoder is None:
            absent["encoder"] = _NO_ENCODER
        else:
            encodes = repositories.write_encoder(out / "encoder", encode, encoder=encoder)
            models["encoder"] = encodes
        served: dict[ModelName, RankerContract] = {}
        for name, ranker in rankers.items():
            if ranker is None or items is None:
                absent[name] = _NO_RANKER
                continue
            reads = (writes, encodes) if name == "ranker_trackrec" else (None, None)
            served[name] = repositories.write_ranker(
                out / name, settings, ranker=ranker, items=items, generator=reads[0], encoder=reads[1]
            )
        models |= served
        if settings.experiment is not None:
            models["ranker"] = repositories.write_experiment(
                out / "ranker",
                settings,
                control=served["ranker_base"],
                treatment=served["ranker_trackrec"],
            )
        before = _files(out)
        answers, job.facts = _tried(settings, out, job.work / "triton.log")
        if changed := before ^ _files(out):
            raise ValueError(f"a model changed {min(changed)[0]} while it was served; it must write elsewhere")
        what = Version(
            version=version.name_of(out),
            run=run,
            config=config,
            models={name: contract.model_dump(mode="json") for name, contract in models.items()},
            absent=absent,
            metrics={name: storage.numbers(path) for name, path in _measured(metrics, rankers).items()},
            packages=_packages(),
            smoke=answers,
        )
        version.write(out, what)
        job.facts |= {
            "models": len(models),
            "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        }


def _tried(settings: ExportSettings, folder: Path, log: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the models answer, by model, and the seconds that it took.

    Raises:
        ServerError, SmokeError: with the end of the server's log.
    """
    started = time.monotonic()
    with server.running(folder, log, ready_seconds=settings.ready_s) as running:
        ready = round(time.monotonic() - started, 3)
        try:
            answers = smoke.check(running.grpc, smoke.expected(folder))
        except smoke.SmokeError as error:
            end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
            raise smoke.SmokeError("\n".join([str(error), "the end of the server's log:", *end])) from error
    # The server's python heeds no PYTHONDONTWRITEBYTECODE.
    for compiled in folder.glob("*/1/__pycache__"):
        shutil.rmtree(compiled)
    # Times are facts: two exports of the same models are the same bytes.
    seconds = {f"{name}_seconds": answer.pop("seconds") for name, answer in answers.items()}
    return answers, {"ready_seconds": ready, **seconds}


def _files(folder: Path) -> set[tuple[str, int, int]]:
    """All files, with size and time of the last change."""
    found = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {(str(path.relative_to(folder)), about.st_size, about.st_mtime_ns) for path, about in found}


def _measured(metrics: Path, rankers: Mapping[ModelName, Path | None]) -> dict[str, Path]:
    return {"validator": metrics} | {name: path for name, path in rankers.items() if path is not None}


def _packages() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            # Of the server's environment, where that is another one; or of NVIDIA's image.
            continue
    return found | {"trackrec": storage.code_version()}
