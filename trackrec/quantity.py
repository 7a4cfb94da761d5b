"""Kubernetes quantities as numbers."""

import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}i": 2 ** (10 * power) for power, unit in enumerate("KMGT", start=1)}


def to_bytes(quantity: str) -> int:
    """Bytes of a quantity of memory: `to_bytes("8Gi") == 8 * 2**30`.

    Raises:
        ValueError: not a quantity of memory.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]i?|)", quantity)
    if not match:
        raise ValueError(f"{quantity!r} is not a quantity of memory; write e.g. 8Gi")
    return int(float(match.group(1)) * _UNITS[match.group(2)])


def cores(quantity: str) -> float:
    """Of a quantity of cores: `cores("500m") == 0.5`."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
