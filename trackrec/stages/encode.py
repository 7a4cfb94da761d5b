"""RecCoTs to vectors: e^p = Agg(Encoder(G(u_i))) (paper eq. 7)."""

import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from trackrec import storage
from trackrec.config import EncodeSettings
from trackrec.data import schema
from trackrec.llm.encoder import TextEncoder
from trackrec.progress import track
from trackrec.prompts.render import shown_history
from trackrec.shards import WHOLE, Shard


class _Encode(BaseModel):
    """What the stage's manifest names as its settings."""

    encode: EncodeSettings
    of_history: bool


def run(
    settings: EncodeSettings,
    *,
    recots: Path,
    contexts: Path,
    encoder: Path,
    vectors: Path,
    of_history: bool = False,
    shard: Shard = WHOLE,
) -> None:
    """Writes table `vectors`: one row a context, the mean over its RecCoTs' vectors where it has several.

    Args:
        of_history: the control: what is encoded is not the RecCoT but the history that it was written from, as the
            prompt shows it.
        shard: which of the contexts; the facts name it.

    Facts: `texts`, `contexts`, `width`, `tokens`, `cut` (texts longer than the encoder reads), `texts_per_second`; of
    equal texts one is read.

    Raises:
        ValueError: there is no RecCoT, or a RecCoT's context is missing.
    """
    inputs = {"recots": recots, "contexts": contexts, "encoder": encoder}
    what = _Encode(encode=settings, of_history=of_history)
    with storage.publish("encode", what, inputs=inputs, outputs={"vectors": vectors}, seed=str(shard)) as job:
        known = schema.read(recots, "recots", ["context_id"])["context_id"].unique().to_pylist()
        if not known:
            raise ValueError(f"{recots} has no RecCoT to encode")
        rows = schema.rows(recots, "recots", ["context_id", "text"], shard.own(known))
        names = [row["context_id"] for row in rows]
        shown = _histories(contexts, names) if of_history else [row["text"] for row in rows]
        if rows:
            table, job.facts = _encoded(settings, encoder, names, shown)
        else:
            table = schema.TABLES["vectors"].empty_table()
            job.facts = dict.fromkeys(("texts", "contexts", "width", "tokens", "cut", "texts_per_second"), 0)
        schema.write(job.outputs["vectors"], "vectors", table)
        job.facts |= shard.facts()


def _encoded(
    settings: EncodeSettings, encoder: Path, names: list[str], shown: list[str]
) -> tuple[pa.Table, dict[str, float]]:
    """The table `vectors` of the texts `shown`, each of the context at its place in `names`; and the facts."""
    # Equal texts have one vector.
    places: dict[str, list[int]] = defaultdict(list)
    for place, text in enumerate(shown):
        places[text].append(place)
    texts = list(places)

    started = time.monotonic()
    model = TextEncoder(encoder, pooling=settings.pooling, dtype=settings.dtype, batch_tokens=settings.batch_tokens)
    token_ids = model.token_ids(texts)
    encoded = np.empty((len(shown), model.width), dtype=np.float32)
    for number, vector in track(model.encode(token_ids), "Encode", total=len(texts), unit="text"):
        encoded[places[texts[number]]] = vector
    seconds = time.monotonic() - started

    context_ids, owner = np.unique(names, return_inverse=True)
    sums = np.zeros((len(context_ids), model.width))
    np.add.at(sums, owner, encoded)
    means = (sums / np.bincount(owner)[:, None]).astype(np.float32)
    # Arrow refuses offsets beyond 32 bits when the table is written; numpy would wrap them around.
    offsets = np.arange(0, means.size + 1, model.width, dtype=np.int64)
    column = pa.LargeListArray.from_arrays(offsets, pa.array(means.ravel()))
    return pa.table({"context_id": pa.array(context_ids.tolist(), pa.string()), "vector": column}), {
        "texts": len(shown),
        "contexts": len(context_ids),
        "width": model.width,
        "tokens": sum(map(len, token_ids)),
        "cut": sum(len(ids) > model.limit for ids in token_ids),
        "texts_per_second": round(len(texts) / seconds, 1),
    }


def _histories(contexts: Path, names: list[str]) -> list[str]:
    """The history of each named context as text."""
    shown = schema.rows(contexts, "contexts", ["context_id", "domain", "history"], set(names))
    rows = {row["context_id"]: row for row in shown}
    missing = sorted(set(names) - rows.keys())
    if missing:
        raise ValueError(
            f"{contexts} lacks {len(missing)} of the contexts that have a RecCoT (first: {missing[0]}); give the "
            "contexts that the RecCoTs were written from"
        )
    return [shown_history(rows[name]["domain"], rows[name]["history"]) for name in names]
