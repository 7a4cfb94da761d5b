"""The feature table: its columns, its files' names and its manifest, once for who writes and who reads it."""

import datetime
import re
from typing import Any, Literal, get_args

import pyarrow as pa
from pydantic import BaseModel

Status = Literal["ok", "empty_history", "too_long", "bad_text", "failed"]
STATUSES: tuple[Status, ...] = get_args(Status)
EmbeddingDtype = Literal["float16", "float32"]

MANIFEST = "_manifest.json"
# Last to be written, and what a reader looks for: it holds the SHA-256 of `MANIFEST`.
SUCCESS = "_SUCCESS"
# The key of a file's own facts (`ShardFacts`) in its footer.
FOOTER = b"trackrec"

_DATE = re.compile(r"dt=(\d{4}-\d{2}-\d{2})", re.ASCII)
# What a ranker reads; the titles stay in the users' table.
HISTORY = pa.list_(pa.struct([("item_id", pa.string()), ("rating", pa.float32()), ("label", pa.int8())]))


def schema(width: int, dtype: EmbeddingDtype) -> pa.Schema:
    """The columns. Of a row whose status is not "ok", `recot` and `embedding` are null; its history is kept.

    Args:
        width: of the encoder's vectors.
    """
    value = pa.float16() if dtype == "float16" else pa.float32()
    return pa.schema(
        [
            ("user_id", pa.string()),
            # The moment before which the history ends; seconds since 1970, UTC.
            ("as_of", pa.int64()),
            ("status", pa.string()),
            ("recot", pa.string()),
            ("embedding", pa.list_(value, width)),
            # Content hashes of G and of the encoder.
            ("generator_version", pa.string()),
            ("encoder_version", pa.string()),
            # SHA-256 of the text sent and of what decides how it is continued; null where no prompt could be made.
            ("prompt_hash", pa.string()),
            ("prompt_tokens", pa.int32()),
            ("recot_tokens", pa.int32()),
            # "stop" or "length".
            ("finish_reason", pa.string()),
            # From the request to the answer; null where no request was made.
            ("seconds", pa.float32()),
            # Whether the row's RecCoT and vector are an earlier date's.
            ("copied", pa.bool_()),
            # Oldest first.
            ("history", HISTORY),
        ]
    )


class Identity(BaseModel):
    """What a shard's rows follow from: files of one date have the same, or they are not committed together."""

    dt: str
    # Content hash of the users' table, and its rows.
    users: str
    num_users: int
    shard_users: int
    generator_version: str
    encoder_version: str
    width: int
    embedding_dtype: EmbeddingDtype
    # SHA-256 of the generator's contract: chat template, limits, sampling.
    generation: str


class ShardFacts(BaseModel):
    """What a shard's file says of itself in its footer."""

    identity: Identity
    shard: int
    # Requests that the generator answered: users with equal prompts share one.
    generated: int
    # Rows "failed": as long as the date is not committed, the next try asks for them again.
    failed: int
    # When the generator worked for it, seconds since 1970, one span for each try.
    spans: list[tuple[float, float]]
    # When the file was written, seconds since 1970.
    written: float


class ShardEntry(BaseModel):
    """A shard in the manifest; `path` is relative to the date's folder."""

    path: str
    rows: int
    bytes: int
    # Smallest and largest.
    first_user: str
    last_user: str


class Quantiles(BaseModel):
    p50: float
    p95: float
    p99: float
    mean: float


class Manifest(BaseModel):
    """`_manifest.json`. A reader needs `identity` and `shards`; the rest is for people."""

    identity: Identity
    committed: str
    rows: int
    # Rows by status; all statuses are there.
    status: dict[str, int]
    copied: int
    generated: int
    # Of rows "ok" (`prompt_tokens`, `recot_tokens`), and of generated ones (`seconds`); null where there are none.
    prompt_tokens: Quantiles | None
    recot_tokens: Quantiles | None
    seconds: Quantiles | None
    # How long the generator worked for this date: the union of the shards' spans.
    generator_seconds: float
    usd_per_hour: float | None
    # Of all rows, copied ones too; null without `usd_per_hour`.
    usd_per_1000_users: float | None
    settings: dict[str, Any]
    shards: list[ShardEntry]


def date_folder(dt: str) -> str:
    """
    Raises:
        ValueError: `dt` is no date YYYY-MM-DD.
    """
    # Python reads other ways of ISO 8601, too; `date_of` would not find such a folder.
    if date_of(f"dt={dt}") is None:
        raise ValueError(f"{dt!r} is no date; give YYYY-MM-DD")
    datetime.date.fromisoformat(dt)
    return f"dt={dt}"


def date_of(folder: str) -> str | None:
    """The date of a folder that `date_folder` names; None of any other, such as `dt=2026-02-30`."""
    found = _DATE.fullmatch(folder)
    try:
        return found and str(datetime.date.fromisoformat(found[1]))
    except ValueError:
        return None


def shard_path(shard: int) -> str:
    """A shard's file, relative to its date's folder."""
    return f"shard={shard:05}/part.parquet"
