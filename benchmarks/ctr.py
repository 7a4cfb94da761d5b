"""Training CTR models against deepctr-torch: one model at a time, and the seeds of the protocol together.

    python -m benchmarks.ctr                            # MovieLens-100k
    python -m benchmarks.ctr --data PATH/ml-1m.zip      # MovieLens-1M

Both train the same model (`tests.ctr.deepctr` says what is matched) on the same rows and fields, without a RecCoT, and
take the best epoch by valid AUC. "deepctr" is its own `fit` and `predict`, one seed after another; "ours" is
`trackrec.ctr.training`, one seed after another; "stacked" trains all seeds together. The first two take turns, seed by
seed; stacked runs before and after them. All times include predicting valid after each epoch and test once.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score

from tests.ctr import deepctr
from trackrec.config import IngestSettings
from trackrec.ctr.features import Dataset
from trackrec.ctr.stack import Hyper
from trackrec.ctr.training import train
from trackrec.fetch import fetch
from trackrec.stages import ingest

SIZE = 16
HIDDEN = (64, 32)
LEARNING_RATE = 1e-3
HISTORY_LENGTH = 10


@dataclass
class Run:
    """One or more models trained to the end."""

    seconds: float
    aucs: list[tuple[float, float]]  # valid and test, at the best epoch by valid, one a model


def deepctrs(backbone: str, data: Dataset, seed: int, args: argparse.Namespace) -> Run:
    model = deepctr.build(backbone, data, SIZE, HIDDEN, seed)
    seconds, aucs, started = 0.0, [], time.perf_counter()
    for _ in islice(deepctr.fit(model, data, LEARNING_RATE, args.batch_size), args.epochs):
        valid = deepctr.auc(model, data, "valid")
        seconds += time.perf_counter() - started
        started = time.perf_counter()
        aucs.append((valid, deepctr.auc(model, data, "test")))
        predicting, started = time.perf_counter() - started, time.perf_counter()
    # Ours predict test once, at the end.
    return Run(seconds + predicting, [max(aucs)])


def ours(backbone: str, data: Dataset, seeds: list[int], args: argparse.Namespace) -> Run:
    test = data.of_split("test")
    started = time.perf_counter()
    models = train(
        data,
        backbone,
        [Hyper(seed, LEARNING_RATE, dropout=0.0, l2=0.0) for seed in seeds],
        size=SIZE,
        hidden=HIDDEN,
        batch_size=args.batch_size,
        epochs=args.epochs,
        patience=args.epochs,
        score=test,
    )
    seconds = time.perf_counter() - started
    labels = data.labels[test].numpy()
    return Run(seconds, [(model.valid_auc, float(roc_auc_score(labels, model.scores))) for model in models])


def report(backbone: str, data: Dataset, args: argparse.Namespace) -> None:
    seeds = list(range(args.seeds))
    runs: dict[str, list[Run]] = {"deepctr": [], "ours": []}
    stacked = [ours(backbone, data, seeds, args)]
    for seed in seeds:
        runs["deepctr"].append(deepctrs(backbone, data, seed, args))
        runs["ours"].append(ours(backbone, data, [seed], args))
    stacked.append(ours(backbone, data, seeds, args))

    samples = args.epochs * len(data.of_split("train"))
    rates = {way: samples / statistics.median(run.seconds for run in of_way) for way, of_way in runs.items()}
    totals = {way: sum(run.seconds for run in of_way) for way, of_way in runs.items()}
    totals["stacked"] = statistics.mean(run.seconds for run in stacked)
    aucs = {way: [run.aucs[0] for run in of_way] for way, of_way in runs.items()} | {"stacked": stacked[0].aucs}
    rates["stacked"] = args.seeds * samples / totals["stacked"]
    print(f"\n{backbone:10}{'samples/s':>12}{'ratio':>8}{f'{args.seeds} seeds':>12}{'ratio':>8}", end="")
    print(f"{'valid AUC':>12}{'test AUC':>12}")
    for way, rate in rates.items():
        valid, test = (statistics.mean(auc) for auc in zip(*aucs[way], strict=True))
        print(f"{way:10}{rate:12.0f}{rate / rates['deepctr']:8.2f}", end="")
        print(f"{totals[way]:10.1f} s{totals['deepctr'] / totals[way]:8.2f}{valid:12.4f}{test:12.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="ml-100k", help="ml-100k, or the path to ml-1m.zip")
    parser.add_argument("--backbones", nargs="+", choices=["deepfm", "din"], default=["deepfm", "din"])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    dataset, raw = ("ml-100k", fetch("ml-100k")) if args.data == "ml-100k" else ("ml-1m", Path(args.data))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tables"
        settings = IngestSettings.model_validate({"dataset": dataset})
        ingest.run(settings, raw=raw, interactions=out, items=out)
        data = deepctr.data_of(out, HISTORY_LENGTH)
    print(
        f"{dataset}, {len(data.of_split('train'))} train rows, {args.epochs} epochs, batch {args.batch_size}, ", end=""
    )
    print(f"{torch.get_num_threads()} threads; AUC: mean over the seeds")
    torch.optim.Adam([torch.zeros(1)])  # imports for a second, which is nobody's
    for backbone in args.backbones:
        report(backbone, data, args)


if __name__ == "__main__":
    main()
