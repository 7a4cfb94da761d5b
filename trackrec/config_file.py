"""Reads a run's YAML into `trackrec.run_config.RunConfig`, and says what is wrong with it in the file's own terms."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from trackrec import profile as profiles
from trackrec.profile import Profile
from trackrec.run_config import RunConfig, StageResources


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names every offending key and what it allows."""


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, and reads 1e-5 as the number it is in YAML 1.2."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Not where mappings are constructed: there, merged keys (`<<`) already stand among a mapping's own.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (found := (key.tag, key.value)) in lines:
                problem = f"the key {key.value!r} is given twice, first on line {lines[found]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[found] = key.start_mark.line + 1
        return node


# PyYAML asks for a dot: without this, 1e-5 is a string to it.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), [*"-+.0123456789"]
)


def load(path: Path, overrides: dict[str, Any] | None = None, *, profile: str | None = None) -> RunConfig:
    """Reads and checks a run's YAML.

    Args:
        overrides: dotted keys ("sample.n") to values that replace the file's and the profile's.
        profile: the name of one in `pipelines/configs/profiles`, or a path; what it says of the stages' pods replaces
            the file's `resources`, key by key.

    Raises:
        ConfigError: a file cannot be read, is no YAML mapping, or breaks a rule; says which key and what is allowed.
    """
    data = _mapping(path)
    if profile is not None:
        _lay_over(data, _profile(profile))
    for key, value in (overrides or {}).items():
        _set(data, key, value)
    try:
        return RunConfig.model_validate(data, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n{explain(error, RunConfig)}") from error


def _mapping(path: Path) -> dict[str, Any]:
    try:
        data = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    return data


def _profile(name: str) -> Profile:
    path = profiles.find(name)
    if not path.is_file():
        raise ConfigError(
            f"--profile {name}: no such file and no such profile; there are: {', '.join(profiles.names())}"
        )
    try:
        return Profile.model_validate(_mapping(path), strict=True)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n{explain(error, Profile)}") from error


def _lay_over(data: dict[str, Any], profile: Profile) -> None:
    for stage in StageResources.model_fields:
        for key, value in profile.of(stage).items():
            _set(data, f"resources.{stage}.{key}", value)


def parse_override(text: str) -> tuple[str, Any]:
    """`"sample.n=4"` to `("sample.n", 4)`; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r}: write KEY=VALUE, e.g. --set sample.n=4")
    try:
        return key, parse(value)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--set {text!r}: the value is not YAML: {error}") from error


def parse(text: str) -> Any:
    """The YAML in `text`.

    Raises:
        YAMLError: it is none, or gives a key twice.
        ValueError: it holds an impossible date.
    """
    return yaml.load(text, Loader=_Loader)


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for depth, parent in enumerate(parents):
        child = data.get(parent) or {}
        if not isinstance(child, dict):
            raise ConfigError(f"{dotted}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        # A copy: sections that share a YAML anchor are one object, and only the named one is to change.
        data[parent] = dict(child)
        data = data[parent]
    data[last] = value


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line a fault: the key's path, what is wrong, and for an unknown key the keys that exist there."""
    lines = []
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"]) or "(whole file)"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            keys = _keys_at(root, fault["loc"][:-1])
            message = "unknown key" + (f"; allowed here: {', '.join(keys)}" if keys else "")
        elif fault["type"] not in ("value_error", "missing"):
            message += f" (got {fault['input']!r})"
        lines.append(f"  {path}: {message}")
    return "\n".join(lines)


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the settings class found by following `location` from `model`; empty where that is no class."""
    current: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = _settings_in(current.model_fields[part].annotation)
        elif isinstance(current, dict):  # a union told apart by its `kind`
            current = current.get(part)
    return sorted(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _settings_in(annotation: Any) -> Any:
    """The settings class inside an annotation such as `X | None`; a dict by `kind` where there are several."""
    found: list[type[BaseModel]] = []

    def walk(node: Any) -> None:
        if isinstance(node, type) and issubclass(node, BaseModel):
            found.append(node)
        for inner in getattr(node, "__args__", ()):
            walk(inner)

    walk(annotation)
    if len(found) == 1:
        return found[0]
    return {cls.model_fields["kind"].default: cls for cls in found}
