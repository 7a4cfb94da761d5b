"""What shards do to the plan of a stage."""

import pytest

from tests.planning.test_estimate import LENGTHS, ML_1M, SEVEN, SIZES
from trackrec import config_file
from trackrec.planning import estimate
from trackrec.planning.rates import Rates


def planned(shards: int) -> estimate.Estimate:
    config = config_file.load(ML_1M, {"resources.sample.shards": shards}, profile="gke-a100")
    # Pods that start at once.
    rates = Rates.model_validate({"lengths": LENGTHS, "start_seconds": 1e-9})
    [found] = [one for one in estimate.of_run(config, rates, SEVEN, SIZES) if one.work.stage == "sample"]
    return found


def test_four_shards_take_a_quarter_of_the_time_on_four_gpus() -> None:
    one, four = planned(1), planned(4)
    assert (one.gpus, four.gpus) == (1, 4)
    assert one.wall_hours and four.wall_hours == pytest.approx(one.wall_hours / 4)
    assert (four.gpu_hours, four.usd) == pytest.approx((one.gpu_hours, one.usd))
    assert (four.gpu_bytes, four.room_bytes) == (one.gpu_bytes, one.room_bytes)
