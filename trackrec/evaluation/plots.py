"""The report's figures as inline SVG, and Figure 5's and Table 5a's numbers that they draw.

One panel a figure, so that a phone stacks them. Text stays text, in the page's own colour. What differs by colour
(Okabe and Ito's, for the colour-blind; a page sets them by `--base` and `--ours`) differs by marker or line as well.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from statistics import fmean, stdev
from typing import Any, get_args

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trackrec.config import Backbone
from trackrec.evaluation.arms import Metric, arm_of, labelled, recots_of, seed_values, validators_of
from trackrec.evaluation.rankings import Ranking
from trackrec.evaluation.report import Report, Row
from trackrec.evaluation.tables import BACKBONES, METRICS, SHORT, UNTOLD, VALIDATOR, Effect, Outcome

# Inches; shown about 330 px wide on a phone, where 10 pt are 12 px.
_WIDTH, _HEIGHT = 3.9, 2.7
_BASE, _OURS = "#d55e00", "#0072b2"
_OUTCOMES: dict[Outcome, tuple[str, str]] = {
    "better": (_OURS, "^"), "worse": (_BASE, "v"), "not told apart": ("#808080", "o"), "not tested": ("#808080", "x"),
}  # fmt: skip
# No drawing uses this blue-black by itself: it stands for the page's text colour.
_INK = "#010203"


@dataclass(frozen=True)
class Drawing:
    """`svg` needs nothing from outside; its text is ours alone, so it goes into a page as it is."""

    svg: str
    alt: str


@dataclass(frozen=True)
class CurvePoint:
    iteration: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """One model's metric against the iteration (Figure 5); `spread` says what `low` and `high` are."""

    model: str
    metric: Metric
    points: tuple[CurvePoint, ...]
    base: float | None
    base_name: str
    spread: str


def curves(report: Report) -> list[Curve]:
    """Figure 5: V, then each backbone, of those that have results at more than one iteration."""
    found = [*_of_validator(report)]
    for backbone in get_args(Backbone):
        found += _of_backbone(report, backbone)
    return [curve for curve in found if len(curve.points) > 1]


def _of_validator(report: Report) -> Iterator[Curve]:
    base, rows = labelled(report, UNTOLD), sorted(validators_of(report, "full").items())
    for metric in SHORT:
        flat, name = (getattr(base, metric), base.label) if base else (None, "")
        # Only the AUC has an interval.
        points = tuple(
            CurvePoint(t, getattr(row, metric), *((row.auc_low, row.auc_high) if metric == "auc" else ()))
            for t, row in rows
            if getattr(row, metric) is not None
        )
        spread = "95 % interval over users" if metric == "auc" else ""
        yield Curve(VALIDATOR, metric, points, flat, name, spread)


def _of_backbone(report: Report, backbone: Backbone) -> Iterator[Curve]:
    without = arm_of(report, backbone, "none")
    for metric in SHORT:
        points = []
        for t, found in sorted(recots_of(report, backbone, "full").items()):
            values = [*seed_values(found, "overall", metric).values()]
            if len(values) > 1:
                mean, std = fmean(values), stdev(values)
                points.append(CurvePoint(t, mean, mean - std, mean + std))
            elif values:
                points.append(CurvePoint(t, values[0]))
        flats = seed_values(without, "overall", metric).values() if without else ()
        flat = fmean(flats) if flats else None
        yield Curve(BACKBONES[backbone], metric, tuple(points), flat, "no RecCoT", "± one std over seeds")


def tokens(report: Report) -> list[Row]:
    """Table 5a: the iterations whose RecCoTs' mean tokens are known."""
    return [row for _, row in sorted(validators_of(report, "full").items()) if row.mean_tokens is not None]


def tokens_verdict(rows: Sequence[Row]) -> str:
    first, last = rows[0], rows[-1]
    assert first.mean_tokens is not None and last.mean_tokens is not None
    text = f"{last.mean_tokens:.1f} tokens at iteration {last.iteration}"
    if first is last:
        return f"RecCoTs have {text}."
    shorter = last.mean_tokens < first.mean_tokens
    return (
        f"RecCoTs {'get' if shorter else 'do not get'} shorter: {text}, {first.mean_tokens:.1f} at iteration "
        f"{first.iteration}{', as in the paper' if shorter else ', while the paper has shorter ones'}."
    )


def forest(effects: Sequence[Effect], against: str) -> Drawing:
    """Each model's difference in a metric and its interval, on both sides of zero (Table 2)."""
    tested = [(effect, effect.test) for effect in effects if effect.test]
    metric = METRICS[effects[0].metric]
    with _figure(1.1 + 0.3 * len(tested)) as figure:
        axes = figure.subplots()
        axes.axvline(0, color=_INK, linewidth=1)
        for place, (effect, test) in enumerate(tested):
            colour, marker = _OUTCOMES[effect.outcome]
            axes.plot([test.low, test.high], [place, place], color=colour, linewidth=2)
            axes.plot(test.difference, place, color=colour, marker=marker, markersize=8)
        axes.set_yticks(range(len(tested)), [f"{effect.model} {effect.mark}".strip() for effect, _ in tested])
        axes.set_ylim(len(tested) - 0.5, -0.5)
        axes.set_xlabel(f"difference in {metric}")
        axes.ticklabel_format(axis="x", style="plain", useOffset=False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        figure.suptitle(f"against {against}", x=0.02, ha="left", fontsize=11)
        said = [f"{e.model} {t.difference:+.4f} [{t.low:+.4f}, {t.high:+.4f}], {e.outcome}" for e, t in tested]
        alt = f"Differences in {metric} against {against}, with 95 % intervals: {'; '.join(said)}."
        return _drawn(figure, f"forest {against}", alt)


def iterations(curve: Curve) -> Drawing:
    """Figure 5, one model and metric; its base is the dashed line."""
    with _figure() as figure:
        axes = figure.subplots()
        t, values = [p.iteration for p in curve.points], [p.value for p in curve.points]
        axes.plot(t, values, color=_OURS, marker="o", label="with the RecCoT")
        for p in curve.points:
            if p.low is not None and p.high is not None:
                axes.plot([p.iteration] * 2, [p.low, p.high], color=_OURS, marker="_", linewidth=1.5)
        if curve.base is not None:
            axes.axhline(curve.base, color=_BASE, linestyle="--", label=curve.base_name)
        axes.set_xticks(t)
        axes.set_xlabel("iteration")
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(f"{curve.model}: {METRICS[curve.metric]}", loc="left")
        _legend(figure)
        said = ", ".join(f"{p.value:.4f} at iteration {p.iteration}" for p in curve.points)
        base = f"; {curve.base_name}: {curve.base:.4f}" if curve.base is not None else ""
        return _drawn(
            figure, f"{curve.model} {curve.metric}", f"{METRICS[curve.metric]} of {curve.model}: {said}{base}."
        )


def roc(base: Ranking, ours: Ranking) -> Drawing | None:
    """ROC curves of the seeds' mean scores; None where a side has none (one class only)."""
    if base.roc is None or ours.roc is None:
        return None
    with _figure(3.4) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#808080", linestyle=":", linewidth=1)
        for found, colour, line, name in ((base.roc, _BASE, "--", "no RecCoT"), (ours.roc, _OURS, "-", "RecCoT")):
            axes.plot(found.false_positive_rate, found.true_positive_rate, color=colour, linestyle=line, label=name)
        name = BACKBONES[ours.backbone]
        _square(axes, f"{name}: ROC", "false positive rate", "true positive rate")
        _legend(figure)
        return _drawn(figure, f"{name} roc", f"ROC curves of {name} without (dashed) and with the RecCoT.")


# A bin of fewer rows is not drawn: its share of liked rows says little.
BIN_ROWS = 30


def calibration(base: Ranking, ours: Ranking) -> Drawing | None:
    """Share of liked rows against the mean score, a point a bin of `BIN_ROWS` or more; None where a side has none."""
    of_base, of_ours = ([b for b in side.calibration if b.rows >= BIN_ROWS] for side in (base, ours))
    if not of_base or not of_ours:
        return None
    with _figure(3.4) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#808080", linestyle=":", linewidth=1)
        for bins, colour, style, name in ((of_base, _BASE, "s--", "no RecCoT"), (of_ours, _OURS, "o-", "RecCoT")):
            scores, liked = [b.mean_score for b in bins], [b.liked for b in bins]
            axes.plot(scores, liked, style, color=colour, markersize=5, label=name)
        name = BACKBONES[ours.backbone]
        _square(axes, f"{name}: calibration", "mean score", "share liked")
        _legend(figure)
        told = "; ".join(f"score {b.mean_score:.2f}, liked {b.liked:.2f} ({b.rows} rows)" for b in of_ours)
        return _drawn(figure, f"{name} calibration", f"Calibration of {name} with the RecCoT: {told}.")


def lengths(rows: Sequence[Row]) -> Drawing:
    """Mean tokens of the RecCoTs by iteration (Table 5a)."""
    with _figure(2.3) as figure:
        axes = figure.subplots()
        t, means = [row.iteration or 0 for row in rows], [row.mean_tokens or 0.0 for row in rows]
        for place, mean in zip(t, means, strict=True):
            axes.annotate(f"{mean:.1f}", (place, mean), xytext=(0, 3), textcoords="offset points", ha="center")
        axes.bar(t, means, width=0.6, color=_OURS)
        axes.set_xticks(t)
        axes.set_xlabel("iteration")
        axes.set_title("Mean tokens of a RecCoT", loc="left", pad=14)
        said = ", ".join(f"{mean:.1f} at iteration {place}" for place, mean in zip(t, means, strict=True))
        return _drawn(figure, "tokens", f"Mean tokens of a RecCoT: {said}.")


@contextmanager
def _figure(height: float = _HEIGHT) -> Iterator[Figure]:
    """An empty figure `height` inches high; the style holds while it is drawn."""
    style: Any = {
        "axes.edgecolor": _INK, "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "font.size": 10,
        "font.family": "sans-serif", "legend.frameon": False, "svg.fonttype": "none",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        yield Figure(figsize=(_WIDTH, height), layout="constrained")


def _square(axes: Axes, title: str, across: str, up: str) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=across, ylabel=up)
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])
    axes.set_title(title, loc="left")


def _legend(figure: Figure) -> None:
    """Below the axes, so that it hides no curve."""
    figure.legend(loc="outside lower left", ncols=2, handlelength=2.5, columnspacing=1, borderpad=0)


def _drawn(figure: Figure, name: str, alt: str) -> Drawing:
    """The figure as an `<svg>` that can stand in HTML: no prolog, no metadata, no address, no id that two may share."""
    text = io.StringIO()
    # Ids of clips and markers are hashes of the salt and their content: of no two figures alike, of one always.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    for drawn, said in ((_INK, "currentColor"), (_BASE, f"var(--base, {_BASE})"), (_OURS, f"var(--ours, {_OURS})")):
        svg = svg.replace(drawn, said)
    # Its size comes from the page's style; the view box keeps the proportions.
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{escape(alt)}"', svg, count=1)
    return Drawing(svg, alt)
