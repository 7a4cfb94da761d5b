"""A cluster's profile: what the pods of each stage ask for there (`pipelines/configs/profiles`).

A config says what a run computes, a profile says where: the same config runs under any that has the GPUs it needs.
`trackrec.config_file.load` lays a profile over a config.
"""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from trackrec.config import Settings
from trackrec.run_config import Resources, StageResources

FOLDER = Path(__file__).parents[1] / "pipelines/configs/profiles"


class Profile(Settings):
    """Resources of every stage's pod, by class of stage."""

    # Every stage's; what a class names replaces them, key by key.
    defaults: Resources = Resources()
    classes: dict[str, Resources] = Field(default_factory=dict)
    # Stage to class; a stage left out has the defaults.
    stages: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for stage, name in self.stages.items():
            if stage not in StageResources.model_fields:
                raise ValueError(f"`stages` names {stage}; the stages are: {', '.join(StageResources.model_fields)}")
            if name not in self.classes:
                raise ValueError(f"`stages.{stage}` names the class {name}, which `classes` lacks")
        if unused := sorted(set(self.classes) - set(self.stages.values())):
            raise ValueError(f"`classes` has {', '.join(unused)}, which `stages` gives to none")
        return self

    def of(self, stage: str) -> dict[str, Any]:
        """What the profile says of a stage's pod: the keys of `Resources` that it names."""
        given = _named(self.defaults)
        return given | _named(self.classes[self.stages[stage]]) if stage in self.stages else given


def names() -> list[str]:
    """The profiles that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a profile given by its name, or by its path."""
    path = FOLDER / f"{name}.yaml"
    return path if name in names() else Path(name)


def _named(resources: Resources) -> dict[str, Any]:
    return resources.model_dump(mode="json", exclude_unset=True)
