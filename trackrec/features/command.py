"""`trackrec features`: the job and its commit in one process, and what came of it in a few lines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trackrec.features.commit import commit
from trackrec.features.job import run_shards
from trackrec.features.table import Manifest, date_folder
from trackrec.features.users import day
from trackrec.serving_config import FeaturesSettings


def run(users: Path, given: Mapping[str, Any], dt: str | None) -> str:
    """
    Args:
        given: fields of `FeaturesSettings`, `out` among them.
        dt: the users' own day without one, whenever the job is run (again).

    Raises:
        pydantic.ValidationError: of `given`.
        OSError, ValueError, RuntimeError: see `run_shards` and `commit`; the message says what to do.
    """
    settings = FeaturesSettings.model_validate(given, strict=True)
    out = given["out"]
    dt = dt or day(users)
    done = run_shards(settings, users, out, dt)
    manifest = commit(settings, out, dt, done.identity.users)
    return summary(f"{out.rstrip('/')}/{date_folder(dt)}", manifest)


def summary(place: str, manifest: Manifest) -> str:
    """The manifest for people."""
    statuses = ", ".join(f"{count} {status}" for status, count in manifest.status.items() if count)
    lines = [
        f"{place}: {manifest.rows} users ({statuses}); {manifest.generated} RecCoTs generated, "
        f"{manifest.copied} copied",
        f"{'':16}{'p50':>10}{'p95':>10}{'p99':>10}{'mean':>10}",
    ]
    for name in ("prompt_tokens", "recot_tokens", "seconds"):
        quantiles = getattr(manifest, name)
        if quantiles:
            figures = (quantiles.p50, quantiles.p95, quantiles.p99, quantiles.mean)
            lines.append(f"{name:16}" + "".join(f"{figure:10.5g}" for figure in figures))
    if manifest.usd_per_1000_users is not None:
        lines.append(
            f"${manifest.usd_per_1000_users:.4f} per 1,000 users, {manifest.generator_seconds:g} s of the generator"
        )
    return "\n".join(lines)
