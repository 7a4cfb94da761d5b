"""Writes each stage's component.yaml and README.md from its component: `python -m components.build [--check]`."""

import sys
import tempfile
from pathlib import Path
from typing import get_args

import docstring_parser
from kfp import compiler
from kfp.dsl.python_component import PythonComponent

from components import images, stages
from trackrec.config import Settings
from trackrec.run_config import RunConfig

FOLDER = Path(__file__).parent


def spec(component: PythonComponent) -> str:
    """The compiled component.yaml."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "component.yaml"
        compiler.Compiler().compile(component, str(path))
        return path.read_text(encoding="utf-8")


def readme(stage: str, component: PythonComponent) -> str:
    """The component's page: what it does, its inputs and outputs, its settings."""
    page = component.component_spec
    docstring = docstring_parser.parse(component.python_func.__doc__)
    meaning = {parameter.arg_name: " ".join((parameter.description or "").split()) for parameter in docstring.params}
    lines = [f"# {stage}", "", docstring.description or "", "", f"Image: `{images.IMAGE_OF[stage]}`"]
    lines += ["", "## Inputs", "", "| name | type | default | what it is |", "| --- | --- | --- | --- |"]
    for name, field in page.inputs.items():
        default = f"`{field.default!r}`" if field.optional else ""
        kind = f"list of {_type(field.type)}" if field.is_artifact_list else _type(field.type)
        lines.append(f"| `{name}` | {kind} | {default} | {meaning[name]} |")
    lines += ["", "## Outputs", "", "| name | type | what it is |", "| --- | --- | --- |"]
    for name, output in (page.outputs or {}).items():
        lines.append(f"| `{name}` | {_type(output.type)} | {meaning[name]} |")
    for name in (stage, *(["data"] if "data" in page.inputs else [])):
        section = RunConfig.model_fields.get(name)
        if section is not None:
            lines += ["", f"## Settings (`{name}:` in a config)", "", "| key | type | default |", "| --- | --- | --- |"]
            [own] = _section_classes(section.annotation)
            lines += _settings(own)
    return "\n".join(lines) + "\n"


def _settings(section: type[Settings], prefix: str = "") -> list[str]:
    """A row a setting; those of a nested section follow it, under its name."""
    schema = section.model_json_schema()
    rows = []
    for name, part in schema["properties"].items():
        nested = _section_classes(section.model_fields[name].annotation)
        kind = part.get("type") or " or ".join(
            option.get("type") or option["$ref"].rsplit("/", 1)[-1]
            for option in part.get("anyOf", part.get("oneOf", [part]))
        )
        allowed = f": {', '.join(f'`{value}`' for value in part['enum'])}" if "enum" in part else ""
        default = "required" if name in schema.get("required", []) else f"`{_short(part.get('default'))}`"
        rows.append(f"| `{prefix}{name}` | {kind}{allowed} | {default} |")
        for inner in nested:
            of = f" ({inner.__name__})" if len(nested) > 1 else ""
            rows += [row.replace("` |", f"`{of} |", 1) for row in _settings(inner, f"{prefix}{name}.")]
    return rows


def _section_classes(annotation: object) -> list[type[Settings]]:
    """The sections in an annotation such as `X | None` or a union told apart by its `kind`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _section_classes(inner)]


def _short(value: object) -> str:
    return "its own defaults" if isinstance(value, dict) else str(value)


def _type(name: str) -> str:
    return name.split("@")[0].removeprefix("system.")


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for stage in stages.STAGES:
        component = stages.load(stage)
        for name, text in (("component.yaml", spec(component)), ("README.md", readme(stage, component))):
            path = FOLDER / stage / name
            if path.is_file() and path.read_text(encoding="utf-8") == text:
                continue
            stale.append(f"components/{stage}/{name}")
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"stale: {', '.join(stale)}; run `make compile`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
