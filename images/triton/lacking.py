"""Leaves of a lock what the image's python has not: `python3 lacking.py LOCK.txt`, in place.

NVIDIA's image has the server and vLLM with all that they were built against. Another release of any of that could break
them, so what is there stays as it is, whatever the lock says, and the rest is installed beside it.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

# The server itself, as a wheel.
_SERVER = "nvidia-pytriton"


def lacking(lock: str, there: set[str]) -> str:
    """The lines of `lock` (each package's hashes continue its line) for packages other than the server and `there`."""
    kept = []
    for entry in re.split(r"(?<!\\)\n", lock):
        name = re.match(r"([A-Za-z0-9._-]+)==", entry)
        if name is None or _normal(name[1]) not in there | {_SERVER}:
            kept.append(entry)
    return "\n".join(kept)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    path = Path(sys.argv[1])
    # What is left of a package that was taken away badly has no name.
    found = {_normal(name) for each in distributions() if (name := each.metadata["Name"])}
    path.write_text(lacking(path.read_text(encoding="utf-8"), found), encoding="utf-8")
