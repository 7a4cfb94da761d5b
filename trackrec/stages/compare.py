"""The run's final report: the paper's tables and figures from the run's numbers, tested; losses as plain as gains."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, PositiveInt

from trackrec import storage
from trackrec.data import schema
from trackrec.evaluation import efficiency, page, plots, tables
from trackrec.evaluation import report as reports
from trackrec.evaluation.arms import Metric
from trackrec.evaluation.efficiency import Efficiency
from trackrec.evaluation.report import RankedBy, Report
from trackrec.evaluation.tables import Effect, Table
from trackrec.prompts.render import ShownItem

PAGE, MARKDOWN, EFFICIENCY = "report.html", "rankings.md", "efficiency.md"


class _Settings(BaseModel):
    """What a reader sees of the examples; it goes into the manifest as the stage's settings."""

    model_config = ConfigDict(extra="forbid")

    examples: PositiveInt
    # What is longer is cut, and the page says so.
    characters: PositiveInt = 2000
    # The last so many items of a history.
    items: PositiveInt = 15


def run(
    *,
    report: Path,
    contexts: Path,
    results: Path,
    before: Path | None = None,
    after: Path | None = None,
    untuned: Path | None = None,
    examples: int = 5,
) -> None:
    """Writes `report.html`, `rankings.md`, `efficiency.md` and the CSV files of the tables that there are runs for.

    Args:
        report: the run's whole report.
        contexts: the histories of the examples.
        before, after: table `recots`, G's texts before the first alignment and after the last, for the examples.
        untuned: table `recots` of the base model as it is; with `after` it gives Table 5a.
        examples: how many contexts the page shows, the first by id of those that all given tables have.

    Facts: `tables`, `tests`, `better`, `worse`, `not_told_apart` (distinct tests by outcome), `examples`.

    Raises:
        ValueError: a context of the examples is not in `contexts`.
    """
    settings = _Settings(examples=examples)
    texts = {name: path for name, path in {"before": before, "after": after}.items() if path is not None}
    inputs = {"report": report, "contexts": contexts} | texts | ({} if untuned is None else {"untuned": untuned})
    with storage.publish("compare", settings, inputs=inputs, outputs={"results": results}) as job:
        found = reports.read(report)
        compared = tables.tables(found)
        shown = _examples(settings, contexts, texts)
        costs = _efficiency(untuned, after) if untuned is not None and after is not None else None
        out = job.outputs["results"]
        (out / PAGE).write_text(page.render(found, shown, costs), encoding="utf-8")
        if costs is not None:
            (out / EFFICIENCY).write_text(efficiency.markdown(costs), encoding="utf-8")
            _write(out / "efficiency.csv", map(asdict, costs.costs))
        (out / MARKDOWN).write_text(markdown(compared), encoding="utf-8")
        for name, rows in _files(found, compared):
            _write(out / f"{name}.csv", rows)
        effects = {effect for table in compared for effect in table.effects if effect.test}
        outcomes = [effect.outcome for effect in effects]
        job.facts |= {"tables": len(compared), "tests": len(effects), "examples": len(shown)}
        job.facts |= {name.replace(" ", "_"): outcomes.count(name) for name in ("better", "worse", "not told apart")}


def markdown(compared: list[Table]) -> str:
    """Table 2, the controls and every verdict as GitHub Markdown, for the terminal."""
    lines = []
    for table in compared:
        lines += [f"## {table.title}", ""]
        if table.name in ("table2", "controls"):
            heads = [f"{tables.METRICS[metric]} {side}" for metric in table.metrics for side in ("base", "ours")]
            lines += [f"| | base | {' | '.join(heads)} |", "| :--- | :--- |" + " ---: |" * len(heads)]
            for line in table.lines:
                cells = [f"{tables.shown(e.base)} | {tables.shown(e.ours)}{e.mark}" for e in line]
                lines.append(f"| {line[0].model} | {line[0].base_name} | {' | '.join(cells)} |")
            lines.append("")
        lines += [*(f"- {sentence}" for sentence in [*table.verdicts, *table.absences]), ""]
    lines += [
        "`*` better, p < 0.001; `+` better, p < 0.05; `−` worse, p < 0.05 (LogLoss: lower is better). "
        + tables.multiplicity(compared)
    ]
    return "\n".join(lines) + "\n"


def _examples(settings: _Settings, contexts: Path, given: Mapping[str, Path]) -> list[page.Shown]:
    """The first contexts by id that all the tables have: an order that knows nothing of the texts."""
    sides = [(_HEADINGS[name] if len(given) > 1 else "RecCoT", _greedy(path)) for name, path in given.items()]
    if not sides:
        return []
    names = sorted(set.intersection(*(set(texts) for _, texts in sides)))[: settings.examples]
    table = schema.read(contexts, "contexts", ["context_id", "history"])
    chosen = table.filter(pc.is_in(table["context_id"], pa.array(names, pa.string()))).to_pylist()
    histories: dict[str, list[ShownItem]] = {row["context_id"]: row["history"] for row in chosen}
    if missing := [name for name in names if name not in histories]:
        raise ValueError(f"{contexts} lacks context {missing[0]}, which has a RecCoT; give the table that G read")
    return [
        page.Shown(
            context_id=name,
            history=[_line(item) for item in histories[name][-settings.items :]],
            earlier=max(0, len(histories[name]) - settings.items),
            texts=[(heading, page.cut(texts[name], settings.characters)) for heading, texts in sides],
        )
        for name in names
    ]


_HEADINGS = {"before": "Before the first alignment", "after": "After the last alignment"}


def _greedy(recots: Path) -> dict[str, str]:
    rows = schema.rows(recots, "recots", ["context_id", "sample", "text"])
    return {row["context_id"]: row["text"] for row in rows if row["sample"] == 0}


def _efficiency(untuned: Path, aligned: Path) -> Efficiency | None:
    sides = [
        {
            row["context_id"]: (row["num_tokens"], row["finish_reason"] == "length")
            for row in schema.rows(path, "recots", ["context_id", "sample", "num_tokens", "finish_reason"])
            if row["sample"] == 0 and row["num_tokens"] is not None
        }
        for path in (untuned, aligned)
    ]
    timings = []
    for path in (untuned, aligned):
        manifest = storage.read_manifest(path)
        facts = manifest.facts
        settings = manifest.settings["parts"] if manifest.stage == "gather" else manifest.settings
        timings.append(efficiency.Timing(int(facts.get("decoded", 0)), facts.get("seconds_per_recot", 0.0), settings))
    return efficiency.measured((sides[0], sides[1]), (timings[0], timings[1]))


def _line(item: ShownItem) -> str:
    rated = "" if item["rating"] is None else f", rated {item['rating']:g}"
    return f"{item['title']} ({'liked' if item['label'] else 'not liked'}{rated})"


def _files(report: Report, compared: list[Table]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each file's stem and rows; what has no row gets no file."""
    for table in compared:
        yield table.name, [_effect(effect) for effect in table.effects]
    yield "figure5", [_point(curve, point) for curve in plots.curves(report) for point in curve.points]
    yield "tokens", [row.model_dump(include={"iteration", "mean_tokens", "cut"}) for row in plots.tokens(report)]
    yield "rankings", [row for found in report.rankings for row in _measures(found)]
    yield "hyperparameters", [row for found in report.rankings for row in _searched(found)]


def _effect(effect: Effect) -> dict[str, Any]:
    test, base, ours = effect.test, effect.base_interval or ("", ""), effect.ours_interval or ("", "")
    return {
        "model": effect.model,
        "slice": effect.slice,
        "metric": effect.metric,
        "base_name": effect.base_name,
        "ours_name": effect.ours_name,
        "base": effect.base,
        "ours": effect.ours,
        "difference": effect.difference,
        "outcome": effect.outcome,
        "mark": effect.mark,
        "seeds": test.seeds if test else None,
        "base_std": test.base_std if test else None,
        "ours_std": test.ours_std if test else None,
        # The difference's, over seeds; V has one of each side instead, over users.
        "low": test.low if test else None,
        "high": test.high if test else None,
        "p_value": test.p_value if test else None,
        "base_low": base[0],
        "base_high": base[1],
        "ours_low": ours[0],
        "ours_high": ours[1],
        "reason": effect.reason,
    }


def _point(curve: plots.Curve, point: plots.CurvePoint) -> dict[str, Any]:
    about = {"model": curve.model, "metric": curve.metric, "iteration": point.iteration}
    numbers = {"value": point.value, "low": point.low, "high": point.high}
    return about | numbers | {"spread": curve.spread, "base_name": curve.base_name, "base": curve.base}


def _arm(found: RankedBy) -> dict[str, Any]:
    ranking = found.ranking
    arm = {"variant": found.variant, "iteration": found.iteration}
    return arm | {"backbone": ranking.backbone, "feature": ranking.feature}


def _measures(found: RankedBy) -> Iterator[dict[str, Any]]:
    for result in found.ranking.seeds:
        for where, measures in result.slices.items():
            for metric in (*get_args(Metric), "ece"):
                about = {"seed": result.seed, "slice": where, "metric": metric}
                reason = measures.absent.get(metric, "")
                yield _arm(found) | about | {"value": getattr(measures, metric), "reason": reason}


def _searched(found: RankedBy) -> Iterator[dict[str, Any]]:
    for point in found.ranking.searched:
        yield _arm(found) | {"chosen": point == found.ranking.chosen} | point.model_dump()


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    rows = list(rows)
    if not rows:
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
