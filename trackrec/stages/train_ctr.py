"""One CTR backbone with or without the RecCoT as a field, and its metrics over several seeds (paper 3.6, eq. 8)."""

import hashlib
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import torch
from pydantic import BaseModel
from sklearn.metrics import roc_curve

from trackrec import seeds, storage
from trackrec.config import Backbone, Split, TrainCtrSettings
from trackrec.ctr import protocol, ranker, vectors
from trackrec.ctr.embedding import NONE
from trackrec.ctr.features import Dataset, dataset, recot_of_rows
from trackrec.data import schema
from trackrec.evaluation import metrics as measures
from trackrec.evaluation import rankings
from trackrec.evaluation.rankings import CalibrationBin, Feature, Ranking, Roc, SeedResult
from trackrec.progress import track

# Points a ROC curve is drawn with.
_ROC_POINTS = 101


class _Arm(BaseModel):
    """What the stage's manifest names as its settings."""

    train_ctr: TrainCtrSettings
    backbone: Backbone
    feature: Feature


def run(
    settings: TrainCtrSettings,
    *,
    backbone: str,
    feature: str,
    seed: int,
    interactions: Path,
    items: Path,
    examples: Path,
    contexts: Path,
    encoded: Path | None,
    trained: Path,
    predictions: Path,
    metrics: Path,
) -> None:
    """Writes the ranker (`trackrec.ctr.ranker`), table `ranked` and `metrics.json` (`trackrec.evaluation.rankings`).

    A row reads the RecCoT of its own context, else its user's newest strictly older one; a row without one reads the
    learned missing vector (`covered` in the metrics says how many have one). Ids that the train split lacks share one
    embedding.

    Args:
        backbone: one of `trackrec.config.Backbone`.
        feature: one of `Feature`; which of the controls, or the RecCoT itself, `encoded` is used as.
        encoded: table `vectors`; none for the feature "none", and only for it. For "history", those of the histories.

    Facts: mean over the seeds of `auc`, `uauc`, `acc`, `log_loss`, `ece`; `rows`, `covered`, `seeds`, `points` of the
    grid, `train_rows`.

    Raises:
        ValueError: unknown backbone or feature, feature and `encoded` contradict, a split is empty or lacks a class;
            VectorError: the vectors are not what the config says.
    """
    arm = _Arm.model_validate({"train_ctr": settings, "backbone": backbone, "feature": feature})
    if (encoded is None) != (arm.feature == "none"):
        raise ValueError(f"feature {feature!r} {'needs' if encoded is None else 'takes no'} table `vectors`")
    inputs = {"interactions": interactions, "items": items, "examples": examples, "contexts": contexts}
    if encoded is not None:
        inputs["vectors"] = encoded
    outputs = {"trained": trained, "predictions": predictions, "metrics": metrics}
    with storage.publish("train_ctr", arm, inputs=inputs, outputs=outputs, seed=seed) as job:
        data = _data(settings, arm.feature, seed, interactions, items, examples, contexts, encoded)
        measured = data.of_split(protocol.MEASURED)
        if not len(measured):
            raise ValueError(f"{interactions} has no row in split {protocol.MEASURED!r}")
        with track(range(settings.epochs), f"Train {backbone}", unit="epoch") as bar:

            def progress(what: str, epoch: int) -> None:
                bar.set_description(f"Train {backbone} ({what})")
                bar.n = epoch
                bar.update(0)

            found = protocol.run(data, arm.backbone, settings, seed, progress)

        ranking = _measured(settings, arm, data, found)
        rankings.write(job.outputs["metrics"], ranking)
        config = ranker.RankerConfig(
            backbone=arm.backbone,
            embedding_size=found.chosen.embedding_size,
            hidden=tuple(settings.hidden),
            history_length=settings.history_length,
            vocabulary=data.vocabulary,
            names=data.names,
            seeds=tuple(model.hyper.seed for model in found.models),
        )
        ranker.save(job.outputs["trained"], config, [model.weights for model in found.models])
        row_ids = data.row_id[measured.numpy()]
        table = pa.concat_tables(
            pa.table({"row_id": row_ids, "seed": np.full(len(row_ids), model.hyper.seed), "score": model.scores})
            for model in found.models
        )
        schema.write(job.outputs["predictions"], "ranked", table)
        job.facts |= {
            "rows": ranking.rows,
            "covered": round(ranking.covered["test"], 4),
            "seeds": len(found.models),
            "points": len(found.searched),
            "train_rows": len(data.of_split("train")),
            **_means(ranking),
        }


def _data(
    settings: TrainCtrSettings,
    feature: Feature,
    seed: int,
    interactions: Path,
    items: Path,
    examples: Path,
    contexts: Path,
    encoded: Path | None,
) -> Dataset:
    rows = schema.read(interactions, "interactions")
    recot, table = np.full(len(rows), NONE), torch.zeros(1, 0)
    if encoded is not None:
        judged = schema.read(examples, "examples", ["row_id", "context_id", "user_id"])
        shown = schema.read(contexts, "contexts", ["context_id", "user_id", "as_of"])
        names, table = vectors.of_table(schema.read(encoded, "vectors"), settings.vector_width)
        unknown = set(names) - set(shown["context_id"].to_pylist())
        if unknown:
            raise vectors.VectorError(
                f"{len(unknown)} of {len(names)} vectors are of contexts that {contexts} lacks (first: "
                f"{min(unknown)}); encode the RecCoTs of these contexts"
            )
        recot = recot_of_rows(rows, judged, shown, names)
        if feature == "random":
            table = vectors.random_in_place_of(table, seeds.derive(seed, "random vectors"))
        elif feature == "shuffled":
            owners = _owners(judged, shown)
            table = vectors.shuffled_between_users(names, table, owners, seeds.derive(seed, "shuffle"))
    catalogue = schema.read(items, "items")
    return dataset(
        rows,
        catalogue,
        history_length=settings.history_length,
        min_rows=settings.min_rows,
        recot=recot,
        vectors=table,
        max_train_rows=settings.max_train_rows,
    )


def _owners(examples: pa.Table, contexts: pa.Table) -> dict[str, frozenset[str]]:
    """The users who ever have a context's history."""
    owners: dict[str, set[str]] = {}
    for table in (contexts, examples):
        for name, user in zip(table["context_id"].to_pylist(), table["user_id"].to_pylist(), strict=True):
            owners.setdefault(name, set()).add(user)
    return {name: frozenset(users) for name, users in owners.items()}


def _measured(settings: TrainCtrSettings, arm: _Arm, data: Dataset, found: protocol.Found) -> Ranking:
    rows = data.of_split(protocol.MEASURED).numpy()
    labels, users = data.labels.numpy()[rows], data.users[rows]
    masks = measures.slices(data.user_train_rows[rows], data.item_train_rows[rows], settings)

    def of_seed(scores: np.ndarray) -> dict[rankings.SliceName, rankings.Measures]:
        return {
            name: measures.measure(
                labels[mask], scores[mask], users[mask], bins=settings.calibration_bins, interval=False
            )
            for name, mask in masks.items()
        }

    mean = np.mean([model.scores for model in found.models], axis=0)
    splits: tuple[Split, ...] = get_args(Split)
    reads = {split: data.rows.recot[data.of_split(split)].numpy() for split in splits}
    return Ranking(
        backbone=arm.backbone,
        feature=arm.feature,
        split=protocol.MEASURED,
        long_tail_rows=settings.long_tail_rows,
        warm_rows=settings.warm_rows,
        rows=len(rows),
        rows_hash=hashlib.sha256(data.row_id[rows].tobytes() + labels.tobytes()).hexdigest()[:12],
        covered={split: float((read != NONE).mean()) if len(read) else 0.0 for split, read in reads.items()},
        recots={split: len(np.unique(read[read != NONE])) for split, read in reads.items()},
        searched=found.searched,
        chosen=found.chosen,
        seeds=[
            SeedResult(
                seed=model.hyper.seed, epoch=model.epoch, valid_auc=model.valid_auc, slices=of_seed(model.scores)
            )
            for model in found.models
        ],
        roc=_roc(labels, mean),
        calibration=_calibration(labels, mean, settings.calibration_bins),
    )


def _roc(labels: np.ndarray, scores: np.ndarray) -> Roc | None:
    """At equal steps of the false positive rate; None where one class is missing."""
    if len(np.unique(labels)) < 2:
        return None
    false, true, thresholds = roc_curve(labels, scores)
    at = np.searchsorted(false, np.linspace(0, 1, _ROC_POINTS), side="right") - 1
    return Roc(
        false_positive_rate=false[at].tolist(),
        true_positive_rate=true[at].tolist(),
        # scikit-learn begins at infinity.
        threshold=np.minimum(thresholds[at], 1.0).tolist(),
    )


def _calibration(labels: np.ndarray, scores: np.ndarray, bins: int) -> list[CalibrationBin]:
    """The bins that have rows, in their order."""
    which = np.minimum((scores * bins).astype(np.int64), bins - 1)
    return [
        CalibrationBin(
            rows=int((which == k).sum()),
            mean_score=float(scores[which == k].mean()),
            liked=float(labels[which == k].mean()),
        )
        for k in np.unique(which)
    ]


def _means(ranking: Ranking) -> dict[str, float]:
    """Over the seeds, for the metrics that exist."""
    found = {}
    for name in ("auc", "uauc", "acc", "log_loss", "ece"):
        values = [getattr(one.slices["overall"], name) for one in ranking.seeds]
        if None not in values:
            found[name] = float(np.mean(values))
    return found
