"""Logs of experiments for tests: written as Parquet, or as the sums of users at once."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trackrec.abtest.moments import Moments, Ratio

REVENUE, CVR = Ratio(3, 0), Ratio(2, 1)
BEFORE = 4


def users(
    random: np.random.Generator, count: int, *, conversion: float = 0.1, worth: float = 1.0
) -> NDArray[np.float64]:
    """[users, (one, clicks, conversions, revenue, before)]: users differ in all, and `before` tells some of it."""
    active = random.gamma(2.0, 1.0, count)
    clicks = 1 + random.poisson(3 * active)
    # Users convert unlike one another: their clicks are no independent draws.
    conversions = random.binomial(clicks, np.minimum(conversion * 3 * random.beta(1, 2, count), 1))
    revenue = conversions * random.gamma(2.0, worth * (0.5 + active), count)
    return np.column_stack([np.ones(count), clicks, conversions, revenue, active + random.normal(0, 0.5, count)])


def moments(given: NDArray[np.float64], batch: int = 1000) -> Moments:
    found = Moments(given.shape[1])
    for start in range(0, len(given), batch):
        found.add(given[start : start + batch])
    return found


def write(path: Path, rows: list[dict[str, Any]] | dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows) if isinstance(rows, list) else pa.table(rows)
    pq.write_table(table, path)
    return path


def impressions(random: np.random.Generator, count: int, **columns: Any) -> dict[str, Any]:
    """Columns of a log of about three rows a user, a row an impression; `columns` go over them."""
    user = np.repeat(np.arange(count), 1 + random.poisson(2, count))
    rows = len(user)
    clicks = random.integers(0, 2, rows)
    conversions = clicks * (random.random(rows) < 0.4)
    made = {
        "user_id": [f"user-{one}" for one in user],
        "bucket": [("control", "treatment")[one % 2] for one in user],
        "clicks": clicks,
        "conversions": conversions,
        # Quarters: sums of these are exact in any order.
        "revenue": conversions * random.integers(1, 40, rows) / 4,
        "item_id": [f"item-{one}" for one in random.integers(0, 9, rows) * random.integers(0, 9, rows)],
        "before": (user * 7 % 11).astype(float),
    }
    return made | columns
