"""The parts that a sharded stage's pods wrote, joined into the table that one pod would have written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from trackrec import storage
from trackrec.data import schema
from trackrec.storage import Manifest

# Of a part's facts, what a mean is over, and what all parts have alike (but for one without contexts, which has zero).
# All others are counts, or speeds of pods that work side by side, and add up.
_MEANS = {"mean_tokens": "recots", "finished": "recots", "mean_reward": "rows", "seconds_per_recot": "decoded"}
_ALIKE = {"width"}


class _Gathered(BaseModel):
    """What the stage's manifest names as its settings."""

    table: Literal["recots", "rewards", "vectors", "feature_shards"]
    # Those that the parts were written under.
    parts: dict[str, Any]


def run(*, table: str, parts: Sequence[Path], joined: Path) -> None:
    """Writes `table`: the parts' rows by context, byte for byte what the stage writes that is not cut into shards.

    Args:
        parts: the outputs of all shards of one stage, in any order.

    Facts: the parts', added up; of a mean, the mean over all rows.

    Raises:
        ValueError: the parts are not all shards of one stage's work.
    """
    ordered = _in_order([(path, storage.read_manifest(path)) for path in parts])
    settings = _Gathered.model_validate({"table": table, "parts": ordered[0][1].settings})
    inputs = {f"part {number}": path for number, path in enumerate(parts)}
    with storage.publish("gather", settings, inputs=inputs, outputs={"joined": joined}) as job:
        schema.join([path for path, _ in ordered], job.outputs["joined"], table)
        job.facts |= _added([manifest.facts for _, manifest in ordered])


def _in_order(parts: list[tuple[Path, Manifest]]) -> list[tuple[Path, Manifest]]:
    found = sorted(parts, key=lambda part: part[1].facts.get("shard", 0))
    shards = [(manifest.facts.get("shard"), manifest.facts.get("shards")) for _, manifest in found]
    if not shards or shards != [(number, len(shards)) for number in range(len(shards))]:
        given = ", ".join("a whole table" if of is None else f"shard {number} of {of}" for number, of in shards)
        raise ValueError(f"gather takes all the shards of one table, each once; it got {given or 'nothing'}")
    first = found[0][1]
    for path, manifest in found:
        if (manifest.stage, manifest.settings, manifest.inputs) != (first.stage, first.settings, first.inputs):
            raise ValueError(f"{path} and {found[0][0]} have other settings or inputs: they are no parts of one table")
    return found


def _added(parts: list[dict[str, Any]]) -> dict[str, float]:
    whole: dict[str, float] = {}
    for name in parts[0].keys() - {"shard", "shards"}:
        values = [part[name] for part in parts]
        if name in _ALIKE:
            whole[name] = max(values)
        elif name in _MEANS:
            weights = [part[_MEANS[name]] for part in parts]
            whole[name] = sum(v * w for v, w in zip(values, weights, strict=True)) / max(sum(weights), 1)
        else:
            whole[name] = round(sum(values), 1)
    return whole
