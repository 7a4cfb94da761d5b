"""What an evaluation found, as it lies in `metrics.json`. Needs no scikit-learn: `tabulate`'s image has none."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

METRICS_FILE = "metrics.json"

SliceName = Literal["overall", "warm", "cold", "long_tail"]
# Which RecCoTs V was given: the context's own, another user's, or none.
RecCots = Literal["own", "shuffled", "none"]


class Measures(BaseModel):
    """The metrics of one set of predictions on one slice; one that does not exist is null and `absent` says why."""

    model_config = ConfigDict(extra="forbid")

    rows: int
    positives: int
    users: int
    auc: float | None = None
    # The 95 % interval of `auc` by bootstrap over users.
    auc_low: float | None = None
    auc_high: float | None = None
    uauc: float | None = None
    # Users with both classes: those that `uauc` is the mean over.
    uauc_users: int = 0
    acc: float | None = None
    log_loss: float | None = None
    ece: float | None = None
    absent: dict[str, str] = {}


class Evaluation(BaseModel):
    """One `metrics.json`: V's metrics a slice, and the item-mean baseline's on the same rows."""

    model_config = ConfigDict(extra="forbid")

    split: str
    recots: RecCots
    # Mean length of the RecCoTs given to V, over the contexts evaluated; null without RecCoTs or token counts.
    mean_tokens: float | None
    # The share of these RecCoTs that was cut at the token limit; null without RecCoTs.
    cut: float | None
    validator: dict[SliceName, Measures]
    # Null on the train split, where the item mean would hold each row's own label.
    item_mean: dict[SliceName, Measures] | None


def read(directory: Path) -> Evaluation:
    return Evaluation.model_validate_json((Path(directory) / METRICS_FILE).read_text(encoding="utf-8"))


def write(directory: Path, evaluation: Evaluation) -> None:
    text = evaluation.model_dump_json(indent=2) + "\n"
    (Path(directory) / METRICS_FILE).write_text(text, encoding="utf-8")
