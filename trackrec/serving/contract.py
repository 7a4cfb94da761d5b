"""What a served model tells its clients of itself: `parameters.trackrec` of its config.pbtxt, one JSON string.

A client asks the server for the model's config (`GetModelConfig`) and knows all that it has to agree on with the
model: no second source of truth. Needs neither torch nor the server.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from trackrec.abtest.bucketing import Experiment
from trackrec.config import Count, Domain, Positive, Rate, Text

# The key in `parameters`.
PARAMETER = "trackrec"
# Of a client's gRPC channel: a proxy of the environment's is for the way out, and a server is a neighbour.
CHANNEL = [("grpc.enable_http_proxy", 0)]


class ContractError(ValueError):
    """A model whose config has no contract, or not the one that its client reads."""


class Contract(BaseModel):
    """Base of all: read from a config, written into one."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # Content hash of what is served; a feature is of one version.
    model_version: Text

    @classmethod
    def of(cls, config: Any) -> Self:
        """The contract in a model's config.

        Args:
            config: `tritonclient.grpc`'s ModelConfig, its answer to `get_model_config`, or either as JSON (also what
                the python backend hands to `initialize`, once parsed).

        Raises:
            ContractError: there is none, or another.
        """
        if isinstance(config, Mapping):
            config = config.get("config", config)
            name, parameters = config.get("name", "?"), config.get("parameters", {})
            text = parameters.get(PARAMETER, {}).get("string_value")
        else:
            config = getattr(config, "config", config)
            name = config.name
            text = config.parameters[PARAMETER].string_value if PARAMETER in config.parameters else None
        if text is None:
            raise ContractError(
                f"the model {name} has no `parameters.{PARAMETER}`; serve a repository that the stage `export` wrote"
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ContractError(
                f"the model {name} has another contract than this client's {cls.__name__}, which is of another "
                f"release or another model; export it again with this release: {error}"
            ) from error


class GeneratorContract(Contract):
    """G: how a prompt becomes `text_input`, and how it decodes."""

    # Which of Figure 4's templates it was aligned on, and with how many items in it at most: the newest ones.
    domain: Domain
    history_length: Positive
    # The chat template's text before and after the user's message. Where the tokenizer puts a first token (BOS) before
    # any text by itself, `opening` has none.
    opening: str
    closing: str
    # The strings of all special tokens: broken up where the user's message has them (`trackrec.serving.prompts`).
    special_tokens: tuple[str, ...]
    max_tokens: Positive
    repetition_penalty: Rate
    # Of `sampling_parameters`, where the adapter lies beside the weights.
    lora_name: Text | None = None
    # Tokens that the whole prompt may have, so that `max_tokens` fit in after it.
    max_prompt_tokens: Positive


class EncoderContract(Contract):
    """The encoder: one text in, one vector out."""

    # Of a vector.
    width: Positive
    pooling: Literal["mean", "cls"]
    # Tokens that it reads of a text; the rest is cut off.
    limit: Positive
    # How it computes: see `trackrec.config.EncodeSettings`.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_tokens: Positive = 2048


class RankerContract(Contract):
    """A ranking model of one seed."""

    seed: Count
    uses_recot: bool
    # Whose vectors it was trained on, and of whose RecCoTs.
    encoder_version: Text | None = None
    generator_version: Text | None = None


class ExperimentContract(Contract):
    """The two rankers of an A/B test in one model: a user's bucket says which one answers."""

    experiment: Experiment
    # Of the buckets of these names.
    control: RankerContract
    treatment: RankerContract
