"""Seeds derived from names, so that a result never depends on how the work was cut into shards or batches."""

import hashlib


def derive(*parts: str | int) -> int:
    """A 63-bit seed from `parts`, e.g. `derive(run_seed, iteration, context_id, sample)`; equal parts, equal seed."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
