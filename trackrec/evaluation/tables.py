"""The paper's tables from a run's report: each is a list of effects, tested over seeds where there are seeds, in words.

Marks: `*` better with p < 0.001 (the paper's), `+` better with p < 0.05, `−` worse with p < 0.05.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean
from typing import Literal, TypeVar, get_args

from trackrec.config import Backbone
from trackrec.evaluation.arms import Metric, arm_of, labelled, recots_of, seed_values, validators_of
from trackrec.evaluation.rankings import Feature, Ranking
from trackrec.evaluation.report import ABSENT, RankedBy, Report, Row, Variant
from trackrec.evaluation.results import SliceName
from trackrec.evaluation.significance import Comparison, compare

T = TypeVar("T")
Outcome = Literal["better", "worse", "not told apart", "not tested"]
Interval = tuple[float, float]

METRICS: dict[Metric, str] = {"auc": "AUC", "uauc": "UAUC", "acc": "ACC", "log_loss": "LogLoss"}
BACKBONES: dict[Backbone, str] = {
    "autoint": "AutoInt", "deepfm": "DeepFM", "fignn": "FiGNN", "fibinet": "FiBiNet", "dcn": "DCN", "din": "DIN",
    "dien": "DIEN",
}  # fmt: skip
SLICES: dict[SliceName, str] = {
    "overall": "on all rows", "warm": "on warm rows", "cold": "on cold rows", "long_tail": "on the long tail",
}  # fmt: skip
# What the paper's Figure 5 and Tables 6 and 7 show.
SHORT: tuple[Metric, ...] = ("auc", "acc")
VALIDATOR = "V as recommender"
# The report's rows as the pipeline labels them; the first one that is there is V's base.
UNTOLD = ("no RecCoT, tuned", "no RecCoT, zero-shot")
SHUFFLED = "RecCoTs shuffled between users"
CONTROLS: dict[Feature, str] = {
    "shuffled": SHUFFLED, "random": "random vectors", "history": "the raw history's text",
}  # fmt: skip

STRONG, SIGNIFICANT = 0.001, 0.05


@dataclass(frozen=True)
class Effect:
    """One metric of one model, without (`base`) and with (`ours`) what the table is about."""

    model: str
    base_name: str
    ours_name: str
    slice: SliceName
    metric: Metric
    # Means over the seeds; V's is one model's.
    base: float | None
    ours: float | None
    test: Comparison | None = None
    # 95 %, over users: V's AUC has them.
    base_interval: Interval | None = None
    ours_interval: Interval | None = None
    # Why a number or the test is not there, or is of fewer seeds.
    reason: str = ""

    @property
    def outcome(self) -> Outcome:
        if self.test is None:
            return "not tested"
        if self.test.p_value is None:  # every seed differs by as much, so there is no spread to test against
            return "not tested" if self.test.difference else "not told apart"
        if self.test.p_value >= SIGNIFICANT:
            return "not told apart"
        # LogLoss is better where it is lower.
        return "better" if (self.test.difference < 0) == (self.metric == "log_loss") else "worse"

    @property
    def mark(self) -> str:
        if self.outcome == "better":
            return "*" if self.test and self.test.p_value is not None and self.test.p_value < STRONG else "+"
        return "−" if self.outcome == "worse" else ""

    @property
    def difference(self) -> float | None:
        return None if self.base is None or self.ours is None else self.ours - self.base


@dataclass(frozen=True)
class Table:
    """Effects in reading order. `name` is its file's stem; `subject` begins its verdicts."""

    name: str
    title: str
    about: str
    subject: str
    effects: tuple[Effect, ...]

    @property
    def metrics(self) -> list[Metric]:
        return [effect.metric for effect in self.lines[0]]

    @property
    def lines(self) -> list[list[Effect]]:
        """One line a model and comparison; its effects in the order of `metrics`."""
        return [list(line) for _, line in groupby(self.effects, lambda e: (e.model, e.base_name, e.slice))]

    @property
    def verdicts(self) -> list[str]:
        """Sentences from the numbers: what is better, worse and not to be told apart, each as plainly."""
        groups: dict[tuple[str, str, SliceName], list[Effect]] = {}
        for effect in self.effects:
            if effect.model != VALIDATOR:
                groups.setdefault((effect.base_name, effect.ours_name, effect.slice), []).append(effect)
        found = []
        for group in groups.values():
            if len({effect.model for effect in group}) == 1:
                said = [_of_one(group)]
            else:
                said = [_counted([effect for effect in group if effect.metric == metric]) for metric in self.metrics]
            found += [f"{self._subject(group[0])}, {sentence}" for sentence in said]
        alone = [effect for effect in self.effects if effect.model == VALIDATOR and effect.metric == "auc"]
        return found + [f"{self._subject(effect)}, {_of_validator(effect)}" for effect in alone]

    def _subject(self, effect: Effect) -> str:
        return self.subject.format(base=effect.base_name, slice=SLICES[effect.slice])

    @property
    def absences(self) -> list[str]:
        """Why numbers are missing, each reason once with those it is true of."""
        found: dict[str, list[str]] = {}
        for effect in self.effects:
            if effect.reason:
                what = f"{METRICS[effect.metric]} of {effect.model} {SLICES[effect.slice]} (against {effect.base_name})"
                found.setdefault(effect.reason, []).append(what)
        return [f"{', '.join(whose)}: {reason}." for reason, whose in found.items()]


def tables(report: Report) -> list[Table]:
    """All tables that have anything to show."""
    ours = "ours: with the RecCoTs of the last iteration's G"
    ranked = next((found.ranking for found in report.rankings), None)
    limit = ranked.long_tail_rows if ranked else "`evaluate.long_tail_rows`"
    found = [
        Table(
            "table2",
            "Table 2: the RecCoT in every model",
            f"Base: without a RecCoT; {ours}."
            + (
                f" V is an LLM, one model each, on the {report.examples} examples; its interval is over users."
                if report.rows
                else ""
            ),
            "With the RecCoT",
            (*_against_base(report, list(METRICS), "overall"), *_validator(report, UNTOLD, list(METRICS))),
        ),
        Table(
            "controls",
            "Controls: is it the reasoning?",
            f"Base: the same model, given something else in the RecCoT's place; {ours}. Where ours is not better, the "
            "gain of Table 2 is no evidence that what the RecCoT says about this user matters. A control is drawn once "
            "for all seeds: the tests do not know the chance in that draw.",
            "With its own RecCoT instead of {base}",
            (*_against_controls(report), *_validator(report, [SHUFFLED], list(METRICS))),
        ),
        Table(
            "table4",
            "Table 4: the long tail",
            f"AUC on all rows and on those whose user or item has at most {limit} train rows"
            + (f" ({_rows(ranked, 'long_tail')} of the ranking models' {_rows(ranked, 'overall')})" if ranked else "")
            + f". Base: without a RecCoT; {ours}.",
            "With the RecCoT, {slice}",
            (
                *_against_base(report, ["auc"], "overall"),
                *_against_base(report, ["auc"], "long_tail"),
                *_validator(report, UNTOLD, ["auc"]),
                *_validator(report, UNTOLD, ["auc"], "long_tail"),
            ),
        ),
        Table(
            "figure5_gain",
            "Figure 5: the last iteration against the first",
            "Base: with the RecCoTs of the first iteration there is (0: before any alignment); ours: of the last. "
            "Bars: V's 95 % interval over users; a CTR model's standard deviation over the seeds.",
            "From {base} to the last",
            (*_over_iterations(report),),
        ),
        # The paper aligns once (4.4.1): the first iteration is what its absence is compared with.
        _ablation(report, "no alignment", "table6", "Table 6: preference alignment", "With alignment", ours_at=1),
        _ablation(report, "no distillation", "table7", "Table 7: distillation", "With distillation"),
        _ablation(report, "full", "iteration", "Iterating against one iteration", "With iterations", base_at=1),
    ]
    return [table for table in found if table.effects]


def multiplicity(found: Iterable[Table]) -> str:
    """What so many tests mean for a reader who looks for marks."""
    # Table 4's overall rows are Table 2's.
    tested = {e for table in found for e in table.effects if e.test is not None and e.test.p_value is not None}
    below = sum(effect.outcome in ("better", "worse") for effect in tested)
    return (
        f"{len(tested)} tests were made, not corrected for their number: were there no effect anywhere, about "
        f"{len(tested) * SIGNIFICANT:.1f} would have p < {SIGNIFICANT} by chance, half of these as gains; {below} have "
        "it. A test over few seeds knows the noise of training only, not that of the users and the split."
    )


def pairs(report: Report) -> list[tuple[RankedBy, RankedBy]]:
    """(base, ours) of every backbone that has both: without a RecCoT, and with those of the last iteration."""
    arms = [(arm_of(report, name, "none"), recots_of(report, name, "full")) for name in get_args(Backbone)]
    return [(base, full[max(full)]) for base, full in arms if base and full]


def shown(value: float | None, form: str = ".4f") -> str:
    return ABSENT if value is None else format(value, form)


def p_shown(effect: Effect) -> str:
    if effect.test is None or effect.test.p_value is None:
        return ABSENT
    return f"p < {STRONG}" if effect.test.p_value < STRONG else f"p = {effect.test.p_value:.4f}"


def _against_base(report: Report, metrics: list[Metric], where: SliceName) -> Iterator[Effect]:
    for base, ours in pairs(report):
        yield from (_tested(base, ours, "no RecCoT", metric, where) for metric in metrics)


def _against_controls(report: Report) -> Iterator[Effect]:
    for feature, name in CONTROLS.items():
        for backbone in get_args(Backbone):
            full = recots_of(report, backbone, "full")
            control = arm_of(report, backbone, feature, max(full)) if full else None
            if control:
                yield from (_tested(control, full[max(full)], name, metric) for metric in METRICS)


def _over_iterations(report: Report) -> Iterator[Effect]:
    for backbone in get_args(Backbone):
        full = recots_of(report, backbone, "full")
        if len(full) > 1:
            first, last = full[min(full)], full[max(full)]
            yield from (_tested(first, last, f"iteration {first.iteration}", metric) for metric in SHORT)
    rows = validators_of(report, "full")
    if len(rows) > 1:
        yield from (_untested(rows[min(rows)], rows[max(rows)], metric) for metric in SHORT)


def _ablation(
    report: Report,
    variant: Variant,
    name: str,
    title: str,
    subject: str,
    *,
    base_at: int | None = None,
    ours_at: int | None = None,
) -> Table:
    """The loop of `variant` against the full one, each at the given iteration, by default the last."""
    effects: list[Effect] = []
    for backbone in get_args(Backbone):
        base = _at(recots_of(report, backbone, variant), base_at)
        ours = _at(recots_of(report, backbone, "full"), ours_at)
        if base and ours and base != ours:
            effects += [_tested(base, ours, f"{variant}, iteration {base.iteration}", metric) for metric in SHORT]
    without, full = _at(validators_of(report, variant), base_at), _at(validators_of(report, "full"), ours_at)
    if without and full and without != full:
        effects += [_untested(without, full, metric) for metric in SHORT]
    stopped = "the loop stopped after one iteration"
    about = f"Base: {stopped if base_at else variant}; ours: {stopped if ours_at else 'the full loop'}."
    return Table(name, title, about, subject, tuple(effects))


def _rows(ranked: Ranking, where: SliceName) -> int:
    return ranked.seeds[0].slices[where].rows


def _at(found: Mapping[int, T], iteration: int | None) -> T | None:
    return found.get(max(found, default=0) if iteration is None else iteration)


def _validator(
    report: Report, labels: Iterable[str], metrics: list[Metric], where: SliceName = "overall"
) -> Iterator[Effect]:
    base, rows = labelled(report, labels), validators_of(report, "full")
    if base and rows:
        yield from (_untested(base, rows[max(rows)], metric, where) for metric in metrics)


def _tested(base: RankedBy, ours: RankedBy, base_name: str, metric: Metric, where: SliceName = "overall") -> Effect:
    """Over the seeds for which both sides have the metric."""
    before, after = seed_values(base, where, metric), seed_values(ours, where, metric)
    seeds = sorted(before.keys() & after.keys())
    test = compare([before[seed] for seed in seeds], [after[seed] for seed in seeds]) if len(seeds) > 1 else None
    spread = "" if test and test.p_value is not None else "no test, as every seed differs by exactly as much"
    untested = spread if test else "no test, as fewer than two seeds are on both sides"
    return Effect(
        model=BACKBONES[ours.ranking.backbone],
        base_name=base_name,
        ours_name=f"RecCoT, iteration {ours.iteration}",
        slice=where,
        metric=metric,
        base=test.base if test else fmean(before.values()) if before else None,
        ours=test.ours if test else fmean(after.values()) if after else None,
        test=test,
        reason=_reason(base, where, metric) or _reason(ours, where, metric) or untested,
    )


def _untested(base: Row, ours: Row, metric: Metric, where: SliceName = "overall") -> Effect:
    """V's: one model a side."""
    field = "long_tail_auc" if where == "long_tail" else metric
    values = getattr(base, field), getattr(ours, field)

    def interval(row: Row) -> Interval | None:
        return None if field != "auc" or row.auc_low is None or row.auc_high is None else (row.auc_low, row.auc_high)

    return Effect(
        model=VALIDATOR,
        base_name=base.label,
        ours_name=ours.label,
        slice=where,
        metric=metric,
        base=values[0],
        ours=values[1],
        base_interval=interval(base),
        ours_interval=interval(ours),
        reason="not defined on these rows (the evaluation's metrics.json says why)" if None in values else "",
    )


def _reason(found: RankedBy, where: SliceName, metric: Metric) -> str:
    """Why a seed lacks the metric; empty where none does."""
    for result in found.ranking.seeds:
        measures = result.slices.get(where)
        if measures is None or getattr(measures, metric) is None:
            return measures.absent.get(metric, "not measured") if measures else "not measured"
    return ""


def _counted(group: list[Effect]) -> str:
    """On how many backbones one metric gains, loses and does neither."""
    metric = group[0].metric
    higher, lower = ("lower", "higher") if metric == "log_loss" else ("higher", "lower")

    def some(outcome: Outcome, of: str = "") -> str:
        models = [effect.model for effect in group if effect.outcome == outcome]
        return f"{len(models)}{of}" + (f" ({', '.join(models)})" if models else "")

    untested = "" if some("not tested") == "0" else f"; not tested on {some('not tested')}"
    return (
        f"{METRICS[metric]}{' (lower is better)' * (metric == 'log_loss')} is {higher} on "
        f"{some('better', f' of {len(group)} backbones')}, {lower} on {some('worse')}, and not to be told apart on "
        f"{some('not told apart')}{untested} ({_test_of(group)})."
    )


def _of_one(group: list[Effect]) -> str:
    """In which metrics one backbone gains, loses and does neither."""

    def some(outcome: Outcome) -> str:
        return ", ".join(METRICS[effect.metric] for effect in group if effect.outcome == outcome) or "none"

    untested = "" if some("not tested") == "none" else f"; not tested in {some('not tested')}"
    return (
        f"{group[0].model} is better in {some('better')}; worse in {some('worse')}; not to be told apart in "
        f"{some('not told apart')}{untested} ({_test_of(group)})."
    )


def _test_of(group: list[Effect]) -> str:
    seeds = sorted({effect.test.seeds for effect in group if effect.test})
    return f"p < {SIGNIFICANT}, paired t-test over {' or '.join(map(str, seeds))} seeds" if seeds else "no test"


def _of_validator(effect: Effect) -> str:
    def number(value: float | None, interval: Interval | None) -> str:
        return shown(value) + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")

    text = (
        f"V's AUC is {number(effect.ours, effect.ours_interval)} ({effect.ours_name}) against "
        f"{number(effect.base, effect.base_interval)} ({effect.base_name})"
    )
    if effect.base_interval and effect.ours_interval:
        apart = effect.base_interval[1] < effect.ours_interval[0] or effect.ours_interval[1] < effect.base_interval[0]
        text += ": the 95 % intervals over users " + ("do not overlap" if apart else "overlap, so noise may explain it")
    return f"{text}. One model a side, so no test."
