"""One place names every stage's image, and its tag follows the sources that can affect the stage."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components import build, images, stages
from trackrec.run_config import RunConfig, StageResources

ROOT = Path(__file__).parents[2]


def names(stage: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in images.sources(stage)}


def test_every_stage_has_one_folder_one_image_and_one_section() -> None:
    folders = {path.parent.name for path in (ROOT / "components").glob("*/component.py")}
    assert folders == set(stages.STAGES) == set(StageResources.model_fields)
    # What these do follows from other sections.
    without = {"preflight", "gather", "tabulate", "tabulate_ctr", "compare", "commit_features"}
    assert set(stages.STAGES) - without <= set(RunConfig.model_fields)
    for image in set(images.IMAGE_OF.values()):
        assert (ROOT / "images" / image / "Dockerfile").is_file(), image


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_component_names_the_image_of_its_stage(stage: str) -> None:
    text = (ROOT / "components" / stage / "component.yaml").read_text()
    assert re.findall(r"^ *image: (.*)$", text, re.M) == [images.released(stage)]
    assert "pip install" not in text


@pytest.mark.parametrize("stage", stages.STAGES)
def test_specs_and_pages_are_current(stage: str) -> None:
    component = stages.load(stage)
    folder = ROOT / "components" / stage
    assert (folder / "component.yaml").read_text() == build.spec(component), "run `make compile`"
    assert (folder / "README.md").read_text() == build.readme(stage, component), "run `make compile`"


def test_the_readmes_table_of_images() -> None:
    rows = re.findall(r"^\| \[(\w+)\]\(components/\w+/README\.md\) \| (\w+) \|", (ROOT / "README.md").read_text(), re.M)
    assert dict(rows) == images.IMAGE_OF


def test_sources_are_what_the_stage_imports() -> None:
    assert {"trackrec/stages/ingest.py", "trackrec/config.py", "trackrec/data/schema.py"} <= names("ingest")
    assert not any(name.startswith(("trackrec/llm", "trackrec/align")) for name in names("ingest"))
    assert {"trackrec/align/sdpo.py", "trackrec/llm/packing.py"} <= names("sdpo")
    assert "trackrec/align/sdpo.py" not in names("sample")
    # Data files count with the package that reads them.
    assert any(name.startswith("trackrec/prompts/templates/") for name in names("sample"))
    assert "images/train/Dockerfile" in names("sdpo") and "images/data/Dockerfile" in names("ingest")


@pytest.mark.parametrize("stage", [stage for stage, image in images.IMAGE_OF.items() if image == "data"])
def test_the_data_image_needs_no_torch(stage: str) -> None:
    code = f"import sys, trackrec.stages.{stage}; sys.exit(bool({{'torch', 'transformers', 'kfp'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_changed_source_changes_the_tags_of_the_stages_it_can_affect(tmp_path: Path) -> None:
    for folder in ("trackrec", "components", "images", "requirements"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))

    def tags() -> dict[str, str]:
        code = "from components import images; print({s: images.source_hash(s) for s in images.IMAGE_OF})"
        run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        found: dict[str, str] = ast.literal_eval(run.stdout)
        return found

    before = tags()
    assert before == {stage: images.source_hash(stage) for stage in stages.STAGES}
    with (tmp_path / "trackrec/align/sdpo.py").open("a") as file:
        file.write("\n# changed\n")
    after = tags()
    assert {stage for stage in before if before[stage] != after[stage]} == {"sdpo"}
    template = next((tmp_path / "trackrec/prompts/templates").iterdir())
    template.write_text(template.read_text() + "changed")
    changed = {stage for stage, tag in tags().items() if tag != after[stage]}
    assert {"sample", "score", "generate", "rec_tune", "evaluate", "distill_data"} <= changed
    assert not {"ingest", "preferences", "tabulate"} & changed
