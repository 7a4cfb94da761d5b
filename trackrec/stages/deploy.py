"""A version of the models, brought to where the server's pods fetch it, rolled out, and what came of that."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trackrec import storage
from trackrec.serving import smoke, version
from trackrec.serving_config import DeploySettings

ROLLOUT = "rollout.json"
# All answers of a new pod together, which gave them to its startup probe before: an old pod does not wait for long.
SMOKE_SECONDS = 30.0
# Rolls a version out: its name, where it lies, and the inference that a server must pass; returns what was done.
Roll = Callable[[str, str, Callable[[str], dict[str, Any]]], dict[str, Any]]


def run(settings: DeploySettings, *, repository: Path, rollout: Path, roll: Roll) -> None:
    """Publishes `repository` under `settings.versions` and has `roll` serve it; writes `rollout.json`.

    The place is named by the files' hash, so a version is sent once, is never overwritten, and the pods of a rolled
    back one find theirs.

    Args:
        repository: what the stage `export` wrote.
        roll: the cluster's part, `components.rollout`.

    Facts: pods that passed the smoke inference.

    Raises:
        ValueError, FileNotFoundError: there is no place for versions, or `repository` is not of the stage `export`.
        storage.RemoteError, storage.CorruptError: it cannot be brought there whole.
    """
    if settings.versions is None:
        raise ValueError(
            "`deploy.versions` is not set: name the place that the server's pods fetch versions from, gs://BUCKET/PATH "
            "or a folder on a claim that they mount"
        )
    served = smoke.expected(repository)
    name = version.read(repository).version
    with storage.publish("deploy", settings, inputs={"repository": repository}, outputs={"rollout": rollout}) as job:
        held = storage.read_manifest(repository).content_hash
        uri = f"{settings.versions.rstrip('/')}/{held[:32]}"
        if not storage.is_remote(uri):
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
        storage.upload(repository, uri)
        print(f"version {name} lies at {uri}", flush=True)
        done = roll(name, uri, lambda address: smoke.check(address, served, within=SMOKE_SECONDS))
        (job.outputs["rollout"] / ROLLOUT).write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
        job.facts["pods"] = len(done["smoke"])
