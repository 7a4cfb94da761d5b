"""Ingest's time and peak memory: MovieLens-1M beside a plain pandas version, and 27 million synthetic Amazon reviews.

    python benchmarks/ingest.py ml-1m PATH_TO_ML_1M_ZIP
    python benchmarks/ingest.py amazon-book --rows 27000000 --memory-limit 8Gi --folder SCRATCH

Every measurement is a process of its own, so that peak memory is its own; "warm" is the best of three runs in it.
"""

import argparse
import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from trackrec import storage
from trackrec.config import IngestSettings
from trackrec.data_config import DataSettings
from trackrec.stages import ingest


def plain_pandas(archive: Path) -> pd.DataFrame:
    """CoLLM's recipe for ML-1M as one would write it in pandas; `history` holds all the user's earlier item ids."""
    with zipfile.ZipFile(archive) as file:
        text = file.read("ml-1m/ratings.dat").decode("latin-1")
    rows = [line.split("::") for line in text.splitlines()]
    table = pd.DataFrame(rows, columns=["user", "item", "rating", "timestamp"]).astype("int64")
    table["line"] = range(len(table))
    table["first"] = table.groupby("item")["line"].transform("min")
    date = pd.to_datetime(table["timestamp"], unit="s")
    slot = (date.dt.year - 2000) * 12 + date.dt.month - 4
    table["part"] = pd.cut(slot, [13, 23, 28, 33], labels=[0, 1, 2]).astype("float")
    table = table[table["part"].notna()].sort_values(["user", "timestamp", "part", "first", "line"])
    table["item_id"], table["user_id"] = table["item"].astype(str), table["user"].astype(str)
    table["label"] = (table["rating"] >= 4).astype(int)
    table["split"] = table["part"].map({0: "train", 1: "valid", 2: "test"})
    histories: list[list[str]] = []
    for _, items in table.groupby("user", sort=False)["item_id"]:
        values = items.tolist()
        histories += [values[:position] for position in range(len(values))]
    table["history"] = histories
    return table


def pandas_to_parquet(archive: Path, out: Path) -> None:
    """`plain_pandas`, with the rating and label of every earlier item too, written as the stage writes it."""
    table = plain_pandas(archive)
    entries = [
        {"item_id": item, "rating": float(rating), "label": label}
        for item, rating, label in zip(table["item_id"], table["rating"], table["label"], strict=True)
    ]
    start = 0
    histories = []
    for size in table.groupby("user", sort=False).size():
        histories += [entries[start:row] for row in range(start, start + size)]
        start += size
    table["history"] = histories
    columns = ["split", "user_id", "item_id", "label", "rating", "timestamp", "history"]
    table[columns].to_parquet(out, compression="zstd")


def write_amazon(folder: Path, rows: int, seed: int = 0) -> None:
    """Synthetic `Books_5.json.gz` and `meta_Books.json.gz`: a long tail of users and books, 2005-2018, text and all.

    The text is the same few paragraphs over and over, so the file is far smaller than Amazon's, not its contents.
    """
    users, items = max(rows // 14, 100), max(rows // 39, 100)
    texts = [(f"word{number} " * 120)[: 200 + 60 * number] for number in range(10)]
    draw = random.Random(seed)
    with gzip.open(folder / "meta_Books.json.gz", "wb", compresslevel=1) as file:
        for item in range(items):
            row = {"category": ["Books", "Fiction"], "title": f"Book {item}", "asin": f"{item:010d}", "also_buy": []}
            file.write(json.dumps(row).encode() + b"\n")
    begin, end = 1_104_537_600, 1_538_352_000
    with gzip.open(folder / "Books_5.json.gz", "wb", compresslevel=1) as file:
        for start in range(0, rows, 100_000):
            lines = []
            for _ in range(min(100_000, rows - start)):
                user, item = int(users * draw.random() ** 3), int(items * draw.random() ** 3)
                moment = begin + 86_400 * int((end - begin) / 86_400 * draw.random() ** 0.5)
                lines.append(
                    f'{{"overall": {draw.choice((3.0, 4.0, 5.0))}, "verified": true, "reviewerID": "A{user:012d}", '
                    f'"asin": "{item:010d}", "reviewText": "{draw.choice(texts)}", "unixReviewTime": {moment}}}\n'
                )
            file.write("".join(lines).encode())


def measure(label: str, body: Callable[[], None], repeats: int) -> None:
    """Prints the first and the best time of `body`, and this process's peak memory, as JSON."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        body()
        times.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"what": label, "first_s": round(times[0], 2), "warm_s": round(min(times), 2), "peak_gib": round(peak, 2)}
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    ml_1m = commands.add_parser("ml-1m")
    ml_1m.add_argument("archive", type=Path)
    ml_1m.add_argument("--only", choices=["trackrec", "pandas"], help="Measure one, in this process.")
    amazon = commands.add_parser("amazon-book")
    amazon.add_argument("--rows", type=int, default=27_000_000)
    amazon.add_argument("--memory-limit", default="8Gi")
    amazon.add_argument("--folder", type=Path, required=True, help="Where the raw files and the output go; kept.")
    arguments = parser.parse_args()
    if arguments.command == "amazon-book":
        _amazon(arguments.folder, arguments.rows, arguments.memory_limit)
    elif arguments.only is None:
        for name in ("trackrec", "pandas"):
            subprocess.run([sys.executable, __file__, "ml-1m", str(arguments.archive), "--only", name], check=True)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            settings = IngestSettings(dataset="ml-1m")
            bodies: dict[str, Callable[[], None]] = {
                "trackrec": lambda: ingest.run(settings, raw=arguments.archive, interactions=out, items=out),
                "pandas": lambda: pandas_to_parquet(arguments.archive, Path(scratch) / "pandas.parquet"),
            }
            measure(f"ml-1m, {arguments.only}", bodies[arguments.only], repeats=4)


def _amazon(folder: Path, rows: int, memory_limit: str) -> None:
    raw, out = folder / f"raw-{rows}", folder / "out"
    if not (raw / "Books_5.json.gz").exists():
        raw.mkdir(parents=True, exist_ok=True)
        write_amazon(raw, rows)
    settings, data = IngestSettings(dataset="amazon-book"), DataSettings.model_validate({"memory_limit": memory_limit})
    label = f"amazon-book, {rows} rows, {(raw / 'Books_5.json.gz').stat().st_size / 2**30:.1f} GiB gzipped"
    measure(label, lambda: ingest.run(settings, data, raw=raw, interactions=out, items=out), repeats=1)
    print(json.dumps(storage.read_manifest(out).facts))


if __name__ == "__main__":
    main()
