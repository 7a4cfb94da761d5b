import math

import pytest

from trackrec.config import Backbone
from trackrec.evaluation import plots, tables
from trackrec.evaluation.rankings import CalibrationBin, Feature, Point, Ranking, Roc, SeedResult
from trackrec.evaluation.report import Kind, RankedBy, Report, Row, Variant
from trackrec.evaluation.results import Measures
from trackrec.evaluation.tables import Effect, Table

# Differences of three seeds, and what a paired t-test over them says.
STRONG_GAIN = [0.0100, 0.0101, 0.0102]
GAIN = [0.010, 0.012, 0.014]
LOSS = [-0.010, -0.012, -0.014]
NOISE = [-0.010, 0.012, 0.001]


def ranked(
    backbone: Backbone,
    feature: Feature,
    aucs: list[float | None],
    *,
    iteration: int | None = None,
    variant: Variant = "full",
    log_losses: list[float] | None = None,
) -> RankedBy:
    """A ranking whose seeds have these overall AUCs; UAUC and ACC equal them, the long tail's is .01 lower."""
    seeds = []
    for seed, auc in enumerate(aucs):
        absent = {} if auc is not None else {"auc": "all rows have label 1", "uauc": "all rows have label 1"}
        loss = log_losses[seed] if log_losses else 0.6
        overall = Measures(rows=90, positives=40, users=9, auc=auc, uauc=auc, acc=auc, log_loss=loss, absent=absent)
        tail = overall.model_copy(update={"auc": None if auc is None else auc - 0.01, "rows": 20})
        slices = {"overall": overall, "warm": overall, "cold": overall, "long_tail": tail}
        seeds.append(SeedResult(seed=seed, epoch=2, valid_auc=0.7, slices=slices))
    points = [
        Point(embedding_size=16, batch_size=256, learning_rate=rate, dropout=0, l2=0, valid_auc=0.7 - rate)
        for rate in (0.001, 0.003)
    ]
    ranking = Ranking(
        backbone=backbone, feature=feature, split="test", long_tail_rows=10, warm_rows=3, rows=90,
        rows_hash="0", covered=dict.fromkeys(("train", "valid", "test"), 0 if feature == "none" else 0.5),
        recots={"train": 4, "valid": 2, "test": 3}, searched=points, chosen=points[0], seeds=seeds,
        roc=Roc(false_positive_rate=[0, 0.2, 1], true_positive_rate=[0, 0.7, 1], threshold=[1, 0.5, 0]),
        calibration=[CalibrationBin(rows=45, mean_score=score, liked=0.5) for score in (0.25, 0.75)],
    )  # fmt: skip
    return RankedBy(variant=variant, iteration=iteration, ranking=ranking)


def row(label: str, kind: Kind, iteration: int | None, auc: float, variant: Variant = "full", **given: float) -> Row:
    return Row(
        label=label, kind=kind, iteration=iteration, variant=variant, auc=auc, auc_low=auc - 0.02, auc_high=auc + 0.02,
        uauc=auc - 0.05, acc=auc - 0.1, log_loss=0.65, long_tail_auc=auc - 0.03, **given,
    )  # fmt: skip


def report(*rankings: RankedBy, rows: list[Row] | None = None) -> Report:
    return Report(split="test", examples=40, positives=21, users=9, rows=rows or [], rankings=list(rankings))


def against(differences: list[float], backbone: Backbone = "din", **ours: int) -> list[RankedBy]:
    """Base and ours, with these differences in AUC."""
    base = [0.70, 0.71, 0.72]
    gained: list[float | None] = [a + d for a, d in zip(base, differences, strict=True)]
    return [ranked(backbone, "none", [*base]), ranked(backbone, "recot", gained, iteration=ours.get("iteration", 3))]


ROWS = [
    row("item mean (baseline)", "baseline", None, 0.72),
    row("no RecCoT, zero-shot", "control", 0, 0.55),
    row("iteration 0", "iteration", 0, 0.60, mean_tokens=100.0, cut=0.1),
    row("iteration 1", "iteration", 1, 0.65, mean_tokens=80.0, cut=0.0),
    row("no RecCoT, tuned", "control", 1, 0.58),
    row("RecCoTs shuffled between users", "control", 1, 0.64),
]


def table(found: Report, name: str) -> Table:
    [match] = [t for t in tables.tables(found) if t.name == name]
    return match


def effect(found: Table, metric: str = "auc", model: str = "DIN") -> Effect:
    return next(e for e in found.effects if (e.metric, e.model) == (metric, model))


@pytest.mark.parametrize(
    ("differences", "mark", "outcome"),
    [(STRONG_GAIN, "*", "better"), (GAIN, "+", "better"), (LOSS, "−", "worse"), (NOISE, "", "not told apart")],
)
def test_marks(differences: list[float], mark: str, outcome: str) -> None:
    found = effect(table(report(*against(differences)), "table2"))
    assert (found.mark, found.outcome) == (mark, outcome)
    assert found.difference == pytest.approx(sum(differences) / 3)


def test_numbers_by_hand() -> None:
    found = effect(table(report(*against(GAIN)), "table2"))
    assert found.test is not None
    assert (found.base, found.ours, found.base_name, found.ours_name) == (
        pytest.approx(0.71), pytest.approx(0.722), "no RecCoT", "RecCoT, iteration 3",
    )  # fmt: skip
    assert (found.test.seeds, found.test.base_std) == (3, pytest.approx(0.01))
    # Differences .010, .012, .014: t = .012 / (.002 / √3), and with two degrees of freedom p = 1 - t / √(t² + 2).
    t = 0.012 / (0.002 / math.sqrt(3))
    assert found.test.p_value == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert tables.p_shown(found) == f"p = {found.test.p_value:.4f}" == "p = 0.0091"


@pytest.mark.parametrize(("losses", "mark"), [([0.58, 0.57, 0.56], "+"), ([0.62, 0.63, 0.64], "−")])
def test_a_lower_log_loss_is_better(losses: list[float], mark: str) -> None:
    base = ranked("din", "none", [0.7, 0.7, 0.7], log_losses=[0.6, 0.6, 0.6])
    ours = ranked("din", "recot", [0.7, 0.7, 0.7], iteration=1, log_losses=losses)
    found = effect(table(report(base, ours), "table2"), "log_loss")
    assert (found.mark, found.outcome) == (mark, "better" if mark == "+" else "worse")


def test_equal_arms_are_not_told_apart_and_equal_steps_not_tested() -> None:
    same, step = against([0, 0, 0]), against([0.01, 0.01, 0.01])
    assert effect(table(report(*same), "table2")).outcome == "not told apart"
    found = table(report(*step), "table2")
    assert effect(found).outcome == "not tested" and effect(found).mark == ""
    assert "every seed differs by exactly as much" in found.absences[0]


def test_verdicts_count_gains_losses_and_neither() -> None:
    found = report(*against(GAIN, "din"), *against(LOSS, "dcn"), *against(NOISE, "dien"), *against(GAIN, "autoint"))
    verdicts = table(found, "table2").verdicts
    assert verdicts[0] == (
        "With the RecCoT, AUC is higher on 2 of 4 backbones (AutoInt, DIN), lower on 1 (DCN), and not to be told apart "
        "on 1 (DIEN) (p < 0.05, paired t-test over 3 seeds)."
    )
    # All four models' LogLoss is the same .6.
    assert verdicts[3] == (
        "With the RecCoT, LogLoss (lower is better) is lower on 0 of 4 backbones, higher on 0, and not to be told "
        "apart on 4 (AutoInt, DCN, DIN, DIEN) (p < 0.05, paired t-test over 3 seeds)."
    )


def test_a_missing_metric_is_a_dash_with_its_reason() -> None:
    base = ranked("din", "none", [None, None, None])
    ours = ranked("din", "recot", [0.7, 0.71, 0.72], iteration=1)
    found = table(report(base, ours), "table2")
    assert (effect(found).base, effect(found).outcome) == (None, "not tested")
    assert tables.shown(effect(found).base) == "–" == tables.shown(effect(found).difference)
    assert found.absences[0].endswith("(against no RecCoT): all rows have label 1.")
    assert found.verdicts == [
        "With the RecCoT, DIN is better in none; worse in none; not to be told apart in LogLoss; not tested in AUC, "
        "UAUC, ACC (p < 0.05, paired t-test over 3 seeds)."
    ]


def test_seeds_without_the_metric_on_either_side_do_not_count() -> None:
    base = ranked("din", "none", [0.70, 0.70, None, 0.70])
    ours = ranked("din", "recot", [None, 0.71, 0.72, 0.73], iteration=1)
    found = effect(table(report(base, ours), "table2"))
    assert found.test is not None and found.test.seeds == 2
    assert (found.difference, found.reason) == (pytest.approx(0.02), "all rows have label 1")


def test_the_last_iteration_counts() -> None:
    found = report(*against(LOSS, iteration=0), against(GAIN, iteration=1)[1])
    assert effect(table(found, "table2")).ours_name == "RecCoT, iteration 1"
    gain = effect(table(found, "figure5_gain"))
    assert (gain.base_name, gain.difference) == ("iteration 0", pytest.approx(0.024))


def test_controls_say_whether_the_reasoning_adds() -> None:
    base = [0.70, 0.71, 0.72]
    found = report(
        *against(GAIN),
        ranked("din", "shuffled", [*base], iteration=3),
        ranked("din", "random", [a + 2 * d for a, d in zip(base, GAIN, strict=True)], iteration=3),
        ranked("din", "history", [*base], iteration=2),
    )
    controls = table(found, "controls")
    assert controls.verdicts == [
        "With its own RecCoT instead of RecCoTs shuffled between users, DIN is better in AUC, UAUC, ACC; worse in "
        "none; not to be told apart in LogLoss (p < 0.05, paired t-test over 3 seeds).",
        "With its own RecCoT instead of random vectors, DIN is better in none; worse in AUC, UAUC, ACC; not to be told "
        "apart in LogLoss (p < 0.05, paired t-test over 3 seeds).",
    ]


def test_table_4_has_both_slices_and_names_the_threshold() -> None:
    found = table(report(*against(GAIN), rows=ROWS), "table4")
    assert [(e.model, e.slice, e.base) for e in found.effects] == [
        ("DIN", "overall", pytest.approx(0.71)),
        ("DIN", "long_tail", pytest.approx(0.70)),
        ("V as recommender", "overall", 0.58),
        ("V as recommender", "long_tail", pytest.approx(0.55)),
    ]
    assert "at most 10 train rows (20 of the ranking models' 90)" in found.about
    assert found.effects[3].base_interval is None  # it is of all rows


def test_validator_is_held_against_the_tuned_one_without_a_test() -> None:
    found = table(report(rows=ROWS), "table2")
    assert found.verdicts == [
        "With the RecCoT, V's AUC is 0.6500 [0.630, 0.670] (iteration 1) against 0.5800 [0.560, 0.600] (no RecCoT, "
        "tuned): the 95 % intervals over users do not overlap. One model a side, so no test."
    ]
    assert {e.outcome for e in found.effects} == {"not tested"}
    untuned = [r for r in ROWS if r.label != "no RecCoT, tuned"]
    assert effect(table(report(rows=untuned), "table2"), model=tables.VALIDATOR).base_name == "no RecCoT, zero-shot"
    shuffled = table(report(rows=ROWS), "controls")
    assert "overlap, so noise may explain it" in shuffled.verdicts[0]


def test_ablations_are_there_when_their_runs_are() -> None:
    found = report(*against(GAIN), rows=ROWS)
    assert not {"table6", "table7", "iteration"} & {t.name for t in tables.tables(found)}
    found.rankings.append(ranked("din", "recot", [0.70, 0.71, 0.72], iteration=0, variant="no alignment"))
    found.rankings.append(ranked("din", "recot", [0.69, 0.70, 0.71], iteration=1))
    found.rows.append(row("iteration 1, no distillation", "iteration", 1, 0.66, "no distillation"))
    # Table 6 aligns once: its gain is iteration 1's, not that of the last.
    aligned = effect(table(found, "table6"))
    assert (aligned.base_name, aligned.ours_name) == ("no alignment, iteration 0", "RecCoT, iteration 1")
    assert aligned.difference == pytest.approx(-0.01)
    iterated = effect(table(found, "iteration"))
    assert (iterated.base_name, iterated.ours_name) == ("full, iteration 1", "RecCoT, iteration 3")
    assert iterated.outcome == "better"
    [verdict] = table(found, "table7").verdicts
    assert verdict.startswith("With distillation, V's AUC is 0.6500 [0.630, 0.670] (iteration 1) against 0.6600")


def test_multiplicity_counts_each_test_once() -> None:
    # Four metrics in Table 2, of which LogLoss has no spread and so no test, and AUC on the long tail.
    text = tables.multiplicity(tables.tables(report(*against(GAIN))))
    assert text.startswith("4 tests were made") and "about 0.2 would have p < 0.05" in text and "4 have it" in text
    assert tables.multiplicity([]).startswith("0 tests were made")


def test_figure_5() -> None:
    found = report(*against(LOSS, iteration=0), against(GAIN, iteration=1)[1], *against(GAIN, "dcn"), rows=ROWS)
    curves = plots.curves(found)
    assert [(c.model, c.metric) for c in curves] == [
        ("V as recommender", "auc"), ("V as recommender", "acc"), ("DIN", "auc"), ("DIN", "acc"),
    ]  # fmt: skip
    of_v, of_din = curves[0], curves[2]
    assert (of_v.base, of_v.base_name, of_v.points[1].low) == (0.58, "no RecCoT, tuned", 0.63)
    assert [(p.iteration, p.value) for p in of_din.points] == [(0, pytest.approx(0.698)), (1, pytest.approx(0.722))]
    # Seeds .710, .722, .734: their standard deviation is .012.
    assert (of_din.points[1].low, of_din.base) == (pytest.approx(0.71), pytest.approx(0.71))


def test_tokens() -> None:
    assert [(r.iteration, r.mean_tokens) for r in plots.tokens(report(rows=ROWS))] == [(0, 100), (1, 80)]
    assert plots.tokens_verdict(ROWS[2:4]) == (
        "RecCoTs get shorter: 80.0 tokens at iteration 1, 100.0 at iteration 0, as in the paper."
    )
    longer = plots.tokens_verdict([ROWS[3], ROWS[2]])
    assert longer.startswith("RecCoTs do not get shorter") and "the paper has shorter ones" in longer
    assert plots.tokens_verdict(ROWS[2:3]) == "RecCoTs have 100.0 tokens at iteration 0."
