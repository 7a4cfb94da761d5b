"""The plan's arithmetic, by hand; its tasks against the compiled pipeline; what the pages and the command say."""

import re
import shlex
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipelines import trackrec as pipeline
from trackrec import config_file, planning
from trackrec.cli import app
from trackrec.planning import estimate, work
from trackrec.planning.rates import Rates, Sizes, Splits, read
from trackrec.planning.shapes import KNOWN
from trackrec.run_config import RunConfig

ML_1M = Path("pipelines/configs/ml-1m-qwen2.5-7b.yaml")
QUICKSTART = Path("pipelines/configs/quickstart.yaml")
SEVEN = KNOWN["qwen2.5-7b"]
# Round numbers: ten train contexts with two examples each.
SIZES = Sizes(
    raw_rows=100, contexts=Splits(train=10, valid=2, test=3), examples=Splits(train=20, valid=4, test=6), source="here"
)
LENGTHS = {
    "prompt": 100.0,
    "history": 90.0,
    "target": 20.0,
    "closing": 10.0,
    "target_without_recot": 25.0,
    "recot": 50.0,
}
RATES = Rates.model_validate({"lengths": LENGTHS})


def load(config: Path = ML_1M, **overrides: Any) -> RunConfig:
    """The config; the paper's under the profile of A100s."""
    return config_file.load(config, overrides, profile="gke-a100" if config == ML_1M else None)


def stages(*overrides: str, config: Path = ML_1M, sizes: Sizes = SIZES) -> dict[str, work.Work]:
    loaded = load(config, **dict(config_file.parse_override(one) for one in overrides))
    return {one.stage: one for one in work.of_run(loaded, sizes, RATES.lengths)}


def test_tokens_of_every_stage_by_hand() -> None:
    """T = 3, N = 10, controls on, holdout 0.05, three epochs of V, DIN ranked at every iteration."""
    found = stages()
    assert found["distill_data"].prompts == 1  # 5 % of ten, and one at least
    assert found["sft_generator"].tokens == {"train": 100 + 50}
    assert found["sample"].tokens == {"read": 3 * 10 * 100, "write": 3 * 10 * 10 * 50}
    # Each of twenty examples: history and target once, then ten RecCoTs with what follows them.
    assert found["score"].tokens == {"read": 3 * 20 * (110 + 10 * 60)}
    assert found["score"].prompts == 3 * 20 * 10
    row = 100 + 10 * 50
    assert found["sdpo"].tokens == {"train": 3 * 10 * row, "read": 3 * 10 * row}
    # The first G writes train's, too: Figure 5 ranks with them. The untuned model writes all: Table 5a.
    assert found["generate"].tokens == {"read": 5 * 15 * 100, "write": 5 * 15 * 50}
    assert found["rec_tune"].tokens == {"train": 3 * (3 * 20 * 170 + 3 * 20 * 115)}
    # Test: six examples in three contexts; five evaluations with texts, two without.
    assert found["evaluate"].tokens == {"read": 5 * (3 * 90 + 6 * 80) + 2 * (3 * 90 + 6 * 25)}
    # Texts of four Gs, and the histories once.
    assert found["encode"].tokens == {"encode": 15 * (4 * 50 + 90)}


def test_what_settings_do_to_the_work() -> None:
    assert stages("sample.max_contexts=5")["score"].tokens == {"read": 3 * 10 * (110 + 10 * 60)}
    assert stages("sdpo.holdout=0.5", "sdpo.epochs=2.0")["sdpo"].tokens["train"] == 3 * 5 * 600 * 2
    assert stages("loop.controls=false")["rec_tune"].tokens == {"train": 3 * 3 * 20 * 170}
    assert stages("loop.validator_init=base")["rec_tune"].tasks == 4
    assert stages("contexts.max_train_contexts=5")["rec_tune"].tokens == {"train": 3 * 3 * 10 * (170 + 115)}
    assert stages("rec_tune.max_examples=4")["rec_tune"].prompts == 6 * 4
    assert stages("ranking.by_iteration_of=[]")["generate"].contexts == 4 * 15 + 5
    assert stages("ranking.by_iteration_of=[]", "loop.untuned=false")["generate"].contexts == 3 * 15 + 5
    assert "sdpo" not in stages("loop.iterations=0") and "distill_data" not in stages("loop.distillation=false")
    # Snapshots: as many examples as the cap allows.
    capped = ("contexts.kind=snapshot", "contexts.max_train_contexts=2", "contexts.max_examples_per_context=4")
    assert stages(*capped, "loop.controls=false")["rec_tune"].prompts == 3 * 8


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        (ML_1M, []),
        (ML_1M, ["loop.validator_init=base", "ranking.by_iteration_of=[din,dcn]", "ranking.controls_of=[]"]),
        (QUICKSTART, []),
        (QUICKSTART, ["loop.controls=false", "loop.distillation=false"]),
        (QUICKSTART, ["loop.distillation=false", "ranking.by_iteration_of=[]"]),
        (QUICKSTART, ["loop.untuned=false"]),
        (QUICKSTART, ["loop.iterations=0"]),
        (Path("pipelines/configs/ml-1m-smollm2.yaml"), []),
    ],
)
def test_tasks_are_those_of_the_compiled_pipeline(config: Path, overrides: list[str]) -> None:
    loaded = load(config, **dict(config_file.parse_override(one) for one in overrides))
    tasks = pipeline.build(loaded).pipeline_spec.root.dag.tasks.values()
    compiled = Counter(task.task_info.name.split(" ")[0] for task in tasks)
    planned = estimate.of_run(loaded, RATES, SEVEN, SIZES)
    texts = {"ingest", "distill_data", "sft_generator", "sample", "score", "sdpo", "generate", "rec_tune", "evaluate"}
    texts |= {"encode", "train_ctr"}
    assert {one.work.stage: one.work.tasks for one in planned} == {
        stage: count for stage, count in compiled.items() if stage in texts
    }


def test_hours_and_cost_by_hand() -> None:
    """On one H100 with speeds of 100 tokens/s, and pods that start at once."""
    given = {name: {"tokens_per_second": 100.0} for name in planning.Rates().speeds.model_dump()}
    rates = Rates.model_validate(
        {"lengths": LENGTHS, "speeds": given, "start_seconds": 1e-9, "zero_efficiency": 0.5, "model": SEVEN}
    )
    card = "{cloud.google.com/gke-accelerator: nvidia-h100-80gb}"
    overrides = dict(
        config_file.parse_override(f"resources.{stage}.node_selector={card}")
        for stage in ("sample", "sdpo", "generate")
    )
    config = load(**overrides)
    found = {one.work.stage: one for one in estimate.of_run(config, rates, SEVEN, SIZES)}
    scale = 7.6e9 / SEVEN.parameters
    assert found["sample"].wall_hours == pytest.approx((3000 + 15_000) / 100 / scale / 3600)
    assert found["sample"].gpu_hours == found["sample"].wall_hours
    # Eight GPUs at half speed each; checkpointing trains at 6/8.
    seconds = (18_000 / 75 + 18_000 / 100) / scale / (8 * 0.5)
    assert found["sdpo"].wall_hours == pytest.approx(seconds / 3600)
    assert found["sdpo"].gpu_hours == pytest.approx(8 * seconds / 3600)
    assert found["sdpo"].usd == pytest.approx(8 * seconds / 3600 * 4.0)
    # An A100 writes by its bandwidth and computes by its arithmetic.
    assert estimate.speed(rates, SEVEN, "a100-80gb", "write", config.sample.engine) == pytest.approx(
        100 * scale * 2.04 / 3.35
    )
    assert estimate.speed(rates, SEVEN, "a100-80gb", "read", config.sample.engine) == pytest.approx(
        100 * scale * 312 / 989
    )
    # The nightly job: 1,000 users' prompts and texts.
    generate, _ = estimate.nightly(config, rates, SEVEN, 1000)
    assert generate.gpu_hours == pytest.approx((100_000 + 50_000) / 100 / scale / 3600)


def test_shards_and_nodes_shorten_the_wait_and_not_the_work() -> None:
    rates = Rates.model_validate({"lengths": LENGTHS, "start_seconds": 1e-9, "model": SEVEN})
    config, wider = load(), load(**{"resources.sample.shards": 4, "resources.sdpo.nodes": 2})
    sizes = Rates().datasets["ml-1m"]
    one, many = ({e.work.stage: e for e in estimate.of_run(c, rates, SEVEN, sizes)} for c in (config, wider))
    for stage, pods in (("sample", 4), ("sdpo", 2)):
        assert (one[stage].pods, many[stage].pods) == (1, pods)
        assert many[stage].wall_hours == pytest.approx(one[stage].wall_hours / pods)
        assert many[stage].gpu_hours == pytest.approx(one[stage].gpu_hours)
        assert many[stage].usd == pytest.approx(one[stage].usd)
    # A shard has a quarter of the texts, a node a half of the optimiser's states.
    assert many["sample"].written_bytes == one["sample"].written_bytes / 4
    saved = (one["sdpo"].gpu_bytes or 0) - (many["sdpo"].gpu_bytes or 0)
    assert saved == pytest.approx(16 * SEVEN.parameters * (1 / 8 - 1 / 16))


def test_the_teacher_and_the_rankers_by_hand() -> None:
    config = load()
    sizes = Rates().datasets["ml-1m"]
    found = {one.work.stage: one for one in estimate.of_run(config, Rates(), SEVEN, sizes)}
    # 5 % of 32,975 contexts at 2.5 and 10 dollars a million tokens, 300 a minute.
    assert found["distill_data"].work.prompts == 1649
    assert found["distill_data"].usd == pytest.approx(1649 * (235 * 2.5 + 250 * 10) / 1e6)
    assert found["distill_data"].wall_hours == pytest.approx(1649 / 300 / 60)
    # 38 tasks of 72 points and 5 seeds, 5 epochs of 33,891 rows.
    assert found["train_ctr"].wall_hours == pytest.approx(38 * 77 * 5 * 33_891 / 121_000 / 3600)
    assert found["train_ctr"].usd == pytest.approx(found["train_ctr"].wall_hours * 8 * 0.04)


def test_what_does_not_fit_is_named_with_what_to_do() -> None:
    overrides = {
        "sdpo.deepspeed": None,
        "rec_tune.deepspeed": None,
        "rec_tune.lora": {"r": 8, "alpha": 16},
        "resources.sft_generator.work_claim": None,
        "encode.batch_tokens": 10_000_000,
    }
    config = load(**overrides)
    lines = list(estimate.faults(config, estimate.of_run(config, Rates(), SEVEN, SIZES)))
    assert len(lines) == 3, lines
    assert re.match(
        r"sft_generator keeps 298 GiB .*ephemeral_storage` is 200Gi: raise it, or set .*work_claim", lines[0]
    )
    assert re.match(r"sdpo needs 1\d\d GiB on each GPU and a100-80gb gives 79: lower `sdpo.micro_batch_size`", lines[1])
    assert lines[2].startswith("encode needs") and lines[2].endswith("lower `encode.batch_tokens`")
    shipped = load()
    assert not list(estimate.faults(shipped, estimate.of_run(shipped, Rates(), SEVEN, SIZES)))


def ran(*arguments: str) -> tuple[int, str]:
    profile = ["--profile", "gke-a100"] if str(ML_1M) in arguments else []
    done = CliRunner().invoke(app, ["plan", *arguments, *profile])
    return done.exit_code, done.output


def test_a_file_of_rates_changes_the_plan_and_is_named_as_the_source(tmp_path: Path) -> None:
    file = tmp_path / "rates.yaml"
    file.write_text(yaml.safe_dump({"speeds": {"read": {"tokens_per_second": 50_000.0}}, "start_seconds": 60.0}))
    rates = read(file)
    assert (rates.speeds.read.tokens_per_second, rates.speeds.read.source) == (50_000, str(file))
    assert rates.start_seconds == 60 and rates.speeds.encode == Rates().speeds.encode
    code, output = ran("--config", str(ML_1M), "--rates", str(file))
    assert code == 0 and f"read: 50,000 tokens/s – {file}" in output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed: 3", "speed: unknown key; allowed here: cards"),
        ("- 3", "expected a mapping of rates, got list"),
        ("start_seconds: -1.0", "start_seconds: Input should be greater than 0"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_of_rates_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rates.yaml"
    file.write_text(text)
    code, output = ran("--config", str(ML_1M), "--rates", str(file))
    assert code == 1 and output.startswith("error: ") and message in output


def test_an_unknown_model_or_dataset_asks_for_what_is_missing(tmp_path: Path) -> None:
    code, output = ran("--config", str(ML_1M), "--set", "base_model=gs://bucket/own-model")
    assert code == 1 and "the shape of gs://bucket/own-model is not known; give its numbers under `model`" in output
    log = "{label: liked, valid_from: 2025-01-01, test_from: 2025-02-01}"
    own = ("--set", "ingest.dataset=impressions", "--set", f"ingest.log={log}", "--set", "contexts.domain=generic")
    code, output = ran("--config", str(ML_1M), *own)
    assert code == 1 and "under `datasets.impressions` in a file for --rates" in output
    counts = {"train": 100, "valid": 10, "test": 10}
    sizes = {"raw_rows": 200, "contexts": counts, "examples": counts}
    file = tmp_path / "rates.yaml"
    file.write_text(yaml.safe_dump({"datasets": {"impressions": sizes}}))
    code, output = ran("--config", str(ML_1M), *own, "--rates", str(file))
    assert code == 0 and "| `sample` | 3 | 300 | 3,000 |" in output


def test_without_gpus_tokens_are_planned_and_hours_are_not() -> None:
    code, output = ran("--config", str(QUICKSTART))
    [row] = [line for line in output.splitlines() if line.startswith("| `sample`")]
    assert code == 0 and row.split(" | ")[4:] == ["5.6 K", "24.0 K", "–", "–", "–", "–", "–", "–", "0", "0 |"]
    assert "**all**" not in output


def test_the_sizing_tables_are_what_the_command_prints() -> None:
    """docs/cluster.md, between the command and the end mark."""
    page = Path("docs/cluster.md").read_text(encoding="utf-8")
    found = re.search(r"```bash\n(trackrec plan [^`]*)```\n\n<!-- printed -->\n(.*?)\n<!-- end -->", page, re.S)
    assert found
    command = shlex.split(found[1].replace("\\\n", " "))
    done = CliRunner().invoke(app, command[1:])
    assert done.exit_code == 0 and done.output == found[2] + "\n", "put in what the command prints now"


def test_the_pages_file_of_rates_is_one(tmp_path: Path) -> None:
    page = Path("docs/cluster.md").read_text(encoding="utf-8")
    found = re.search(r"  ```yaml\n(  speeds:.*?)\n  ```", page, re.S)
    assert found
    file = tmp_path / "rates.yaml"
    file.write_text(textwrap.dedent(found[1]))
    rates = read(file)
    assert rates.speeds.sample_vllm.source == "our sample 1" and rates.cards["a100-80gb"].memory_gib == 79.2
    assert rates.cards["a100-80gb"].usd_per_hour != Rates().cards["a100-80gb"].usd_per_hour
