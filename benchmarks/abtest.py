"""`trackrec abtest` on a simulated log: what it prints, and what it holds.

    python benchmarks/abtest.py example              # docs/abtest.md's read-out, of 100,000 users
    python benchmarks/abtest.py memory [--large]     # peak memory at 3 (and 30) million rows, a tenth as many users

In the log the treatment's clicks convert a tenth more often than the control's, on all items alike.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ITEMS = 3000
CONVERSION, LIFT = 0.10, 1.10
# Users whose rows are made at once.
MADE = 50_000


def write_log(path: Path, users: int, rows_per_user: float) -> int:
    """Returns the number of rows; a row is an impression."""
    random, rows = np.random.default_rng(0), 0
    writer = None
    for start in range(0, users, MADE):
        count = min(MADE, users - start)
        treated = random.random(count) < 0.5
        active = random.gamma(2.0, 0.5, count)  # of mean 1
        user = np.repeat(np.arange(count), 1 + random.poisson((rows_per_user - 1) * active))
        clicks = random.poisson(active[user])
        conversions = random.binomial(clicks, CONVERSION * np.where(treated[user], LIFT, 1.0))
        columns = {
            "user_id": np.char.add("user-", (start + user).astype(str)),
            "bucket": np.where(treated, "treatment", "control")[user],
            "item_id": np.char.add("item-", (ITEMS * random.random(len(user)) ** 6).astype(int).astype(str)),
            "clicks": clicks,
            "conversions": conversions,
            "revenue": np.round(conversions * random.gamma(2.0, 1.0, len(user)), 2),
            "revenue_before": np.round(active + random.normal(0, 0.5, count), 2)[user],
        }
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
        rows += len(user)
    if writer is not None:
        writer.close()
    return rows


def read_out(log: Path, *options: str) -> str:
    command = [sys.executable, "-m", "trackrec", "abtest", "--log", str(log), "--long-tail-items", "50"]
    command += ["--cuped", "revenue_before", *options]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def memory(scratch: Path, sizes: list[int]) -> None:
    print(f"{'rows':>12}{'users':>12}{'seconds':>10}{'peak MiB':>10}")
    for users in sizes:  # ascending: the peak is of all children so far
        log = scratch / f"{users}.parquet"
        rows = write_log(log, users, rows_per_user=10)
        started = time.perf_counter()
        read_out(log, "--memory-limit", "1Gi")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
        print(f"{rows:12}{users:12}{time.perf_counter() - started:10.1f}{peak:10.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["example", "memory"])
    parser.add_argument("--large", action="store_true", help="also 30 million rows")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trackrec-abtest-") as folder:
        if args.way == "example":
            write_log(Path(folder) / "log.parquet", 100_000, rows_per_user=4)
            print(read_out(Path(folder) / "log.parquet"), end="")
        else:
            memory(Path(folder), [300_000, *([3_000_000] if args.large else [])])


if __name__ == "__main__":
    main()
