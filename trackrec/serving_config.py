"""Typed settings of production: the stages that export and deploy a run's models, and the batch feature job."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trackrec.abtest.bucketing import CONTROL, TREATMENT, Experiment
from trackrec.config import Backbone, Count, Moment, Positive, Rate, Settings, Share, Text


class ExperimentSettings(Settings):
    """An A/B test of a run's two rankers: which of them the model `ranker` scores a user with."""

    # The test's own: each salt draws anew.
    salt: Text
    # Of all users, in whole 1/10,000: those of `ranker_base` and of `ranker_trackrec`; who is in neither gets the base.
    control: Share
    treatment: Share

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        _ = self.experiment  # refuses what makes none
        return self

    @property
    def experiment(self) -> Experiment:
        # From named fields: the order of the shares says who is where, and Kubeflow's parameters keep no order of keys.
        return Experiment(salt=self.salt, shares={CONTROL: self.control, TREATMENT: self.treatment})


class ExportSettings(Settings):
    """A run's last G, its encoder and its rankers as a Triton model repository."""

    # merged: an adapter becomes part of the weights. lora: it stays apart, for vLLM to apply.
    adapter: Literal["merged", "lora"] = "merged"
    # Which of the run's ranking models is served, and under which of its seeds; the first one by default.
    backbone: Backbone | None = None
    seed: Count | None = None
    # Left out, there is no model `ranker`.
    experiment: ExperimentSettings | None = None
    # Processes of each ranking model, each a core's.
    ranker_instances: Positive = 1
    # vLLM's engine arguments.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_model_len: Annotated[int, Field(ge=64)] | None = None
    gpu_memory_utilization: Share = 0.9
    tensor_parallel_size: Positive = 1
    # How long the server may take until all models are loaded, for the inference that a version must pass.
    ready_s: Rate = 900


class DeploySettings(Settings):
    """The Deployment of manifests/components/triton that a version is rolled out to."""

    # In the namespace of the stage's own pod. The manifests' rights and network policies are for this very name.
    deployment: Text = "trackrec-triton"
    # Where versions are kept for the server's pods to fetch, each under its own name: gs://… or, on a claim that they
    # mount as well, a folder.
    versions: Text | None = None
    # Without progress for so long (a pod more that is ready) the old version is put back.
    timeout_s: Rate = 1800

    @model_validator(mode="after")
    def _pods_find_the_versions(self) -> Self:
        if self.versions is not None and not self.versions.startswith(("gs://", "/")):
            raise ValueError(f"`versions` is gs://BUCKET/PATH or a folder's whole path (got {self.versions!r})")
        return self


class ActiveUsersSettings(Settings):
    """Who gets a RecCoT: the users of the newest `active_days` days before the job's moment."""

    # The job's moment, which its partition is named after (ISO 8601, UTC). Left out: the midnight after the last
    # interaction. A pipeline's parameter `dt`; `trackrec schedule` fills in the day of each run.
    as_of: Moment | None = None
    active_days: Positive = 30
    # None takes all.
    max_users: Positive | None = None


class FeaturesSettings(Settings):
    """The batch feature job: active users' histories to RecCoTs and vectors, through Triton."""

    # HOST:PORT of Triton's gRPC endpoint.
    triton: Text = "trackrec-triton:8001"
    # Where the partitions dt=…/shard=… are written: gs://… or a folder.
    out: Text | None = None
    # Users in one shard of the output: what is lost, at most, when a job is killed and its disk with it.
    shard_users: Positive = 5000
    # Requests to the generator under way at once; about twice what it decodes at once keeps it busy.
    concurrency: Positive = 128
    # Texts in one request to the encoder.
    encoder_batch: Positive = 32
    # A user's RecCoT, with all tries.
    deadline_s: Rate = 300
    # Tries again after the server was lost or refused (UNAVAILABLE, INTERNAL), with growing pauses.
    retries: Count = 8
    # The share of users whom the server may fail; a date with more is not committed, and rankers keep the one before.
    max_failed: Annotated[float, Field(ge=0, le=1)] = 0.1
    embedding_dtype: Literal["float16", "float32"] = "float16"
    # What an hour of the generator's machine costs, for the manifest's cost per 1,000 users.
    usd_per_hour: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _the_server_is_a_host_and_a_port(self) -> Self:
        host, _, port = self.triton.rpartition(":")
        if not host or not port.isdigit() or "/" in self.triton:
            raise ValueError(f"`triton` is HOST:PORT of Triton's gRPC endpoint (got {self.triton!r})")
        return self

    @property
    def place(self) -> str:
        """`out`.

        Raises:
            ValueError: it is left out.
        """
        if self.out is None:
            raise ValueError("`features.out` names no place; give gs://BUCKET/PATH or a folder")
        return self.out
