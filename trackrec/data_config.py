"""Typed settings of what data preparation computes on: the section `data`, which the data stages share."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from trackrec.config import Memory, Positive, Settings, Text


def _without_token(url: str) -> str:
    if "token=" in url:
        raise ValueError("a config is no place for a token: leave it out here, and set SPARK_CONNECT_TOKEN in the pod")
    return url


class SparkApplication(Settings):
    """A Spark Connect server that lives as long as the stage: a SparkApplication of the Kubeflow Spark Operator."""

    # Spark 4 with the Connect server, and with what `scratch` needs (for gs:// the Cloud Storage connector).
    image: Text = "apache/spark:4.0.1"
    version: Text = "4.0.1"
    # Has the right to make pods, which Spark's driver needs for its executors (manifests/components/spark).
    service_account: Text = "trackrec-spark-driver"
    driver_cores: Positive = 2
    driver_memory: Memory = "8Gi"
    executors: Positive = 4
    executor_cores: Positive = 4
    executor_memory: Memory = "16Gi"
    # More of Spark's own settings.
    conf: dict[str, str] = Field(default_factory=dict)
    # How long to wait for the driver: a node may have to be added first.
    start_timeout_s: Positive = 900


class SparkSettings(Settings):
    """Where Spark runs: with neither `remote` nor `application`, in the process."""

    # A Spark Connect server, sc://HOST:PORT. A token is read from the environment's SPARK_CONNECT_TOKEN, never from a
    # file or an argument.
    remote: Annotated[str, Field(pattern=r"^sc://[^/;]+(/.*)?$"), AfterValidator(_without_token)] | None = None
    application: SparkApplication | None = None
    # A folder that both this process and Spark see (gs://..., or a path on a shared volume): tables go through it.
    scratch: Text | None = None

    @model_validator(mode="after")
    def _a_server_needs_a_shared_folder(self) -> Self:
        if self.remote is not None and self.application is not None:
            raise ValueError("`remote` names a server, `application` makes one; give one of them")
        if (self.scratch is not None) != self.is_server:
            raise ValueError("`scratch`, a folder that both see, goes with `remote` or `application`")
        return self

    @property
    def is_server(self) -> bool:
        return self.remote is not None or self.application is not None


class BigQuerySettings(Settings):
    """Where queries run and are billed; intermediate tables lie in `dataset` for a day at most."""

    project: Text
    dataset: Text
    location: Text | None = None


class DataSettings(Settings):
    """What the data stages compute on; all engines give the same rows (docs/data.md)."""

    engine: Literal["duckdb", "spark", "bigquery"] = "duckdb"
    # What an engine in the process holds in memory before it spills.
    memory_limit: Memory = "8Gi"
    spark: SparkSettings = SparkSettings()
    bigquery: BigQuerySettings | None = None

    @model_validator(mode="after")
    def _settings_go_with_the_engine(self) -> Self:
        if self.engine != "spark" and self.spark != SparkSettings():
            raise ValueError("`spark` goes with `engine: spark`, and only with it")
        if (self.bigquery is not None) != (self.engine == "bigquery"):
            raise ValueError("`bigquery` goes with `engine: bigquery`, and only with it")
        return self

    def reads(self, uri: str) -> bool:
        """Whether the engine reads raw data at `uri` where it lies, so that no pod need copy it."""
        if self.engine == "bigquery":
            return uri.startswith("bq://")
        return self.engine == "spark" and self.spark.is_server and "://" in uri
