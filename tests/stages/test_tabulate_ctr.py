"""`tabulate_ctr`: rankers join the run's results."""

from pathlib import Path

import pytest

from tests.stages.ranking_inputs import ROWS, inputs, trained
from trackrec.evaluation import report as reports
from trackrec.stages import tabulate_ctr


def test_arms_join_the_report_and_equal_ones_once(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    base, ours = (trained(tmp_path, given, feature=feature) / "metrics" for feature in ("none", "recot"))
    first, second = tmp_path / "first", tmp_path / "second"
    tabulate_ctr.run(variant="full", iteration=2, found=[base, ours], report=first)
    tabulate_ctr.run(variant="no distillation", iteration=3, found=[base, ours], previous=first, report=second)
    found = [(one.variant, one.iteration, one.ranking.feature) for one in reports.read(second).rankings]
    # A ranker without RecCoTs is of no loop, so it counts for both.
    assert found == [("full", None, "none"), ("full", 2, "recot"), ("no distillation", 3, "recot")]
    assert reports.read(first).rows == []


def test_another_result_of_the_same_arm_is_refused(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    one, other = (trained(tmp_path, given, feature="none", seed=seed) / "metrics" for seed in (1, 2))
    with pytest.raises(ValueError, match="another result of deepfm none full None"):
        tabulate_ctr.run(variant="full", iteration=0, found=[one, other], report=tmp_path / "out")


def test_results_on_other_rows_are_refused(tmp_path: Path) -> None:
    one = trained(tmp_path / "a", inputs(tmp_path / "a"), feature="none") / "metrics"
    fewer = inputs(tmp_path / "b", interactions=ROWS["interactions"][:-2])
    other = trained(tmp_path / "b", fewer, feature="none", backbone="dcn") / "metrics"
    with pytest.raises(ValueError, match="dcn is measured on 23 rows of split 'test', which are not the 24 of 'test'"):
        tabulate_ctr.run(variant="full", iteration=0, found=[one, other], report=tmp_path / "out")
    # As many rows with other labels are others, too.
    turned = [row | {"label": 1 - row["label"]} for row in ROWS["interactions"]]
    other = (
        trained(tmp_path / "c", inputs(tmp_path / "c", interactions=turned), feature="none", backbone="dcn") / "metrics"
    )
    with pytest.raises(ValueError, match="which are not the 24"):
        tabulate_ctr.run(variant="full", iteration=0, found=[one, other], report=tmp_path / "out")
