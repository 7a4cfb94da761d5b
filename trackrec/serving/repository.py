"""A run's models as a Triton model repository: the folder that the server serves as it is.

    generator/    config.pbtxt, 1/model.json (vLLM's engine arguments), 1/weights/; 1/multi_lora.json, 1/adapter/ with
                  an adapter kept apart
    encoder/      config.pbtxt, 1/model.py, 1/weights/
    ranker_base/, ranker_trackrec/    config.pbtxt, 1/model.py, 1/ranker/, 1/items.parquet
    ranker/       of an A/B test: config.pbtxt, 1/model.py, which reads the files of the two beside it

One folder for both backends named `vllm`, NVIDIA's and the one here. Paths in `model.json` and `multi_lora.json` are
relative to the repository, which is the server's working folder.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, cast

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from trackrec.config import DecodingSettings, Domain, EncodeSettings
from trackrec.config_file import ConfigError
from trackrec.ctr import ranker as rankers
from trackrec.data import schema
from trackrec.llm import models
from trackrec.llm.encoder import TextEncoder
from trackrec.serving import version, weights
from trackrec.serving.chat import chat_of
from trackrec.serving.contract import (
    PARAMETER,
    Contract,
    EncoderContract,
    ExperimentContract,
    GeneratorContract,
    RankerContract,
)
from trackrec.serving_config import ExportSettings

# Texts in one request to the encoder, and requests in one call of a ranker.
_ENCODER_BATCH, _RANKER_BATCH = 32, 64
# What a client names in `sampling_parameters` where the adapter is kept apart.
_LORA_NAME = "trackrec"


def write_generator(
    out: Path,
    settings: ExportSettings,
    decoding: DecodingSettings,
    *,
    domain: Domain,
    history_length: int,
    base_model: Path,
    generator: Path,
) -> GeneratorContract:
    """Writes the model `generator` to the new folder `out`.

    Args:
        domain, history_length: of the prompts that it was aligned on.

    Raises:
        ConfigError: `export.max_model_len` is more than the model reads, or leaves no room for a prompt.
        WrongBaseError, ValueError: see `trackrec.serving.weights`.
    """
    files = out / "1"
    lora = weights.write_generator(settings, base_model, generator, files)
    longest = int(json.loads((files / "weights/config.json").read_text(encoding="utf-8"))["max_position_embeddings"])
    max_model_len = settings.max_model_len or longest
    if not decoding.max_tokens < max_model_len <= longest:
        raise ConfigError(
            f"`export.max_model_len` is {max_model_len}; it must be more than `generate.max_tokens` "
            f"({decoding.max_tokens}), so that a prompt fits in, and at most the {longest} that the model reads"
        )
    arguments: dict[str, Any] = {
        "model": "generator/1/weights",
        "dtype": settings.dtype,
        # As the stage `generate` decodes: bfloat16 logits are too coarse to choose among close tokens.
        "hf_overrides": {"head_dtype": "float32"},
        "max_model_len": max_model_len,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel_size,
    }
    weights.write_json(files / "model.json", arguments | lora)
    if lora:
        weights.write_json(files / "multi_lora.json", {_LORA_NAME: "generator/1/adapter"})
    chat = chat_of(models.load_tokenizer(files / "weights"))
    contract = GeneratorContract(
        # Of the engine's arguments only what makes other texts: another share of the GPU's memory does not.
        model_version=f"{_version(files / 'weights', files / 'adapter')}-{settings.dtype}",
        domain=domain,
        history_length=history_length,
        opening=chat.opening,
        closing=chat.closing,
        special_tokens=chat.special_tokens,
        max_tokens=decoding.max_tokens,
        repetition_penalty=decoding.repetition_penalty,
        lora_name=_LORA_NAME if lora else None,
        max_prompt_tokens=max_model_len - decoding.max_tokens,
    )
    # The backend adds its inputs and outputs itself, and those of another release are others.
    config = pb.ModelConfig(name=out.name, backend="vllm")
    config.model_transaction_policy.decoupled = True
    # The engine takes the devices that it needs.
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_MODEL)
    # A broken engine then unloads its model, which is not ready any more; the server is.
    config.parameters["ENABLE_VLLM_HEALTH_CHECK"].string_value = "true"
    # How many prompts wait is the backend's own metric: an autoscaler reads it.
    config.parameters["REPORT_CUSTOM_METRICS"].string_value = "true"
    _write_config(out, config, contract)
    return contract


def write_encoder(out: Path, settings: EncodeSettings, *, encoder: Path) -> EncoderContract:
    """Writes the model `encoder` to the new folder `out`.

    Raises:
        ValueError: `encoder` has no safetensors.
    """
    weights.copy_model(encoder, out / "1/weights")
    model = TextEncoder(out / "1/weights", pooling=settings.pooling, dtype=settings.dtype)
    contract = EncoderContract(
        # Other pooling or precision is other vectors ("auto" is the hardware's choice, in training as in serving).
        model_version=f"{_version(out / '1/weights')}-{settings.pooling}-{settings.dtype}",
        width=model.width,
        pooling=settings.pooling,
        limit=model.limit,
        dtype=settings.dtype,
        batch_tokens=settings.batch_tokens,
    )
    config = _python_model(out, "encoder_model", _ENCODER_BATCH)
    # On the GPU where there is one, beside the generator.
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_MODEL)
    config.input.add(name="text", data_type=pb.TYPE_STRING, dims=[1])
    config.output.add(name="embedding", data_type=pb.TYPE_FP32, dims=[model.width])
    config.output.add(name="num_tokens", data_type=pb.TYPE_INT32, dims=[1])
    _write_config(out, config, contract)
    return contract


def write_ranker(
    out: Path,
    settings: ExportSettings,
    *,
    ranker: Path,
    items: Path,
    generator: GeneratorContract | None,
    encoder: EncoderContract | None,
) -> RankerContract:
    """Writes the model `ranker_base` or `ranker_trackrec` (the name is the new folder's) to `out`.

    Args:
        generator, encoder: whose RecCoTs it was trained on, and whose vectors of them; None of a model without.

    Raises:
        ValueError: the ranker reads RecCoTs and none are encoded, or the other way round, or not of this width.
        LookupError: there is no model of that seed.
    """
    config = rankers.RankerConfig.model_validate_json((ranker / rankers.CONFIG).read_text(encoding="utf-8"))
    width = config.vocabulary.vector_width
    if width != (encoder.width if encoder else 0):
        raise ValueError(
            f"the ranker in {ranker} reads vectors of width {width}, and {out.name} is given those of width "
            f"{encoder.width if encoder else 0}; give the ranker that was trained "
            f"{'on this encoder' if encoder else 'without RecCoTs (feature none)'}"
        )
    chosen = config.seeds[0] if settings.seed is None else settings.seed
    rankers.load(ranker, chosen)  # refuses a seed that is not there, and weights that do not fit
    served = out / "1/ranker"
    served.mkdir(parents=True)
    for name in (rankers.CONFIG, f"seed-{chosen}.safetensors"):
        shutil.copyfile(ranker / name, served / name)
    catalogue = schema.path_of(items, "items")
    shutil.copyfile(catalogue, out / "1" / catalogue.name)
    contract = RankerContract(
        model_version=_version(out / "1"),
        seed=chosen,
        uses_recot=width > 0,
        encoder_version=encoder.model_version if encoder else None,
        generator_version=generator.model_version if generator else None,
    )
    _write_config(out, _ranking_model(out, "ranker_model", settings), contract)
    return contract


def write_experiment(
    out: Path, settings: ExportSettings, *, control: RankerContract, treatment: RankerContract
) -> ExperimentContract:
    """Writes the model `ranker` to the new folder `out`, beside the rankers `ranker_base` and `ranker_trackrec`.

    Args:
        settings: with an experiment.
        control, treatment: the contracts of these two.
    """
    assert settings.experiment is not None
    experiment = settings.experiment.experiment
    drawn = hashlib.sha256(experiment.model_dump_json().encode()).hexdigest()[: len(control.model_version)]
    contract = ExperimentContract(
        model_version=f"{control.model_version}-{treatment.model_version}-{drawn}",
        experiment=experiment,
        control=control,
        treatment=treatment,
    )
    (out / "1").mkdir(parents=True)
    config = _ranking_model(out, "experiment_model", settings)
    config.output.add(name="arm", data_type=pb.TYPE_STRING, dims=[1])
    _write_config(out, config, contract)
    return contract


def _ranking_model(out: Path, module: str, settings: ExportSettings) -> pb.ModelConfig:
    """A user and candidates in, scores out."""
    triton = _python_model(out, module, _RANKER_BATCH)
    triton.instance_group.add(count=settings.ranker_instances, kind=pb.ModelInstanceGroup.KIND_CPU)
    triton.input.add(name="user_id", data_type=pb.TYPE_STRING, dims=[1])
    # Requests with different numbers of candidates are scored together.
    triton.input.add(name="item_id", data_type=pb.TYPE_STRING, dims=[-1], allow_ragged_batch=True)
    triton.output.add(name="score", data_type=pb.TYPE_FP32, dims=[-1])
    return triton


def _python_model(out: Path, module: str, max_batch_size: int) -> pb.ModelConfig:
    """A model of the library's own; its dynamic batches are what waits while the one before is worked on."""
    (out / "1/model.py").write_text(
        f'"""The model is the library\'s: this server\'s environment has it."""\n\n'
        f"from trackrec.serving.{module} import TritonPythonModel\n",
        encoding="utf-8",
    )
    config = pb.ModelConfig(name=out.name, backend="python", max_batch_size=max_batch_size)
    config.dynamic_batching.SetInParent()
    return config


def _write_config(out: Path, config: pb.ModelConfig, contract: Contract) -> None:
    config.parameters[PARAMETER].string_value = contract.model_dump_json()
    (out / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")


def read_config(model: Path) -> pb.ModelConfig:
    """A model's `config.pbtxt`."""
    text = (model / "config.pbtxt").read_text(encoding="utf-8")
    return cast(pb.ModelConfig, text_format.Parse(text, pb.ModelConfig()))


def _version(*folders: Path) -> str:
    """Of several folders: those that are there, in this order."""
    names = [version.name_of(folder) for folder in folders if folder.is_dir()]
    return "-".join(names)
