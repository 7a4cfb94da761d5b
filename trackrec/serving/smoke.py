"""The inference that a served version must pass before anything counts on it: short, through the models' own doors.

The stage `export` asks it of the server it started itself, a pod's probes of its own server
(`python3 -m trackrec.serving.smoke HOST:PORT --repository DIR`), and the stage `deploy` of every new pod, from outside.
"""

import argparse
import json
import math
import queue
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from google.protobuf import text_format
from pyarrow import parquet
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from trackrec.prompts.render import ShownItem, cot_prompt
from trackrec.serving.contract import (
    CHANNEL,
    Contract,
    ContractError,
    EncoderContract,
    ExperimentContract,
    GeneratorContract,
    RankerContract,
)

RANKERS = ("ranker_base", "ranker_trackrec")
# Outputs of the generator, each for an input `return_…`.
_RETURNED = ("finish_reason", "num_input_tokens", "num_output_tokens")
# Enough for a word or two; a RecCoT's whole length says nothing more.
_TOKENS = 8
_SECONDS = 120.0
# Whom no log knows. More than enough of them for one in the smallest bucket there is.
_USER, _USERS = "trackrec-smoke", 200_000
_HISTORY: tuple[ShownItem, ...] = (
    {"title": "The Silver River", "rating": 5.0, "label": 1},
    {"title": "Night Train", "rating": 1.0, "label": 0},
)
_CONTRACTS: dict[str, type[Contract]] = {
    "generator": GeneratorContract,
    "encoder": EncoderContract,
    **dict.fromkeys(RANKERS, RankerContract),
    "ranker": ExperimentContract,
}


class SmokeError(RuntimeError):
    """The server does not serve the version that it should, or serves it badly; one line says what it answered."""


class SlowError(SmokeError):
    """The server lives, and has not answered in time: too many others wait."""


@dataclass(frozen=True)
class Expected:
    """What a repository's server must serve.

    Args:
        versions: `model_version` by model.
        items: candidates for the rankers.
    """

    versions: Mapping[str, str]
    items: tuple[str, ...] = ()


def expected(repository: Path) -> Expected:
    """What a repository on this machine says of its models itself: each one's contract, a few items of its catalogue.

    Raises:
        ContractError, ValueError: it is not of the stage `export`.
    """
    versions: dict[str, str] = {}
    items: list[str] = []
    for path in sorted(repository.glob("*/config.pbtxt")):
        config = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
        name = path.parent.name
        versions[name] = _class_of(name).of(config).model_version
        if name in RANKERS and not items:
            with parquet.ParquetFile(path.parent / "1/items.parquet") as table:
                first = next(table.iter_batches(batch_size=3, columns=["item_id"]), None)
            items = first.column(0).to_pylist() if first else []
    if not versions:
        raise ValueError(f"{repository} holds no model; name a repository that the stage `export` wrote")
    return Expected(versions, tuple(items))


def check(address: str, served: Expected, *, seconds: float = _SECONDS, within: float = math.inf) -> dict[str, Any]:
    """Asks every model of the server for its contract and for one answer.

    Args:
        address: HOST:PORT of its gRPC endpoint.
        seconds: each answer may take.
        within: seconds for all answers together.

    Returns:
        By model: its `model_version`, the seconds it took, and what it answered: the generator's `text`,
        `finish_reason`, `prompt_tokens` and `output_tokens`; the encoder's `width` and `num_tokens`; a ranker's
        `scores`, and those of each bucket where there is an experiment.

    Raises:
        SmokeError: it does not answer, serves another version, or answers what cannot be right.
        SlowError: it has not answered in time.
    """
    found: dict[str, Any] = {}
    ends = time.monotonic() + within

    def left() -> float:
        rest = ends - time.monotonic()
        if rest <= 0:
            raise SlowError(f"the models at {address} did not all answer within {within:g} s")
        return min(seconds, rest)

    with triton.InferenceServerClient(address, channel_args=CHANNEL) as client:
        for name, version in served.versions.items():
            try:
                contract = _class_of(name).of(client.get_model_config(name, client_timeout=left()))
                if contract.model_version != version:
                    raise SmokeError(f"{name} at {address} is of version {contract.model_version}, not {version}")
                began = time.monotonic()
                if isinstance(contract, GeneratorContract):
                    answer = _generated(client, contract, left())
                elif isinstance(contract, EncoderContract):
                    answer = _encoded(client, contract, left())
                elif isinstance(contract, ExperimentContract):
                    answer = _split(client, name, contract, served.items, left)
                else:
                    answer = {"scores": _ranked(client, name, _USER, served.items, left())[0]}
            except (InferenceServerException, ContractError) as error:
                # Over a stream the client's own deadline comes as the server's words.
                slow = isinstance(error, InferenceServerException) and "deadline exceeded" in str(error).lower()
                raise (SlowError if slow else SmokeError)(f"{name} at {address}: {_line(error)}") from None
            taken = round(time.monotonic() - began, 3)
            found[name] = {"model_version": version, "seconds": taken, **answer}
    return found


def _generated(client: triton.InferenceServerClient, contract: GeneratorContract, seconds: float) -> dict[str, Any]:
    """A few tokens of the canned history's RecCoT, greedily."""
    # The history is this module's own: nothing in it is a special token's string.
    prompt = f"{contract.opening}{cot_prompt(contract.domain, _HISTORY)}{contract.closing}"
    limit = min(_TOKENS, contract.max_tokens)
    parameters: dict[str, Any] = {
        "temperature": 0,
        "max_tokens": limit,
        "repetition_penalty": contract.repetition_penalty,
    }
    if contract.lora_name is not None:
        parameters["lora_name"] = contract.lora_name
    flags = ("exclude_input_in_output", *(f"return_{name}" for name in _RETURNED))
    inputs = [
        _input("text_input", "BYTES", [prompt.encode()]),
        _input("stream", "BOOL", [False]),
        _input("sampling_parameters", "BYTES", [json.dumps(parameters).encode()]),
        *(_input(flag, "BOOL", [True]) for flag in flags),
    ]
    answers: queue.Queue[tuple[Any, InferenceServerException | None]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=seconds)
    texts: list[str] = []
    outputs: dict[str, Any] = {}
    try:
        client.async_stream_infer("generator", inputs, enable_empty_final_response=True)
        while True:
            try:
                result, error = answers.get(timeout=seconds)
            except queue.Empty:
                raise SlowError(f"the generator did not answer within {seconds:g} s") from None
            if error is not None:
                raise error
            if (part := result.as_numpy("text_output")) is not None and part.size:
                texts.append(part.flat[0].decode())
                outputs = {name: result.as_numpy(name) for name in _RETURNED}
            if result.get_response().parameters["triton_final_response"].bool_param:
                break
    finally:
        client.stop_stream(cancel_requests=True)
    text = "".join(texts)
    lacking = [name for name, value in outputs.items() if value is None or not value.size]
    if lacking or not outputs:
        raise SmokeError(f"the generator's answer lacks {', '.join(lacking or ['text_output'])}")
    reason, prompt_tokens, tokens = (outputs[name].flat[0] for name in _RETURNED)
    reason = reason.decode()
    if reason not in ("stop", "length") or not 1 <= tokens <= limit or prompt_tokens < 1 or not text.strip():
        raise SmokeError(
            f"the generator wrote {text[:80]!r} ({tokens} of at most {limit} tokens for {prompt_tokens}, {reason!r})"
        )
    return {
        "text": text,
        "finish_reason": reason,
        "prompt_tokens": int(prompt_tokens),
        "output_tokens": int(tokens),
    }


def _encoded(client: triton.InferenceServerClient, contract: EncoderContract, seconds: float) -> dict[str, Any]:
    text = "The user likes quiet films."
    result = client.infer("encoder", [_input("text", "BYTES", [[text.encode()]])], client_timeout=seconds)
    vector, tokens = result.as_numpy("embedding"), result.as_numpy("num_tokens")
    if vector is None or vector.shape != (1, contract.width):
        raise SmokeError(f"the encoder's vector has shape {getattr(vector, 'shape', None)}, not (1, {contract.width})")
    if not np.isfinite(vector).all() or not vector.any():
        raise SmokeError("the encoder's vector is zero or not finite")
    if tokens is None or tokens.size != 1 or not 1 <= tokens.flat[0] <= contract.limit:
        raise SmokeError(f"the encoder read {tokens} tokens of at most {contract.limit}")
    return {"width": int(vector.shape[1]), "num_tokens": int(tokens.flat[0])}


def _ranked(
    client: triton.InferenceServerClient, name: str, user: str, items: tuple[str, ...], seconds: float
) -> tuple[list[float], triton.InferResult]:
    """A user's scores, and all that came with them."""
    inputs = [
        _input("user_id", "BYTES", [[user.encode()]]),
        _input("item_id", "BYTES", [[item.encode() for item in items]]),
    ]
    result = client.infer(name, inputs, client_timeout=seconds)
    scores = result.as_numpy("score")
    if scores is None or scores.shape != (1, len(items)):
        raise SmokeError(f"{name} scored {len(items)} items with shape {getattr(scores, 'shape', None)}")
    values = [float(score) for score in scores.flat]
    if not all(math.isfinite(value) and 0 < value < 1 for value in values):
        raise SmokeError(f"{name}'s scores are no probabilities: {values}")
    return values, result


def _split(
    client: triton.InferenceServerClient,
    name: str,
    contract: ExperimentContract,
    items: tuple[str, ...],
    left: Callable[[], float],
) -> dict[str, Any]:
    """One user of each bucket."""
    found = {}
    for bucket in contract.experiment.shares:
        user = next(u for k in range(_USERS) if contract.experiment.bucket(u := f"{_USER}-{k}") == bucket)
        found[bucket], result = _ranked(client, name, user, items, left())
        arm = result.as_numpy("arm")
        if arm is None or arm.tolist() != [[bucket.encode()]]:
            raise SmokeError(f"{name} puts user {user} into {arm}, who is in bucket {bucket!r}")
    return {"scores": found}


def _lives(address: str, seconds: float) -> bool:
    try:
        with triton.InferenceServerClient(address, channel_args=CHANNEL) as client:
            return bool(client.is_server_live(client_timeout=seconds))
    except InferenceServerException:
        return False


def _input(name: str, kind: str, value: list[Any]) -> triton.InferInput:
    array = np.array(value, dtype=object if kind == "BYTES" else bool)
    given = triton.InferInput(name, list(array.shape), kind)
    given.set_data_from_numpy(array)
    return given


def _class_of(name: str) -> type[Contract]:
    if name not in _CONTRACTS:
        raise ContractError(f"{name} is no model of TrackRec's repositories: {', '.join(_CONTRACTS)}")
    return _CONTRACTS[name]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", metavar="HOST:PORT", help="the server's gRPC endpoint")
    parser.add_argument("--repository", type=Path, required=True, help="what it must serve")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="that each answer may take")
    parser.add_argument(
        "--alive",
        action="store_true",
        help="pass also a server whose models do not answer in time, if it says that it lives",
    )
    given = parser.parse_args()
    found: dict[str, Any] = {}
    try:
        served = expected(given.repository)
        for name, version in served.versions.items():
            try:
                found |= check(given.address, Expected({name: version}, served.items), seconds=given.seconds)
            except SlowError as error:
                # One after the other: a slow model hides no dead one.
                if not (given.alive and _lives(given.address, given.seconds)):
                    raise
                found[name] = {"slow": _line(error)}
    except (SmokeError, ValueError, OSError) as error:
        print(f"error: {_line(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    print(json.dumps(found))


if __name__ == "__main__":
    main()
