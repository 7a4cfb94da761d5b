"""`version.json` of a model repository: what is served, where it comes from, and what its models answered.

Needs neither torch nor the server.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from trackrec import storage

VERSION_FILE = "version.json"
ModelName = Literal["generator", "encoder", "ranker_base", "ranker_trackrec", "ranker"]
# Hexadecimal digits of a version's name: enough to tell versions apart, few enough to read out.
_DIGITS = 16


class Version(BaseModel):
    """One version of the served models; it exists only after the models have answered (`smoke`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Content hash of all files but this one and the manifest.
    version: str
    # The run that the models are of, and its settings.
    run: str
    config: dict[str, Any]
    # The contract of each model that is served (`trackrec.serving.contract`), and why one is not.
    models: dict[ModelName, dict[str, Any]]
    absent: dict[ModelName, str]
    # By where they were measured: the facts of the last evaluation of V, and of each ranker's training.
    metrics: dict[str, dict[str, float]]
    # Of the libraries that wrote and tried the repository.
    packages: dict[str, str]
    # What the models answered to a made-up user, before the version was published.
    smoke: dict[str, Any]


def read(repository: Path) -> Version:
    """
    Raises:
        FileNotFoundError: the folder is no model repository that the stage `export` wrote.
    """
    path = repository / VERSION_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{repository} has no {VERSION_FILE}: it is no model repository of the stage `export`; make one with "
            "`trackrec run --pipeline release --from RUN`"
        )
    return Version.model_validate_json(path.read_text(encoding="utf-8"))


def write(repository: Path, version: Version) -> None:
    text = json.dumps(version.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (repository / VERSION_FILE).write_text(text + "\n", encoding="utf-8")


def name_of(folder: Path) -> str:
    """A version's name: the content hash of what lies in `folder`, shortened."""
    return storage.content_hash(folder)[:_DIGITS]
