"""Writes each stage's component.yaml and README.md from its component: `python -m components.build [--check]`."""

import sys
import tempfile
from pathlib import Path

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
        lines.append(f"| `{name}` | {_type(field.type)} | {default} | {meaning[name]} |")
    lines += ["", "## Outputs", "", "| name | type | what it is |", "| --- | --- | --- |"]
    for name, output in (page.outputs or {}).items():
        lines.append(f"| `{name}` | {_type(output.type)} | {meaning[name]} |")
    section = RunConfig.model_fields.get(stage)
    if section is not None:
        lines += ["", f"## Settings (`{stage}:` in a config)", "", "| key | type | default |", "| --- | --- | --- |"]
        lines += _settings(_section_class(section.annotation))
    return "\n".join(lines) + "\n"


def _settings(section: type[Settings]) -> list[str]:
    rows = []
    for name, schema in section.model_json_schema()["properties"].items():
        required = name in section.model_json_schema().get("required", [])
        kind = schema.get("type") or " or ".join(
            part.get("type") or part["$ref"].rsplit("/", 1)[-1]
            for part in schema.get("anyOf", schema.get("oneOf", [schema]))
        )
        allowed = f": {', '.join(f'`{value}`' for value in schema['enum'])}" if "enum" in schema else ""
        default = "required" if required else f"`{_short(schema.get('default'))}`"
        rows.append(f"| `{name}` | {kind}{allowed} | {default} |")
    return rows


def _section_class(annotation: object) -> type[Settings]:
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next(cls for cls in options if isinstance(cls, type) and issubclass(cls, Settings))


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
