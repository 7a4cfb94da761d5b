"""Stage `commit_features`: a day's features checked and committed, so that rankers read them."""

from pathlib import Path

from trackrec import storage
from trackrec.data.users import partition
from trackrec.features.commit import commit
from trackrec.features.table import MANIFEST, Manifest, date_folder
from trackrec.serving_config import FeaturesSettings


def run(settings: FeaturesSettings, *, users: Path, feature_shards: Path, committed: Path) -> str:
    """Commits the users' day in `settings.out` and writes a copy of its manifest.

    Args:
        feature_shards: what all pods did: there, they have ended.

    Returns:
        The day's folder.

    Facts: rows by status, copied and generated ones, seconds of the generator, and cost.

    Raises:
        CommitError: it is not whole, or other rows are committed.
    """
    out, dt = settings.place, partition(users)
    inputs = {"users": users, "feature_shards": feature_shards}
    with storage.publish("commit_features", settings, inputs=inputs, outputs={"committed": committed}, seed=dt) as job:
        manifest = commit(settings, out, dt, storage.content_hash(users))
        (job.outputs["committed"] / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        job.facts |= {
            "rows": manifest.rows,
            **{f"status_{name}": count for name, count in manifest.status.items()},
            "copied": manifest.copied,
            "generated": manifest.generated,
            "generator_seconds": manifest.generator_seconds,
        }
        if manifest.usd_per_1000_users is not None:
            job.facts["usd_per_1000_users"] = manifest.usd_per_1000_users
    return f"{out.rstrip('/')}/{date_folder(dt)}"


def read(committed: Path) -> Manifest:
    """The manifest that the stage wrote.

    Raises:
        NotPublishedError, CorruptError: it is no output of the stage's, or was changed.
    """
    storage.verify(committed, MANIFEST)
    return Manifest.model_validate_json((committed / MANIFEST).read_text(encoding="utf-8"))
