"""Whether a base model and an encoder are whole and fit: their small files are read, of the weights only the names."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import Tokenizer

from trackrec.llm.tokens import ANSWERS, TokenizerError, single_ids
from trackrec.planning.shapes import ModelShape
from trackrec.preflight.findings import Finding, fault, faults_or, ok, unchecked
from trackrec.preflight.folders import Folder, can_be_read, open_folder
from trackrec.storage import RemoteError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class BrokenError(ValueError):
    """A file that is missing or holds no such thing."""


def base_model(uri: str) -> Iterator[Finding]:
    """Config, tokenizer with "Yes" and "No", chat template and all weights."""
    return _looked_at("base_model", uri, _decoder)


def encoder(uri: str, width: int) -> Iterator[Finding]:
    """Config with the width that the ranking models expect, tokenizer and all weights."""
    return _looked_at("encoder", uri, lambda folder: _bert(folder, width))


def _looked_at(name: str, uri: str, check: Callable[[Folder], Iterator[Finding]]) -> Iterator[Finding]:
    if not can_be_read(uri):
        yield unchecked(f"{name} {uri}: only a path and gs:// are looked at")
        return
    try:
        folder = open_folder(uri)
    except RemoteError as error:
        yield fault(f"{name}: {error}")
        return
    yield from check(folder)
    yield from _weights(name, folder)


def _decoder(folder: Folder) -> Iterator[Finding]:
    yield from _checked("base_model", "a decoder's config", lambda: shape_of(folder))
    yield from _checked("base_model", "a tokenizer with Yes and No as one token each", lambda: _yes_no(folder))
    yield from _checked("base_model", "a chat template", lambda: _chat_template(folder))


def _bert(folder: Folder, width: int) -> Iterator[Finding]:
    yield from _checked("encoder", f"vectors of {width} numbers", lambda: _width(folder, width))
    if not {"tokenizer.json", "vocab.txt"} & folder.sizes.keys():
        yield fault(f"encoder: {folder.uri} has no tokenizer.json and no vocab.txt; upload the whole model")


def shape_of(folder: Folder) -> ModelShape:
    """
    Raises:
        BrokenError, RemoteError: there is no config.json of a decoder.
    """
    config = _json(folder, "config.json")
    try:
        return ModelShape.of_config(config)
    except ValueError as error:
        raise BrokenError(f"{folder.uri}: {error}") from error


def _yes_no(folder: Folder) -> None:
    if "tokenizer.json" not in folder.sizes:
        raise BrokenError(f"{folder.uri} has no tokenizer.json; save the tokenizer with transformers' save_pretrained")
    try:
        tokenizer = Tokenizer.from_str(folder.read("tokenizer.json").decode("utf-8"))
    except RemoteError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise BrokenError(f"{folder.uri}/tokenizer.json is no tokenizer ({error}); upload the model again") from error
    settings = _json(folder, "tokenizer_config.json") if "tokenizer_config.json" in folder.sizes else {}
    unknown = settings.get("unk_token")
    unknown = unknown.get("content") if isinstance(unknown, dict) else unknown
    found = {word: tokenizer.encode(word, add_special_tokens=False) for word in ANSWERS}
    single_ids(
        folder.uri,
        {word: own.ids for word, own in found.items()},
        {word: own.tokens for word, own in found.items()},
        tokenizer.token_to_id(unknown) if isinstance(unknown, str) else None,
    )


def _chat_template(folder: Folder) -> None:
    if "chat_template.jinja" in folder.sizes:
        return
    if "tokenizer_config.json" not in folder.sizes or not _json(folder, "tokenizer_config.json").get("chat_template"):
        raise BrokenError(f"{folder.uri} has no chat template: give an instruct model, such as Qwen2.5-7B-Instruct")


def _width(folder: Folder, width: int) -> None:
    found = _json(folder, "config.json").get("hidden_size")
    if found != width:
        raise BrokenError(
            f"{folder.uri} makes vectors of {found} numbers and `train_ctr.vector_width` is {width}; set it to {found}"
        )


def _weights(name: str, folder: Folder) -> Iterator[Finding]:
    """One file of weights, or every shard that the index names."""
    try:
        if WEIGHTS in folder.sizes:
            wanted = {WEIGHTS}
        elif INDEX in folder.sizes:
            wanted = set(_json(folder, INDEX)["weight_map"].values())
        else:
            raise BrokenError(
                f"{folder.uri} has neither {WEIGHTS} nor {INDEX}; upload the weights, as safetensors (a pickled "
                "checkpoint could run code)"
            )
    except (KeyError, AttributeError, TypeError):
        yield fault(f"{name}: {folder.uri}/{INDEX} names no files of weights; upload the model again")
    except (BrokenError, RemoteError) as error:
        yield fault(f"{name}: {error}")
    else:
        missing = sorted(file for file in wanted if not folder.sizes.get(file))
        lost = (
            f"{name}: {folder.uri} lacks {len(missing)} of {len(wanted)} files of weights, or has them empty (first: "
        )
        yield from faults_or(
            f"{name} has its weights, {sum(folder.sizes.get(file, 0) for file in wanted) / 2**30:.1f} GiB",
            [f"{lost}{missing[0]}); upload them again"] if missing else [],
        )


def _checked(name: str, what: str, check: Callable[[], object]) -> Iterator[Finding]:
    """Runs `check`, which raises what is wrong."""
    try:
        check()
    except (BrokenError, TokenizerError, RemoteError) as error:
        yield fault(f"{name}: {error}")
    else:
        yield ok(f"{name} has {what}")


def _json(folder: Folder, name: str) -> dict[str, Any]:
    if name not in folder.sizes:
        raise BrokenError(f"{folder.uri} has no {name}; upload the whole model")
    try:
        found = json.loads(folder.read(name))
    except ValueError as error:
        raise BrokenError(f"{folder.uri}/{name} is no JSON ({error}); upload the model again") from error
    if not isinstance(found, dict):
        raise BrokenError(f"{folder.uri}/{name} is no JSON object; upload the model again")
    return found
