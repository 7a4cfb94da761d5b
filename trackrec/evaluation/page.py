"""The final report as one HTML page: no script, nothing fetched. RecCoTs and titles are others' text, and escaped."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import get_args

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trackrec.config import Split
from trackrec.evaluation import efficiency, plots, tables
from trackrec.evaluation.efficiency import Efficiency
from trackrec.evaluation.plots import Drawing
from trackrec.evaluation.report import Report, notes
from trackrec.evaluation.tables import METRICS, SLICES, Table


@dataclass(frozen=True)
class Cut:
    """A text, or as much of one as is shown."""

    shown: str
    # Characters that are not.
    dropped: int


@dataclass(frozen=True)
class Shown:
    """One context of the examples: its history, a line an item and oldest first, and G's texts."""

    context_id: str
    history: Sequence[str]
    # Of the history, items before these.
    earlier: int
    # Each with its heading.
    texts: Sequence[tuple[str, Cut]]


def cut(text: str, characters: int) -> Cut:
    return Cut(text[:characters], max(0, len(text) - characters))


def render(report: Report, examples: Sequence[Shown], costs: Efficiency | None = None) -> str:
    """The page. The same report, examples and costs give the same bytes."""
    found = tables.tables(report)
    rows = plots.tokens(report)
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            report=report,
            sections=[(table, _figures(report, table)) for table in found],
            multiplicity=tables.multiplicity(found),
            metrics=METRICS,
            slices=SLICES,
            ranked=_ranked(report),
            costs=costs,
            costs_title=efficiency.TITLE,
            tokens=rows,
            tokens_verdict=plots.tokens_verdict(rows) if rows else "",
            tokens_figure=plots.lengths(rows) if rows else None,
            curves=_curves(report),
            bin_rows=plots.BIN_ROWS,
            examples=examples,
            notes=notes(report),
        )
    )


def _figures(report: Report, table: Table) -> list[Drawing]:
    if table.name in ("table2", "controls"):
        tested = [effect for effect in table.effects if effect.metric == "auc" and effect.test]
        return [plots.forest(list(group), against) for against, group in groupby(tested, lambda e: e.base_name)]
    if table.name == "figure5_gain":
        return [plots.iterations(curve) for curve in plots.curves(report)]
    return []


def _curves(report: Report) -> list[Drawing]:
    """ROC and calibration, backbone by backbone."""
    drawn = [draw(base.ranking, ours.ranking) for base, ours in tables.pairs(report) for draw in _CURVES]
    return [drawing for drawing in drawn if drawing]


_CURVES = (plots.roc, plots.calibration)


def _ranked(report: Report) -> str:
    """What the CTR models were measured on; empty without any."""
    if not report.rankings:
        return ""
    ranking = report.rankings[0].ranking
    reading = [found.ranking for found in report.rankings if found.ranking.feature != "none"]
    most = max(reading, key=lambda one: one.covered["test"], default=ranking)
    shares = ", ".join(f"{most.covered[s]:.1%} of the {s} rows ({most.recots[s]} texts)" for s in get_args(Split))
    return (
        f"CTR models are measured on all {ranking.rows} {ranking.split} rows. A RecCoT older than the row is there for "
        f"{shares}; the others read a learned vector in its place, so the RecCoT cannot help them. Few such train rows "
        "teach the connector little."
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("trackrec.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "shown": tables.shown,
        "p_shown": tables.p_shown,
        # Only for what `plots` drew.
        "drawn": lambda drawing: Markup(drawing.svg),
    }
    return environment
