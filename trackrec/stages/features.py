"""Stage `features`: active users' histories to RecCoTs and vectors (`trackrec.features`)."""

from pathlib import Path

from trackrec import storage
from trackrec.data import schema
from trackrec.data.users import partition
from trackrec.features.job import run_shards
from trackrec.features.table import STATUSES
from trackrec.serving_config import FeaturesSettings
from trackrec.shards import WHOLE, Shard


def run(settings: FeaturesSettings, *, users: Path, feature_shards: Path, shard: Shard = WHOLE) -> None:
    """Writes this pod's files of the users' day into `settings.out`, and what it did into feature_shards.parquet.

    Files that are there already are left; a killed pod goes on where it stopped, however often it is run.

    Raises:
        ValueError: `settings` names no place.
        LookupError: `users` is not of the stage `active_users`.
        CommitError, ContractError, RemoteError, ServerLostError: as `trackrec.features.job.run_shards`.
    """
    out, dt = settings.place, partition(users)
    inputs, outputs = {"users": users}, {"feature_shards": feature_shards}
    with storage.publish("features", settings, inputs=inputs, outputs=outputs, seed=dt) as job:
        done = run_shards(settings, users, out, dt, shard)
        counts = {"there": done.skipped, "rows": done.rows, "copied": done.copied, "generated": done.generated}
        schema.write(job.outputs["feature_shards"], "feature_shards", [{"shard": shard.number, **counts}])
        job.facts |= shard.facts() | counts | {f"status_{name}": done.status[name] for name in STATUSES}
