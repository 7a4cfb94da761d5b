"""What CTR training found, as it lies in `metrics.json` of `train_ctr`. Needs no torch and no scikit-learn."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from trackrec.config import Backbone, Split
from trackrec.evaluation.results import METRICS_FILE, Measures, SliceName

# What the model reads beside the ids: nothing, the RecCoTs' vectors, or a control's in their place: of RecCoTs of other
# users, random numbers, or the raw history's text under the same encoder.
Feature = Literal["none", "recot", "shuffled", "random", "history"]


class Point(BaseModel):
    """A point of the grid, and the valid AUC it reached in the search."""

    model_config = ConfigDict(extra="forbid")

    embedding_size: int
    batch_size: int
    learning_rate: float
    dropout: float
    l2: float
    valid_auc: float


class SeedResult(BaseModel):
    """One trained model, on the split that is measured."""

    model_config = ConfigDict(extra="forbid")

    seed: int
    # The epoch with the best valid AUC: the model is that epoch's.
    epoch: int
    valid_auc: float
    slices: dict[SliceName, Measures]


class Roc(BaseModel):
    """The ROC curve of the seeds' mean score, at so many points that it can be drawn."""

    model_config = ConfigDict(extra="forbid")

    false_positive_rate: list[float]
    true_positive_rate: list[float]
    threshold: list[float]


class CalibrationBin(BaseModel):
    """Rows whose mean score over the seeds falls into one equal-width bin."""

    model_config = ConfigDict(extra="forbid")

    rows: int
    mean_score: float
    liked: float


class Ranking(BaseModel):
    """One backbone, with or without the feature: the search, and the models of all seeds at the chosen point."""

    model_config = ConfigDict(extra="forbid")

    backbone: Backbone
    feature: Feature
    split: str
    # A user or an item with at most so many train rows is of the long tail; with more than `warm_rows` each, warm.
    long_tail_rows: int
    warm_rows: int
    rows: int
    # Of the rows' ids and labels: two rankings are comparable where it is equal.
    rows_hash: str
    # The share of each split's rows that has a RecCoT older than itself; the others read the learned missing vector.
    covered: dict[Split, float]
    # How many RecCoTs the rows of each split read.
    recots: dict[Split, int]
    searched: list[Point]
    chosen: Point
    seeds: list[SeedResult]
    roc: Roc | None
    calibration: list[CalibrationBin]


def read(directory: Path) -> Ranking:
    return Ranking.model_validate_json((Path(directory) / METRICS_FILE).read_text(encoding="utf-8"))


def write(directory: Path, ranking: Ranking) -> None:
    (Path(directory) / METRICS_FILE).write_text(ranking.model_dump_json(indent=2) + "\n", encoding="utf-8")
