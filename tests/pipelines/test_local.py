"""The compiled pipeline on this machine, through the `trackrec` command."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import pytest
from transformers import PreTrainedTokenizerFast

from pipelines import local, single
from pipelines.local import RunRecord
from tests.pipelines.conftest import FROM_SDPO
from trackrec import config_file, storage
from trackrec.config import Split
from trackrec.data import schema
from trackrec.llm.chat import encode_chat, encode_rec, encode_targets, encode_text
from trackrec.planning import rates, work
from trackrec.prompts.render import cot_prompt

QUICKSTART = "pipelines/configs/quickstart.yaml"
# The quick start cut down to seconds a stage; the model, where a test names none, is the real one.
SMALL = (
    "loop.iterations=1",
    "contexts.max_train_contexts=4",
    "distill_data.teacher.min_matches=4",
    "contexts.max_valid_contexts=1",
    "contexts.max_test_contexts=5",
    "contexts.max_examples_per_context=4",
    "sample.n=2",
    "sample.max_tokens=12",
    "sample.max_contexts=3",
    "generate.max_tokens=12",
    "ranking.backbones=[din,dcn]",
    "train_ctr.max_train_rows=2000",
    "train_ctr.epochs=1",
    "train_ctr.seeds=2",
)
ONE_RANKER = ("ranking.backbones=[dcn]", "ranking.controls_of=[]", "ranking.by_iteration_of=[]")


def trackrec(
    root: Path, command: str, *arguments: str, settings: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    line = [str(Path(sys.executable).with_name("trackrec")), command, "--root", str(root), *arguments]
    for setting in settings:
        line += ["--set", setting]
    return subprocess.run(line, capture_output=True, text=True, timeout=900, check=False)


def newest(root: Path) -> RunRecord:
    folder = max(root.glob(f"*/{local.RECORD}"), key=lambda path: path.stat().st_mtime).parent
    return local.read_record(root, folder.name)


def ran(record: RunRecord) -> set[str]:
    """What did not come from the cache, but for the check before a run, which never does."""
    return {task.title for task in record.tasks.values() if task.stage not in ("", "preflight") and not task.cached}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, RunRecord]:
    """The whole quick start with the real small model, controls included, at T = 1."""
    root = tmp_path_factory.mktemp("runs")
    done = trackrec(root, "run", "--config", QUICKSTART, settings=SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done.stdout, newest(root)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, tuple[str, ...]]:
    """The same without controls on a random two-layer model: what the cache's tests change and run again."""
    root = tmp_path_factory.mktemp("quick")
    settings = (*SMALL, *ONE_RANKER, "loop.controls=false", f"base_model={tiny_model}")
    done = trackrec(root, "run", "--config", QUICKSTART, settings=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, settings


def test_a_whole_run_ends_in_the_table(whole: tuple[Path, str, RunRecord]) -> None:
    _, output, record = whole
    for row in (
        "DIN",
        "DCN",
        "random vectors",
        "item mean",
        "no RecCoT, zero-shot",
        "no RecCoT, tuned",
        "iteration 0",
        "iteration 1",
        "shuffled",
    ):
        assert row in output
    for title in ("sample 1", "score 1", "preferences 1", "sdpo 1", "generate 1", "rec_tune 1"):
        assert title in ran(record)
    for task in record.tasks.values():
        for artifact in task.outputs.values():
            assert Path(artifact.uri).exists()
            assert artifact.uri in output
    # Table 5a, of the same contexts.
    assert re.search(r"\| untuned \| 10 \| [\d.]+ \| [\d.]+ \| \d+% \| [\d.]+ \|", output)
    assert re.search(r"\| aligned \| 10 \| [\d.]+ \| [\d.]+ \| \d+% \| [\d.]+ \|", output)
    report = re.search(r"The report: (\S+/report.html)", output)
    assert report and "Table 2" in Path(report[1]).read_text(encoding="utf-8")


def test_metrics_are_drawn_on_the_runs_page(whole: tuple[Path, str, RunRecord]) -> None:
    _, _, record = whole
    task = {task.title: task for task in record.tasks.values()}["train_ctr din 1"]
    assert 0 < task.outputs["metrics"].metadata["auc"] < 1
    curve = task.outputs["roc"].metadata["confidenceMetrics"]
    assert {"confidenceThreshold", "recall", "falsePositiveRate"} == set(curve[0])


def test_explain(whole: tuple[Path, str, RunRecord]) -> None:
    root, _, record = whole
    examples = next(task for task in record.tasks.values() if task.stage == "contexts").outputs["examples"].uri
    judged = next(row for row in schema.rows(Path(examples), "examples") if row["split"] == "test")
    asked = ("--run", record.run, "--user", judged["user_id"])
    done = trackrec(root, "explain", *asked, "--item", judged["item_id"])
    assert done.returncode == 0, done.stderr
    for expected in ("oldest first", "RecCoT of iteration 0", "RecCoT of iteration 1", "with the RecCoT", "without"):
        assert expected in " ".join(done.stdout.split()), done.stdout
    done = trackrec(root, "explain", "--run", record.run, "--user", "nobody")
    assert done.returncode == 1 and "no RecCoT was written for user 'nobody'" in done.stderr
    done = trackrec(root, "explain", *asked, "--item", "no-such-item")
    assert done.returncode == 1 and "no item 'no-such-item'" in done.stderr


def test_backbones_on_a_finished_runs_recots(whole: tuple[Path, str, RunRecord]) -> None:
    """The base rankers, of the same tables and settings, come from the cache."""
    root, _, record = whole
    arguments = ("--config", QUICKSTART, "--pipeline", "backbones", "--from", record.run)
    settings = (*SMALL, "ranking.controls_of=[]", "ranking.by_iteration_of=[]")
    done = trackrec(root, "run", *arguments, settings=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    alone = newest(root)
    assert {task.title for task in alone.tasks.values() if task.stage == "train_ctr"} == {
        "train_ctr din",
        "train_ctr din 1",
        "train_ctr dcn",
        "train_ctr dcn 1",
    }
    texts = {task.title: task for task in alone.tasks.values()}["encode 1"].inputs["recots"].uri
    assert texts == {task.title: task for task in record.tasks.values()}["generate 1"].outputs["recots"].uri
    assert "Table 2" in done.stdout
    done = trackrec(root, "run", *arguments, "--texts", "generate 0", settings=settings)
    assert done.returncode == 1 and "add --set loop.iterations=0" in " ".join(done.stderr.split())
    for wrong in (("--pipeline", "backbones"), ("--from", record.run)):
        done = trackrec(root, "run", "--config", QUICKSTART, *wrong)
        assert done.returncode == 1 and "--from RUN goes with" in " ".join(done.stderr.split())


def test_what_a_whole_run_wrote(whole: tuple[Path, str, RunRecord]) -> None:
    root, _, record = whole
    outputs = {task.title: {name: Path(a.uri) for name, a in task.outputs.items()} for task in record.tasks.values()}

    contexts = schema.rows(outputs["contexts"]["contexts"], "contexts")
    samples = schema.rows(outputs["sample 1"]["recots"], "recots")
    assert len(samples) == 3 * 2
    train = {row["context_id"] for row in contexts if row["split"] == "train"}
    assert {row["context_id"] for row in samples} <= train and len(train) == 4
    for row in schema.rows(outputs["score 1"]["rewards"], "rewards"):
        assert row["p_yes"] + row["p_no"] == pytest.approx(1)
    written = schema.rows(outputs["generate 1"]["recots"], "recots")
    assert {row["context_id"] for row in written} == {row["context_id"] for row in contexts}
    assert all(row["num_tokens"] <= 12 and row["finish_reason"] in ("stop", "length") for row in written)
    tests = [row for row in schema.rows(outputs["contexts"]["examples"], "examples") if row["split"] == "test"]
    predictions = schema.rows(outputs["evaluate (iteration 1)"]["predictions"], "predictions")
    assert {row["row_id"] for row in predictions} == {row["row_id"] for row in tests}

    # G changed by distillation, then by alignment; V by Rec-tuning.
    models = [outputs["sft_generator"]["generator"], outputs["sdpo 1"]["aligned"], outputs["rec_tune 1"]["tuned"]]
    assert len({storage.content_hash(model) for model in models}) == 3
    for model in models:
        assert (model / "adapter_model.safetensors").is_file()
        assert str(root) not in (model / "adapter_config.json").read_text()


def test_the_plans_tokens_are_those_that_the_run_counted(
    whole: tuple[Path, str, RunRecord], tokenizer: PreTrainedTokenizerFast
) -> None:
    """`trackrec plan` under the run's own sizes and text lengths, against the stages' manifests."""
    root, _, record = whole
    config = config_file.load(root / record.run / local.CONFIG)
    outputs = {task.title: {name: Path(a.uri) for name, a in task.outputs.items()} for task in record.tasks.values()}
    contexts = {row["context_id"]: row for row in schema.rows(outputs["contexts"]["contexts"], "contexts")}
    examples = schema.rows(outputs["contexts"]["examples"], "examples")
    counts = storage.read_manifest(outputs["contexts"]["contexts"]).facts
    sizes = rates.Sizes(
        raw_rows=1,
        contexts=rates.Splits(**{split: counts[f"contexts_{split}"] for split in get_args(Split)}),
        examples=rates.Splits(**{split: counts[f"examples_{split}"] for split in get_args(Split)}),
    )

    def facts(title: str, output: str) -> dict[str, float]:
        return storage.read_manifest(outputs[title][output]).facts

    def planned(stage: str, judged: list[dict[str, Any]], texts: list[str]) -> work.Work:
        """The stage's work, with the mean lengths of these examples, of their contexts and of `texts`."""
        shown = [contexts[name] for name in sorted({row["context_id"] for row in judged})]
        prefixes = [encode_targets(tokenizer, c["domain"], c["history"], [("", None)])[0] for c in shown]
        parts = []
        for row in judged:
            context = contexts[row["context_id"]]
            given = (tokenizer, context["domain"], context["history"])
            prefix, [closing] = encode_rec(*given, row["title"], [""])
            history, [bare] = encode_targets(*given, [(row["title"], None)])
            parts.append((len(prefix) - len(history), len(closing), len(bare)))
        target, closing_, without = (fmean(column) for column in zip(*parts, strict=True))
        lengths = rates.Lengths(
            prompt=fmean(len(encode_chat(tokenizer, cot_prompt(c["domain"], c["history"]))) for c in shown),
            history=fmean(map(len, prefixes)),
            target=target,
            closing=closing_,
            target_without_recot=without,
            recot=fmean(len(encode_text(tokenizer, text)) for text in texts) if texts else 1,
        )
        [found] = [one for one in work.of_run(config, sizes, lengths) if one.stage == stage]
        return found

    def texts_of(title: str, names: set[str]) -> list[str]:
        rows = schema.rows(outputs[title]["recots"], "recots")
        return [row["text"] for row in rows if row["context_id"] in names]

    train, test = ([row for row in examples if row["split"] == split] for split in ("train", "test"))
    sampled = {row["context_id"] for row in schema.rows(outputs["sample 1"]["recots"], "recots")}
    scored = [row for row in train if row["context_id"] in sampled]
    score, counted = planned("score", scored, texts_of("sample 1", sampled)), facts("score 1", "rewards")
    assert score.tokens_in / score.prompts == pytest.approx(counted["tokens"] / counted["rows"], rel=0.02)
    assert score.contexts == counted["contexts"] == 3

    tuned, counted = facts("rec_tune 1", "tuned"), facts("evaluate (iteration 1)", "metrics")
    own = planned("rec_tune", train, texts_of("generate 1", {row["context_id"] for row in train}))
    # Half of its tasks are the control's, without RecCoTs.
    bare = facts("rec_tune 1 (no RecCoT)", "tuned")
    assert own.prompts == tuned["examples"] + bare["examples"]
    assert own.tokens_in == pytest.approx(tuned["tokens"] + bare["tokens"], rel=0.02)

    judged = planned("evaluate", test, texts_of("generate 1", {row["context_id"] for row in test}))
    every = [facts(title, "metrics") for title in outputs if title.startswith("evaluate")]
    assert judged.tasks == len(every) and judged.prompts == sum(one["rows"] for one in every)
    assert judged.tokens_in == pytest.approx(sum(one["tokens"] for one in every), rel=0.1)  # other iterations' texts

    distilled = texts_of("distill_data", set(contexts))
    student, counted = planned("sft_generator", train, distilled), facts("sft_generator", "generator")
    assert student.prompts == counted["examples"]
    assert student.tokens_in == pytest.approx(counted["tokens"], rel=0.02)

    aligned, counted = planned("sdpo", scored, texts_of("sample 1", sampled)), facts("sdpo 1", "aligned")
    row = aligned.tokens["train"] / aligned.prompts
    assert row == pytest.approx(counted["tokens"] / counted["examples"], rel=0.1)  # those that are not held out
    for stage in ("sample", "generate", "encode"):
        [found] = [one for one in work.of_run(config, sizes, rates.Lengths()) if one.stage == stage]
        done = record.of_stage(stage).values()
        written = [storage.read_manifest(Path(next(iter(task.outputs.values())).uri)).facts for task in done]
        assert found.tasks == len(written) and found.contexts == sum(one["contexts"] for one in written)


def test_a_second_run_is_all_cache_hits(quick: tuple[Path, tuple[str, ...]]) -> None:
    root, settings = quick
    done = trackrec(root, "run", "--config", QUICKSTART, settings=settings)
    assert done.returncode == 0, done.stderr
    assert ran(newest(root)) == set()
    [check] = newest(root).of_stage("preflight").values()
    assert not check.cached and "✔ base_model has its weights" in Path(check.outputs["checks"].uri).read_text()


def test_a_changed_setting_runs_its_stage_again_and_what_follows(quick: tuple[Path, tuple[str, ...]]) -> None:
    root, settings = quick
    done = trackrec(root, "run", "--config", QUICKSTART, settings=(*settings, "sdpo.beta=0.7"))
    assert done.returncode == 0, done.stderr
    assert ran(newest(root)) == FROM_SDPO


def test_a_changed_input_is_seen(quick: tuple[Path, tuple[str, ...]], tmp_path: Path, tiny_model: Path) -> None:
    """The same path with other content is another input: its hash is in the importer's metadata."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    root, settings = quick
    shorter = (*settings, f"base_model={model}", "loop.iterations=0", "loop.distillation=false")
    ranked = {"encode 0", "train_ctr dcn 0", "tabulate_ctr (dcn 0)", "compare"}
    for expected in ({"generate 0", "evaluate (iteration 0)", "tabulate (iteration 0)"} | ranked, set()):
        assert trackrec(root, "run", "--config", QUICKSTART, settings=shorter).returncode == 0
        assert ran(newest(root)) == expected
    (model / "generation_config.json").write_text("{}")
    assert trackrec(root, "run", "--config", QUICKSTART, settings=shorter).returncode == 0
    assert "generate 0" in ran(newest(root))


def test_ablations_end_in_tables_6_and_7(quick: tuple[Path, tuple[str, ...]]) -> None:
    root, settings = quick
    twice = (*settings, "loop.iterations=2", "ranking.by_iteration_of=[dcn]")
    done = trackrec(root, "run", "--config", QUICKSTART, "--pipeline", "ablations", settings=twice)
    assert done.returncode == 0, done.stdout + done.stderr
    # Whatever the whole pipeline did under the same settings.
    assert not {"ingest", "contexts", "sft_generator"} & ran(newest(root))
    results = Path(next(iter(newest(root).of_stage("compare").values())).outputs["results"].uri)
    for table in ("table6", "table7", "iteration"):
        rows = (results / f"{table}.csv").read_text(encoding="utf-8")
        assert "DCN" in rows and "V" in rows
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "Table 6" in page and "Table 7" in page


def test_runs_of_one_second_have_names_of_their_own(tmp_path: Path) -> None:
    names = [local._new_folder(tmp_path, "run-20260101-000000").name for _ in range(3)]
    assert names == ["run-20260101-000000", "run-20260101-000000-2", "run-20260101-000000-3"]


def test_one_stage_again(quick: tuple[Path, tuple[str, ...]]) -> None:
    root, settings = quick
    trackrec(root, "run", "--config", QUICKSTART, settings=settings)
    run = newest(root)
    done = trackrec(root, "stage", "sample 1", "--run-id", run.run, settings=("sample.n=3",))
    assert done.returncode == 0, done.stdout + done.stderr
    (task,) = [task for task in newest(root).tasks.values() if task.stage]
    assert task.title == "sample 1"
    before = {task.title: task for task in run.tasks.values()}["sample 1"]
    assert task.inputs["contexts"].uri == before.inputs["contexts"].uri
    assert len(schema.rows(Path(task.outputs["recots"].uri), "recots")) == 3 * 3
    assert task.outputs["recots"].uri in done.stdout

    done = trackrec(root, "report", "--run", newest(root).run)
    assert done.returncode == 1 and "is of one stage and has no report" in done.stderr
    done = trackrec(root, "stage", "sample 1", "--run-id", run.run, settings=("sdpo.beta=9",))
    assert (
        done.returncode == 1
        and "sdpo.beta: not a setting of sample 1; allowed here: sample, seed, resources.sample" in done.stderr
    )


def test_which_task_is_meant(quick: tuple[Path, tuple[str, ...]]) -> None:
    root, settings = quick
    trackrec(root, "run", "--config", QUICKSTART, settings=settings)
    record = newest(root)
    assert single.find(record, "ingest").stage == "ingest"
    assert single.find(record, "generate 1").title == "generate 1"
    with pytest.raises(
        LookupError,
        match=r"several tasks of the stage 'generate'; name one: '(generate ([01]|\(untuned\))(', '|')){3}",
    ):
        single.find(record, "generate")
    with pytest.raises(LookupError, match="no stage or task 'sampel'"):
        single.find(record, "sampel")


def test_a_failing_stage_fails_the_run_with_its_reason(quick: tuple[Path, tuple[str, ...]]) -> None:
    root, settings = quick
    done = trackrec(root, "run", "--config", QUICKSTART, settings=(*settings, "sdpo.max_length=8"))
    assert done.returncode == 1
    # Its own words first.
    assert re.search(r"sdpo 1 failed: .*TooLongError: .* more than max_length 8", done.stderr.splitlines()[0])
    assert "Retrying" not in done.stdout + done.stderr and done.stdout.count("✘") == 1
    log = re.search(r"The whole log is (\S+)\.", done.stderr)
    assert log and "max_length" in Path(log[1]).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--config", "nothing.yaml"), "nothing.yaml: cannot be read"),
        (("run", "--config", QUICKSTART, "--set", "sample.m=1"), "sample.m: unknown key; allowed here:"),
        (("run", "--config", QUICKSTART, "--set", "raw_data=/nowhere"), "raw_data: /nowhere does not exist"),
        (("run", "--config", QUICKSTART, "--set", "raw_data=package:ml-9"), "ml-100k"),
        (("run", "--config", QUICKSTART, "--pipeline", "ablations", "--set", "loop.iterations=1"), "of 2 or more"),
        (("run", "--config", QUICKSTART, "--set", "ranking.controls_of=[xdeepfm]"), "ranking.controls_of"),
        (("stage", "sample", "--run-id", "no-such-run"), "no finished run 'no-such-run'"),
    ],
)
def test_what_the_user_can_mend_is_one_message(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = trackrec(tmp_path, *arguments)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_help_shows_all() -> None:
    line = [str(Path(sys.executable).with_name("trackrec")), "--help"]
    text = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    for command in ("run", "stage", "compile", "report", "explain", "stages", "ingest", "fetch", "plan"):
        assert re.search(rf"\b{command}\b", text), command
