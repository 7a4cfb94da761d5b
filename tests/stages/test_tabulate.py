import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.tables import publish
from trackrec import storage
from trackrec.evaluation import report, results
from trackrec.evaluation.results import Evaluation, Measures
from trackrec.stages import tabulate


def evaluation(auc: float | None, *, rows: int = 40, mean_tokens: float | None = 61.25) -> Evaluation:
    overall = Measures(
        rows=rows, positives=21, users=9, auc=auc, auc_low=0.4, auc_high=0.7, uauc=0.51, uauc_users=7, acc=0.6,
        log_loss=0.68, ece=0.05,
    )  # fmt: skip
    tail = Measures(rows=3, positives=3, users=2, acc=1, log_loss=0.5, ece=0.1, absent={"auc": "all rows have label 1"})
    baseline = overall.model_copy(update={"auc": 0.7094, "auc_low": 0.65, "auc_high": 0.77})
    return Evaluation(
        split="test",
        recots="own",
        mean_tokens=mean_tokens,
        cut=None if mean_tokens is None else 0.25,
        validator={"overall": overall, "warm": overall, "cold": overall, "long_tail": tail},
        item_mean={"overall": baseline, "warm": baseline, "cold": baseline, "long_tail": tail},
    )


def metrics(directory: Path, found: Evaluation) -> Path:
    with storage.publish("evaluate", found, inputs={}, outputs={"metrics": directory}) as job:
        results.write(job.outputs["metrics"], found)
    return directory


def row(root: Path, label: str, found: Evaluation, previous: Path | None = None, **inputs: Path) -> Path:
    out = root / label
    given = metrics(root / f"{label}-metrics", found)
    tabulate.run(
        label=label,
        iteration=1,
        kind="iteration",
        variant="full",
        metrics=given,
        previous=previous,
        report=out,
        **inputs,
    )
    return out


@pytest.fixture
def two_rows(tmp_path: Path) -> Path:
    first = row(tmp_path, "no RecCoT", evaluation(0.5, mean_tokens=None))
    rewards = [
        {"context_id": "c", "row_id": 1, "sample": s, "p_yes": r, "p_no": 1 - r, "reward": r}
        for s, r in enumerate([0.25, 0.5, 0.75, 0.625])
    ]
    return row(
        tmp_path,
        "iteration 1",
        evaluation(0.5625),
        previous=first,
        rewards=publish(tmp_path / "rewards", rewards=rewards),
        generator=publish(tmp_path / "generator", facts={"preference_accuracy": 0.875, "held_out": 4}),
    )


def test_rows_grow_below_one_baseline(two_rows: Path) -> None:
    found = report.read(two_rows)
    assert [(r.label, r.kind, r.iteration) for r in found.rows] == [
        ("item mean (baseline)", "baseline", None),
        ("no RecCoT", "iteration", 1),
        ("iteration 1", "iteration", 1),
    ]
    baseline, control, iteration = found.rows
    assert (baseline.auc, baseline.mean_tokens, baseline.long_tail_auc) == (0.7094, None, None)
    assert (control.mean_reward, control.preference_accuracy, control.cut) == (None, None, None)
    assert (iteration.auc, iteration.uauc, iteration.acc, iteration.log_loss, iteration.ece) == (
        0.5625, 0.51, 0.6, 0.68, 0.05,
    )  # fmt: skip
    # Rewards .25, .5, .75, .625.
    assert (iteration.mean_reward, iteration.preference_accuracy, iteration.cut) == (0.53125, 0.875, 0.25)
    assert iteration.mean_tokens == 61.25
    assert storage.numbers(two_rows)["rows"] == 3


def test_markdown_csv_and_terminal_show_the_same(two_rows: Path) -> None:
    lines = (two_rows / "report.md").read_text().splitlines()
    assert lines[4] == (
        "| iteration 1 | 1 | 0.5312 | 0.875 (4) | 0.5625 [0.400, 0.700] | 0.5100 | 0.6000 | 0.6800 | 0.0500 | – | 61.2 "
        "| 25% |"
    )
    assert lines[2].startswith("| item mean (baseline) | – | – | – | 0.7094 [0.650, 0.770] |")
    assert {line.count("|") for line in lines[:5]} == {13}
    assert "40 test examples of 9 users, 21 of them liked" in lines[6]
    [baseline, _, iteration] = csv.DictReader(io.StringIO((two_rows / "report.csv").read_text()))
    assert (iteration["label"], iteration["auc"], baseline["iteration"]) == ("iteration 1", "0.5625", "")
    assert json.loads((two_rows / "report.json").read_text())["rows"][2]["auc"] == 0.5625
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table(two_rows))
    shown = console.export_text()
    assert "0.5625 [0.400, 0.700]" in shown and "item mean (baseline)" in shown and "bootstrap over users" in shown


def test_an_evaluation_of_other_examples_is_refused(tmp_path: Path, two_rows: Path) -> None:
    with pytest.raises(ValueError, match=r"other examples.*39 of split 'test' against 40"):
        row(tmp_path, "odd", evaluation(0.5, rows=39), previous=two_rows)
    assert not (tmp_path / "odd").exists()


def test_as_many_but_other_examples_are_told_by_their_baseline(tmp_path: Path, two_rows: Path) -> None:
    found = evaluation(0.5)
    assert found.item_mean is not None
    found.item_mean["overall"].log_loss = 0.5
    with pytest.raises(ValueError, match="other examples"):
        row(tmp_path, "odd", found, previous=two_rows)


def test_a_label_comes_once(tmp_path: Path, two_rows: Path) -> None:
    with pytest.raises(ValueError, match="has a row 'iteration 1' already"):
        tabulate.run(
            label="iteration 1",
            iteration=2,
            kind="iteration",
            variant="full",
            metrics=metrics(tmp_path / "m", evaluation(0.5)),
            previous=two_rows,
            report=tmp_path / "out",
        )


def test_no_baseline_on_the_train_split(tmp_path: Path) -> None:
    found = evaluation(None).model_copy(update={"item_mean": None, "split": "train"})
    out = row(tmp_path, "alone", found)
    assert [(r.label, r.auc) for r in report.read(out).rows] == [("alone", None)]
