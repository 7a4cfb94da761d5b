"""Stage `active_users`: interactions to the users that the batch job writes features for, with their histories."""

import tempfile
from pathlib import Path

from ibis import _

from trackrec import storage
from trackrec.config import Domain, Positive
from trackrec.data import users as build
from trackrec.data.engine import open_engine
from trackrec.data.recipe import seconds
from trackrec.data_config import DataSettings
from trackrec.serving_config import ActiveUsersSettings

_IN_PROCESS = DataSettings()


class _Shown(ActiveUsersSettings):
    """What the stage's manifest names as its settings."""

    domain: Domain
    history_length: Positive


def run(
    settings: ActiveUsersSettings,
    data: DataSettings = _IN_PROCESS,
    *,
    interactions: Path,
    items: Path,
    users: Path,
    domain: str,
    history_length: int,
    seed: int = 0,
) -> None:
    """Writes users.parquet, strictly ordered by user.

    Args:
        data: the engine; it changes no row.
        domain: of the contexts that G was aligned on.
        history_length: items of each user, for the prompt, which holds fewer maybe, and for ranking models.

    Facts: `as_of` (s), users, and those dropped as inactive and by sampling.

    Raises:
        NotPublishedError, SchemaError: an input is no published table of its kind.
        EngineError: the engine cannot be reached.
        ValueError: nobody was active: an empty partition would take all users' features away.
    """
    given = {"interactions": interactions, "items": items}
    used = _Shown.model_validate({**settings.model_dump(), "domain": domain, "history_length": history_length})
    with (
        storage.publish("active_users", used, inputs=given, outputs={"users": users}, seed=seed) as job,
        tempfile.TemporaryDirectory(dir=job.work) as folder,
        open_engine(data, Path(folder)) as engine,
    ):
        rows, titles = engine.table(interactions, "interactions"), engine.table(items, "items")
        if settings.as_of is None:
            [last] = engine.fetched(rows.agg(timestamp=_.timestamp.max()))
            if last["timestamp"] is None:
                raise ValueError(f"{interactions} has no interaction; is this the right log?")
            as_of = build.midnight_after(last["timestamp"])
        else:
            as_of = seconds(settings.as_of)
        seen = engine.kept(build.newest(rows, as_of))
        active = build.active(seen, as_of, settings.active_days)
        chosen = build.sampled(active, settings.max_users, seed)
        table = build.users(chosen, rows, titles, as_of=as_of, domain=used.domain, history_length=used.history_length)
        written = engine.stored(table, job.outputs["users"], "users")
        [all_], [kept], [got] = (engine.fetched(t.agg(users=_.count())) for t in (seen, active, written))
        if not got["users"]:
            raise ValueError(
                f"no user has an interaction in the {settings.active_days} days before {settings.as_of or 'the end'}; "
                "bring the log up to date, or mend `dt` or `active_users.active_days`"
            )
        job.facts |= {
            "as_of": as_of,
            "users": got["users"],
            "dropped_inactive": all_["users"] - kept["users"],
            "dropped_by_sampling": kept["users"] - got["users"],
        }
