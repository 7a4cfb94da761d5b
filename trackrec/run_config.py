"""Typed settings of a whole run: the stages' sections, the loop, and what each stage's pod asks for.

The field names of `RunConfig` are the stages' names. `trackrec.config_file` reads it; an unknown key, a wrong type
or an impossible combination is refused with the key's path and what is allowed. No stage imports this module: what is
asked of a pod is not part of what a stage computes (`preflight`, which checks just that, does).
"""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from trackrec.config import (
    Backbone,
    ContextsSettings,
    Count,
    DecodingSettings,
    DistillDataSettings,
    Domain,
    EncodeSettings,
    EngineSettings,
    EvaluateSettings,
    IngestSettings,
    Memory,
    Positive,
    PreferencesSettings,
    RecTuneSettings,
    SampleSettings,
    ScoreSettings,
    SdpoSettings,
    Settings,
    SftSettings,
    Text,
    TrainCtrSettings,
    Trained,
    TrainingSettings,
    Version,
    unquoted,
)
from trackrec.data_config import DataSettings
from trackrec.serving_config import ActiveUsersSettings, DeploySettings, ExportSettings, FeaturesSettings

# Of cores, e.g. "8", "0.5", "500m".
Cores = Annotated[str, BeforeValidator(unquoted), Field(pattern=r"^([0-9]+(\.[0-9]+)?|[0-9]+m)$")]


TRAINED = get_args(Trained)


class LoopSettings(Settings):
    """Algorithm 2."""

    # T; 0 stops after distillation and its evaluation.
    iterations: Count = 3
    distillation: bool = True
    # Where V starts in each iteration: the paper says the previous one, the authors' scripts start from the base.
    validator_init: Literal["previous", "base"] = "previous"
    # Figure 1's controls (no RecCoT: zero-shot and tuned) and RecCoTs shuffled between users.
    controls: bool = True
    # Also the RecCoTs of the base model as it is, which the aligned G's length and speed are compared with (Table 5a):
    # one more `generate`.
    untuned: bool = True


class RankingSettings(Settings):
    """RecCoTs as a feature of ranking models (3.6): Table 2, Figure 5 and the controls."""

    # Each is trained with and without the RecCoTs of the last iteration.
    backbones: list[Backbone] = Field(default_factory=lambda: list(get_args(Backbone)), min_length=1)
    # Of these backbones, also the controls: vectors of random numbers, of other users' RecCoTs, of the raw history.
    controls_of: list[Backbone] = Field(default_factory=lambda: list(get_args(Backbone)))
    # Also trained on the RecCoTs of every earlier iteration (Figure 5; the paper takes DIN).
    by_iteration_of: list[Backbone] = Field(default=["din"])

    @model_validator(mode="before")
    @classmethod
    def _defaults_are_of_the_backbones(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("backbones"), list):
            return given
        known = [name for name in given["backbones"] if name in get_args(Backbone)]
        return {"controls_of": known, "by_iteration_of": [name for name in known if name == "din"], **given}

    @model_validator(mode="after")
    def _each_once_and_compared(self) -> Self:
        for name in ("backbones", "controls_of", "by_iteration_of"):
            given: list[Backbone] = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"`{name}` names a backbone twice")
            if missing := [backbone for backbone in given if backbone not in self.backbones]:
                raise ValueError(f"`{name}` names {', '.join(missing)}, which `backbones` lacks")
        return self


class Accelerator(Settings):
    type: Text = "nvidia.com/gpu"
    count: Positive = 1


class Toleration(Settings):
    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    # None tolerates every effect.
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _value_goes_with_equal(self) -> Self:
        if (self.operator == "Equal") != (self.value is not None):
            raise ValueError("`value` goes with `operator: Equal`, and only with it")
        return self


class SecretKey(Settings):
    """One key of a Kubernetes secret, given to the container as an environment variable."""

    secret: Text
    key: Text
    env: Text


class Resources(Settings):
    """What one stage's pod asks for; on one machine only `cache` counts."""

    cpu: Cores = "2"
    memory: Memory = "8Gi"
    # Scratch space at /tmp, on the node's own disk.
    ephemeral_storage: Memory = "20Gi"
    # All else here is of one node; more than one needs `work_claim` (docs/multi-node.md).
    nodes: Positive = 1
    accelerator: Accelerator | None = None
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: list[Toleration] = Field(default_factory=list)
    # Size of /dev/shm (memory-backed), for NCCL and data loaders.
    shm: Memory | None = None
    # A PersistentVolumeClaim for checkpoints and finished shards, so that a retried pod resumes.
    work_claim: Text | None = None
    # A PersistentVolumeClaim for what engines derive from a model (vLLM's compiled graphs), so that it is made once.
    model_cache_claim: Text | None = None
    # A PriorityClass of the cluster; Kubeflow's IR has no field for it (manifests/priority).
    priority_class: Text | None = None
    secrets: list[SecretKey] = Field(default_factory=list)
    retries: Count = 2
    cache: bool = True


class ShardedResources(Resources):
    """What each of a stage's pods asks for, and how many pods share its contexts."""

    shards: Positive = 1


class StageResources(Settings):
    """Resources by stage; a stage left out gets the defaults of `Resources`."""

    # Never retried nor cached, whatever is said here; a `work_claim` has its free space checked.
    preflight: Resources = Resources(cpu="1", memory="2Gi", ephemeral_storage="1Gi", retries=0, cache=False)
    ingest: Resources = Resources()
    contexts: Resources = Resources()
    distill_data: Resources = Resources()
    sft_generator: Resources = Resources()
    sample: ShardedResources = ShardedResources()
    score: ShardedResources = ShardedResources()
    preferences: Resources = Resources()
    sdpo: Resources = Resources()
    generate: ShardedResources = ShardedResources()
    gather: Resources = Resources()
    rec_tune: Resources = Resources()
    evaluate: Resources = Resources()
    tabulate: Resources = Resources()
    encode: ShardedResources = ShardedResources()
    train_ctr: Resources = Resources()
    tabulate_ctr: Resources = Resources()
    compare: Resources = Resources()
    export: Resources = Resources()
    # Rolls out what the cluster has: never cached.
    deploy: Resources = Resources(cpu="1", memory="2Gi", ephemeral_storage="1Gi", cache=False)
    active_users: Resources = Resources()
    # Both never cached, whatever is said here.
    features: ShardedResources = ShardedResources()
    commit_features: Resources = Resources()

    @model_validator(mode="after")
    def _nodes_train_and_share(self) -> Self:
        for stage, resources in self:
            if resources.nodes > 1 and stage not in TRAINED:
                raise ValueError(f"`{stage}.nodes`: only {', '.join(TRAINED)} run on several nodes; leave it out")
            if resources.nodes > 1 and resources.work_claim is None:
                raise ValueError(f"`{stage}.nodes` needs `{stage}.work_claim`: all nodes read and write there")
        return self

    @model_validator(mode="after")
    def _a_variable_holds_one_secret(self) -> Self:
        """`preflight` is given the secrets of all stages at once."""
        found: dict[str, SecretKey] = {}
        for stage, resources in self:
            for secret in resources.secrets:
                if found.setdefault(secret.env, secret) != secret:
                    raise ValueError(
                        f"`{stage}.secrets` gives {secret.env} another secret than an earlier stage does; "
                        "name another `env`"
                    )
        return self


# What the prompts of a domain tell the model (trackrec/prompts/templates): a rating above this means like.
_LIKED_ABOVE: dict[Domain, int] = {"movies": 3, "books": 4}
# The ratings that count as liked in CoLLM's recipes: from this one on.
_LIKED_FROM = {"ml-100k": 4, "ml-1m": 4, "amazon-book": 5}


class RunConfig(Settings):
    """A whole run: `pipelines/configs/*.yaml`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=60)]
    seed: Count = 0
    # A local path or a bucket's URI; `package:NAME` is fetched by package name into the local cache first.
    raw_data: Text
    base_model: Text
    # What lies under a bucket's URI may change, and Kubeflow's cache does not look: change this with it, since it is
    # part of the cache key. Local runs fill in the content hash themselves.
    raw_data_version: Version = ""
    base_model_version: Version = ""
    # A BERT-family model in Hugging Face layout, e.g. bert-base-uncased, for `ranking`.
    encoder: Text | None = None
    encoder_version: Version = ""
    # Where the images lie; a stage's image is REGISTRY/IMAGE:STAGE-HASH.
    registry: Text = "trackrec"
    loop: LoopSettings = LoopSettings()
    # Left out: the run ends with V's evaluations.
    ranking: RankingSettings | None = None
    # Of `ingest`, `contexts` and `active_users`.
    data: DataSettings = DataSettings()
    ingest: IngestSettings
    contexts: ContextsSettings
    distill_data: DistillDataSettings | None = None
    sft_generator: SftSettings = SftSettings()
    sample: SampleSettings = SampleSettings()
    score: ScoreSettings = ScoreSettings()
    preferences: PreferencesSettings = PreferencesSettings()
    sdpo: SdpoSettings = SdpoSettings()
    generate: DecodingSettings = DecodingSettings()
    rec_tune: RecTuneSettings = RecTuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    encode: EncodeSettings = EncodeSettings()
    train_ctr: TrainCtrSettings = TrainCtrSettings()
    export: ExportSettings = ExportSettings()
    deploy: DeploySettings = DeploySettings()
    active_users: ActiveUsersSettings = ActiveUsersSettings()
    features: FeaturesSettings = FeaturesSettings()
    resources: StageResources = StageResources()

    @property
    def user_history_length(self) -> int:
        """Items of each user in the feature table: a ranking model reads them, and a prompt the newest of them."""
        return max(self.contexts.history_length, self.train_ctr.history_length)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.loop.distillation and self.distill_data is None:
            raise ValueError(
                "`loop.distillation: true` needs `distill_data`; give it, or set `loop.distillation: false`"
            )
        for key in ("warm_rows", "long_tail_rows"):
            if getattr(self.train_ctr, key) != getattr(self.evaluate, key):
                raise ValueError(f"`train_ctr.{key}` and `evaluate.{key}` must be equal: one report compares both")
        if self.ranking is not None and self.encoder is None:
            raise ValueError("`ranking` needs `encoder`, a BERT-family model that turns RecCoTs into vectors; name one")
        if self.export.experiment is not None and self.ranking is None:
            raise ValueError("`export.experiment` is a test of two rankers, and without `ranking` there are none")
        for stage in ("sample", "score", "generate", "evaluate"):
            engine: EngineSettings = getattr(self, stage).engine
            accelerator: Accelerator | None = getattr(self.resources, stage).accelerator
            gpus = accelerator.count if accelerator else 0
            if engine.tensor_parallel_size > max(gpus, 1):
                raise ValueError(
                    f"`{stage}.engine.tensor_parallel_size` is {engine.tensor_parallel_size}, but "
                    f"`resources.{stage}.accelerator.count` gives {gpus} GPUs"
                )
        for stage in ("sample", "score", "generate", "encode"):
            pod: ShardedResources = getattr(self.resources, stage)
            used = 1 if stage == "encode" else getattr(self, stage).engine.tensor_parallel_size
            if pod.shards > 1 and pod.accelerator and pod.accelerator.count > used:
                raise ValueError(
                    f"`resources.{stage}`: {pod.shards} shards × {pod.accelerator.count} GPUs are "
                    f"{pod.shards * pod.accelerator.count}, and a shard works on {used} of its own; set "
                    f"`accelerator.count: {used}`"
                )
        for stage in TRAINED:
            training: TrainingSettings = getattr(self, stage)
            resources: Resources = getattr(self.resources, stage)
            accelerator = resources.accelerator
            if training.deepspeed and accelerator is None:
                raise ValueError(
                    f"`{stage}.deepspeed` needs GPUs: name a profile that has some (`--profile gke-a100`, `gke-h100`, "
                    f"`on-prem`), or set `resources.{stage}.accelerator`"
                )
            processes = resources.nodes * (accelerator.count if accelerator else 1)
            if training.batch_size % (training.micro_batch_size * processes):
                raise ValueError(
                    f"`{stage}.batch_size` ({training.batch_size}) must be a multiple of `{stage}.micro_batch_size` "
                    f"({training.micro_batch_size}) × `resources.{stage}.accelerator.count` × "
                    f"`resources.{stage}.nodes` ({processes} processes)"
                )
        if self.loop.distillation and self.sdpo.lora is not None and self.sdpo.lora != self.sft_generator.lora:
            raise ValueError("`sdpo.lora` goes on with the adapter of `sft_generator`; give both the same `lora`")
        return self

    @model_validator(mode="after")
    def _raw_data_can_be_read(self) -> Self:
        if self.raw_data.startswith("bq://") and self.data.engine != "bigquery":
            raise ValueError("`raw_data` is in BigQuery; set `data.engine: bigquery`")
        if self.raw_data.startswith("bq://") and self.ingest.dataset != "impressions":
            raise ValueError(f"`raw_data` in BigQuery goes with `dataset: impressions`, not {self.ingest.dataset!r}")
        return self

    @property
    def engine_reads_raw(self) -> bool:
        """Whether `raw_data` stays where it is: the engine of `data` reads a log there itself."""
        return self.ingest.dataset == "impressions" and self.data.reads(self.raw_data)

    @model_validator(mode="after")
    def _prompts_tell_what_is_liked(self) -> Self:
        domain = self.contexts.domain
        if domain == "generic":  # It shows like or dislike, whatever that follows from.
            return self
        log, above = self.ingest.log, _LIKED_ABOVE[domain]
        if log is not None and log.rating is None:
            raise ValueError(
                f"`contexts.domain: {domain}` shows ratings, and `ingest.log.rating` names no column; name one, or set "
                "`contexts.domain: generic`"
            )
        liked_from = _LIKED_FROM[self.ingest.dataset] if log is None else log.liked_from
        # Ratings come in whole steps; a log with a label column is taken at its word.
        if liked_from is not None and not above < liked_from <= above + 1:
            raise ValueError(
                f"`contexts.domain: {domain}` tells the model that a rating above {above} means like, but "
                f"`{self.ingest.dataset}` likes from {liked_from:g} on; set `contexts.domain: generic`"
            )
        return self


def secrets_of(config: RunConfig, *, loop: bool, features: bool = False) -> dict[str, SecretKey]:
    """The secrets of all stages' pods by environment variable.

    Args:
        loop: without it, of the stages that rank alone.
        features: or of the batch feature job's.
    """
    ranking = ("encode", "gather", "train_ctr", "tabulate_ctr", "compare")
    job = ("ingest", "active_users", "features", "gather", "commit_features")
    without_loop = job if features else ranking
    left_out = set() if config.loop.distillation else {"distill_data", "sft_generator"}
    return {
        secret.env: secret
        for stage in type(config.resources).model_fields
        if stage not in left_out and (loop or stage in without_loop)
        for secret in getattr(config.resources, stage).secrets
    }
