"""The batch feature job: the RecCoTs and vectors of all active users, through Triton, as one partition a day.

Recurring: `trackrec schedule` fills in `dt`, the day of each run. What did not change since the last one is copied.
"""

from functools import partial
from typing import Any

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent

from components.active_users.component import active_users
from components.commit_features.component import commit_features
from components.features.component import features
from pipelines.placement import place, values
from pipelines.preparation import ingested, preflighted
from pipelines.sharding import written
from trackrec.run_config import RunConfig

# The day of a schedule's run, which Kubeflow fills in; the format is Go's.
SCHEDULED_DAY = "[[ScheduledTime.2006-01-02]]"


def build(config: RunConfig) -> GraphComponent:
    """The pipeline; the log, the server and the features' place are parameters, and so is the day.

    Raises:
        ValueError: the config names no place for the features.
    """
    if config.features.out is None:
        raise ValueError("the pipeline `batch_features` needs `features.out`: gs://BUCKET/PATH or a folder")
    # These travel as parameters, and not twice.
    finding = values(config.active_users.model_copy(update={"as_of": None}))
    writing = values(config.features.model_copy(update={"out": None}))

    @dsl.pipeline(name=f"{config.name}-features", description=__doc__)
    def batch_features(
        raw_data: str = config.raw_data,
        triton: str = config.features.triton,
        out: str = config.features.out,
        dt: str = config.active_users.as_of or "",
    ) -> None:
        checked = preflighted(config, raw_data=raw_data, triton=triton, out=out)
        log = ingested(config, raw_data, checked, day=dt)
        found = active_users(
            settings=finding,
            data=values(config.data),
            seed=config.seed,
            as_of=dt,
            domain=config.contexts.domain,
            history_length=config.user_history_length,
            interactions=log["interactions"],
            items=log["items"],
        )
        users = place(found, "active_users", config).outputs["users"]
        task = partial(features, settings=writing, triton=triton, out=out, users=users)
        shards = written("features", config, "features", task)
        done = commit_features(settings=writing, out=out, users=users, feature_shards=shards)
        place(done, "commit_features", config)

    return batch_features


def dated(spec: dict[str, Any], arguments: dict[str, Any], day: str) -> dict[str, Any]:
    """The parameters of a run on a cluster: this pipeline is given the day, where neither they nor the config name one.

    Without one, Kubeflow's cache would take a log that has grown for the log it knows.

    Args:
        spec: the first document of a pipeline's IR.
        day: YYYY-MM-DD, or `SCHEDULED_DAY`.
    """
    known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    return {"dt": day} | arguments if "dt" in known and not known["dt"].get("defaultValue") else arguments
