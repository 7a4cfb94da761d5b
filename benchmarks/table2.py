"""The paper's Table 2 in small: seven backbones, with and without a RecCoT's vector, five seeds each, on two cores.

    python benchmarks/table2.py                          # MovieLens-100k's newest 33,891 train rows
    python benchmarks/table2.py --data PATH/ml-1m.zip    # MovieLens-1M's window, 33,891 train rows

The vectors are random numbers, one a user, as wide as BERT's: what the feature costs does not depend on what it says.
`trackrec run --pipeline backbones` is the whole stage with the search, the metrics and real RecCoTs.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from trackrec.config import Backbone, IngestSettings
from trackrec.ctr.features import Dataset, dataset
from trackrec.ctr.stack import Hyper
from trackrec.ctr.training import train
from trackrec.data import schema
from trackrec.fetch import fetch
from trackrec.stages import ingest

TRAIN_ROWS = 33_891
SIZE, HIDDEN, HISTORY_LENGTH = 16, (64, 32), 10


def data_of(tables: Path, width: int) -> Dataset:
    interactions = schema.read(tables, "interactions")
    names, users = np.unique(interactions["user_id"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    vectors = torch.randn(len(names) + 1, width, generator=torch.Generator().manual_seed(0))
    return dataset(
        interactions,
        schema.read(tables, "items"),
        history_length=HISTORY_LENGTH,
        min_rows=2,
        recot=(users + 1) * (width > 0),
        vectors=vectors,
        max_train_rows=TRAIN_ROWS,
    )


def report(tables: Path, args: argparse.Namespace) -> None:
    total = 0.0
    print(f"{'':10}{'feature':>9}{'epochs':>8}{'seconds':>9}{'test AUC':>10}")
    for width in (0, args.width):
        data = data_of(tables, width)
        test = data.of_split("test")
        labels = data.labels[test].numpy()
        for backbone in get_args(Backbone):
            epochs: list[int] = []
            started = time.perf_counter()
            models = train(
                data,
                backbone,
                [Hyper(seed, args.learning_rate, dropout=0.2, l2=1e-5) for seed in range(args.seeds)],
                size=SIZE,
                hidden=HIDDEN,
                batch_size=args.batch_size,
                epochs=args.epochs,
                patience=args.patience,
                score=test,
                progress=epochs.append,
            )
            seconds = time.perf_counter() - started
            total += seconds
            auc = np.mean([roc_auc_score(labels, model.scores) for model in models])
            print(f"{backbone:10}{'yes' if width else 'no':>9}{len(epochs):8}{seconds:9.1f}{auc:10.4f}", flush=True)
    rows = len(data.of_split("train"))
    print(f"{rows} train rows, {args.seeds} seeds each: {total:.0f} s in all, on {torch.get_num_threads()} threads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="GroupLens's ml-1m.zip; MovieLens-100k by default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--width", type=int, default=768, help="of the vectors")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--patience", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tables = Path(scratch) / "tables"
        settings = IngestSettings(dataset="ml-1m" if args.data else "ml-100k")
        ingest.run(settings, raw=args.data or fetch("ml-100k"), interactions=tables, items=tables)
        report(tables, args)


if __name__ == "__main__":
    main()
