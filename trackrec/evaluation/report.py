"""The run's table: one row an evaluation, the item-mean baseline above them. Needs no torch and no scikit-learn."""

import csv
import io
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from trackrec.evaluation.rankings import Ranking
from trackrec.evaluation.results import Evaluation

REPORT_JSON, REPORT_CSV, REPORT_MD = "report.json", "report.csv", "report.md"
ABSENT = "–"

Kind = Literal["baseline", "control", "iteration"]
# Algorithm 2 whole, or without one part: preference alignment (Table 6), distillation (Table 7).
Variant = Literal["full", "no alignment", "no distillation"]


class Row(BaseModel):
    """One evaluation. A measure that does not exist for it is null."""

    model_config = ConfigDict(extra="forbid")

    label: str
    kind: Kind
    # Which loop it comes from, where an ablation runs several ("full" is Algorithm 2 whole).
    variant: Variant = "full"
    # t of Algorithm 2; the baseline has none.
    iteration: int | None = None
    # Mean r_ij (eq. 1) of the samples that iteration t learned from: G's and V's of t - 1.
    mean_reward: float | None = None
    # Over `held_out_sets` preference sets that this iteration's G was not trained on.
    preference_accuracy: float | None = None
    held_out_sets: int | None = None
    auc: float | None = None
    auc_low: float | None = None
    auc_high: float | None = None
    uauc: float | None = None
    acc: float | None = None
    log_loss: float | None = None
    ece: float | None = None
    long_tail_auc: float | None = None
    # Mean tokens of the RecCoTs that V read.
    mean_tokens: float | None = None
    # The share of these that was cut at the token limit.
    cut: float | None = None


class RankedBy(BaseModel):
    """A backbone's result, and the G whose RecCoTs it read; `iteration` is null where it read none."""

    model_config = ConfigDict(extra="forbid")

    variant: Variant
    iteration: int | None
    ranking: Ranking


class Report(BaseModel):
    """`report.json`. All rows are measured on the same `examples` examples of `users` users in `split`.

    `rankings` are measured on all rows of their split, not on the examples alone.
    """

    model_config = ConfigDict(extra="forbid")

    split: str
    examples: int
    positives: int
    users: int
    rows: list[Row]
    rankings: list[RankedBy] = []


# Heading, field, format of each column; an AUC is shown with its interval, an accuracy with its number of sets.
_COLUMNS: list[tuple[str, str, str]] = [
    ("iteration", "iteration", "d"),
    ("mean reward", "mean_reward", ".4f"),
    ("preference accuracy (sets)", "preference_accuracy", ".3f"),
    ("AUC [95 %]", "auc", ".4f"),
    ("UAUC", "uauc", ".4f"),
    ("ACC", "acc", ".4f"),
    ("LogLoss", "log_loss", ".4f"),
    ("ECE", "ece", ".4f"),
    ("long-tail AUC", "long_tail_auc", ".4f"),
    ("mean tokens", "mean_tokens", ".1f"),
    ("cut", "cut", ".0%"),
]


def row_of(evaluation: Evaluation, *, label: str, kind: Kind, iteration: int, variant: Variant = "full") -> Row:
    """The evaluation's part of a row; rewards and preferences are the caller's to add."""
    overall, long_tail = evaluation.validator["overall"], evaluation.validator["long_tail"]
    measures = overall.model_dump(include={"auc", "auc_low", "auc_high", "uauc", "acc", "log_loss", "ece"})
    return Row(
        label=label,
        kind=kind,
        iteration=iteration,
        variant=variant,
        long_tail_auc=long_tail.auc,
        mean_tokens=evaluation.mean_tokens,
        cut=evaluation.cut,
        **measures,
    )


def start(evaluation: Evaluation) -> Report:
    """A report that holds the baseline alone (nothing, where the split has no baseline)."""
    overall = evaluation.validator["overall"]
    rows = []
    if evaluation.item_mean is not None:
        baseline = evaluation.model_copy(update={"validator": evaluation.item_mean, "mean_tokens": None, "cut": None})
        row = row_of(baseline, label="item mean (baseline)", kind="baseline", iteration=0)
        rows.append(row.model_copy(update={"iteration": None}))
    return Report(
        split=evaluation.split, examples=overall.rows, positives=overall.positives, users=overall.users, rows=rows
    )


def empty(split: str) -> Report:
    """A report without evaluations of V, for rankers alone."""
    return Report(split=split, examples=0, positives=0, users=0, rows=[])


def add(report: Report, evaluation: Evaluation, row: Row) -> Report:
    """
    Raises:
        ValueError: the evaluation was made on other examples than the report's rows, or the label is taken.
    """
    expected = start(evaluation)
    own = {"rows", "rankings"}
    if report.model_dump(exclude=own) != expected.model_dump(exclude=own) or report.rows[:1] != expected.rows:
        raise ValueError(
            f"{row.label!r} is evaluated on other examples than the report's rows: {expected.examples} of split "
            f"{expected.split!r} against {report.examples} of {report.split!r}. Evaluate both on the same examples."
        )
    if row.label in {other.label for other in report.rows}:
        raise ValueError(f"the report has a row {row.label!r} already; give this one another label")
    return report.model_copy(update={"rows": [*report.rows, row]})


def add_ranking(report: Report, found: RankedBy) -> Report:
    """
    Raises:
        ValueError: another result of the same backbone, feature, variant and iteration is there, or the rankings so far
            are measured on other rows.
    """
    ranking = found.ranking
    for other in report.rankings:
        if _arm(other) == _arm(found):
            if other == found:
                return report
            raise ValueError(f"the report has another result of {' '.join(map(str, _arm(found)))} already")
        if (other.ranking.split, other.ranking.rows_hash) != (ranking.split, ranking.rows_hash):
            raise ValueError(
                f"{ranking.backbone} is measured on {ranking.rows} rows of split {ranking.split!r}, which are not the "
                f"{other.ranking.rows} of {other.ranking.split!r} of the rankings so far. Train all on the same "
                "interactions."
            )
    return report.model_copy(update={"rankings": [*report.rankings, found]})


def _arm(found: RankedBy) -> tuple[str, str, str, int | None]:
    return found.ranking.backbone, found.ranking.feature, found.variant, found.iteration


def write(directory: Path, report: Report) -> None:
    """`report.json`, `report.csv` and `report.md` (a GitHub table with notes)."""
    files = {
        REPORT_JSON: report.model_dump_json(indent=2) + "\n",
        REPORT_CSV: _csv(report),
        REPORT_MD: markdown(report),
    }
    for name, text in files.items():
        (Path(directory) / name).write_text(text, encoding="utf-8")


def read(directory: Path) -> Report:
    return Report.model_validate(json.loads((Path(directory) / REPORT_JSON).read_text(encoding="utf-8")))


def markdown(report: Report) -> str:
    """The report as GitHub Markdown: the table, then what to know when reading it."""
    lines = [
        "| | " + " | ".join(heading for heading, _, _ in _COLUMNS) + " |",
        "| :--- |" + " ---: |" * len(_COLUMNS),
        *("| " + " | ".join([_escaped(row.label), *_cells(row)]) + " |" for row in report.rows),
        "",
        *(f"- {note}" for note in notes(report)),
    ]
    return "\n".join(lines) + "\n"


def table(directory: Path) -> Table:
    """A published report as a table for the terminal; printing it to a narrow one folds the headings."""
    report = read(directory)
    drawn = Table(title=f"TrackRec on {report.examples} {report.split} rows", caption="\n".join(notes(report)))
    drawn.caption_justify = "left"
    drawn.add_column("")
    for heading, _, _ in _COLUMNS:
        drawn.add_column(heading, justify="right")
    styles: dict[Kind, str] = {"baseline": "dim", "control": "italic", "iteration": "bold"}
    for row in report.rows:
        drawn.add_row(row.label.replace("[", r"\["), *_cells(row, escape=True), style=styles[row.kind])
    return drawn


def notes(report: Report) -> list[str]:
    """What a reader must know to judge the numbers."""
    of_v = [
        f"All rows: the same {report.examples} {report.split} examples of {report.users} users, "
        f"{report.positives} of them liked.",
        "AUC's 95 % interval is a bootstrap over users. A difference well inside the intervals is noise.",
        "Preference accuracy: the share of rejected RecCoTs that the aligned G ranks below the chosen one, on so many "
        "preference sets that alignment does not train on. One half is chance.",
        "Mean reward at iteration t is over the samples it learned from: G's and V's of iteration t - 1.",
        f"{ABSENT}: not measured for this row, or not defined on it (metrics.json says why).",
    ]
    of_rankers = [
        "Ranking models: a test row's own label and later ones reach no RecCoT that it reads; earlier ones are in its "
        "history, as online. Train labels reach G through V's rewards: a train row may read a text of a G that "
        "was aligned on that very row, which a test row never does."
    ]
    return (of_v if report.rows else []) + (of_rankers if report.rankings else [])


def _cells(row: Row, *, escape: bool = False) -> list[str]:
    cells = []
    for _, field, form in _COLUMNS:
        value = getattr(row, field)
        cell = ABSENT if value is None else format(value, form)
        if field == "auc" and row.auc_low is not None:
            cell += f" [{row.auc_low:.3f}, {row.auc_high:.3f}]"
        if field == "preference_accuracy" and row.held_out_sets:
            cell += f" ({row.held_out_sets})"
        cells.append(cell.replace("[", r"\[") if escape else cell)
    return cells


def _escaped(label: str) -> str:
    return label.replace("|", r"\|")


def _csv(report: Report) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(Row.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in report.rows)
    return text.getvalue()
