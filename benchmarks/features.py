"""The batch feature job against a real Triton server on this machine.

    python benchmarks/features.py overhead            # users/s with a generator and an encoder that cost nothing
    python benchmarks/features.py memory [--million]  # the job's peak memory at 10 k, 100 k (and 1 M) users
    python benchmarks/features.py engine              # RecCoTs/s against the same engine in process, SmolLM2

`overhead` counts the server, the prompts and the Parquet files. `engine` gives both the same prompts, and the same
threads; the peer is the engine alone, ours the whole job, encoder and files too.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# Rows of the users' table that are made at once.
MADE = 10_000
DT = "2026-11-28"


def write_users(path: Path, users: int, items: int) -> Path:
    # The server's environment, where the peer runs, has another numpy than its Arrow needs.
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.features import made
    from trackrec.data import schema

    with pq.ParquetWriter(path, schema.TABLES["users"], compression="zstd") as writer:
        for start in range(0, users, MADE):
            rows = [made.user(number, items=items) for number in range(start, min(start + MADE, users))]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema.TABLES["users"]))
    return path


def job(args: argparse.Namespace) -> dict[str, Any]:
    """One run of the job; in a process of its own, whose peak memory is the job's."""
    from trackrec.features.commit import commit
    from trackrec.features.job import run_shards
    from trackrec.serving_config import FeaturesSettings

    settings = FeaturesSettings(triton=args.triton, concurrency=args.concurrency)
    started = time.perf_counter()
    done = run_shards(settings, args.table, str(args.out), args.dt)
    commit(settings, str(args.out), args.dt)
    seconds = time.perf_counter() - started
    assert done.status["ok"] == done.rows, done
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"users": done.rows, "seconds": seconds, "peak_mib": peak, "generated": done.generated}


def peer(args: argparse.Namespace) -> dict[str, Any]:
    """The engine alone, in the server's environment."""
    from trackrec.serving.generator_engine import open_generator
    from trackrec.serving.vllm_args import EngineArguments, SamplingParameters

    given = json.loads(args.table.read_text(encoding="utf-8"))
    os.chdir(args.out)
    version = Path("generator/1")
    _, engine = open_generator(EngineArguments.read(version), version)
    sampling = SamplingParameters.read(given["sampling"])
    list(engine.generate(given["texts"][:2], sampling))
    started = time.perf_counter()
    tokens = sum(completion.num_tokens for _, completion in engine.generate(given["texts"], sampling))
    return {"users": len(given["texts"]), "seconds": time.perf_counter() - started, "tokens": tokens}


def in_own_process(way: str, args: argparse.Namespace, python: str = sys.executable, **given: Any) -> dict[str, Any]:
    command = [python, __file__, way, *(f"--{name}={value}" for name, value in given.items())]
    command += [f"--concurrency={args.concurrency}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRACKREC_WORK": str(given["out"]) + "-work"}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def overhead(args: argparse.Namespace, scratch: Path) -> None:
    from tests.serving import fakes
    from trackrec.serving import server

    table = write_users(scratch / "users.parquet", args.users, args.items)
    models = fakes.repository(scratch / "models", width=384)
    print(f"{args.users} users with {args.items} items, {os.cpu_count()} cores, {args.runs} runs")
    print(f"{'':10}{'users/s':>10}{'seconds':>10}{'peak MiB':>10}")
    with server.running(models, scratch / "log") as triton:
        for run in range(args.runs):
            given = {"table": table, "triton": triton.grpc, "out": scratch / f"out-{run}"}
            for way, dt in (("generated", DT), ("copied", "2026-11-29")):
                found = in_own_process("job", args, dt=dt, **given)
                speed, seconds = found["users"] / found["seconds"], found["seconds"]
                print(f"{way:10}{speed:10.0f}{seconds:10.2f}{found['peak_mib']:10.0f}")


def memory(args: argparse.Namespace, scratch: Path) -> None:
    from tests.serving import fakes
    from trackrec.serving import server

    models = fakes.repository(scratch / "models", width=384)
    print(f"{'users':>10}{'peak MiB':>10}{'users/s':>10}")
    with server.running(models, scratch / "log") as triton:
        for users in (10_000, 100_000, *([1_000_000] if args.million else [])):
            table = write_users(scratch / f"users-{users}.parquet", users, args.items)
            found = in_own_process("job", args, table=table, triton=triton.grpc, out=scratch / f"out-{users}", dt=DT)
            print(f"{users:10}{found['peak_mib']:10.0f}{users / found['seconds']:10.0f}")


def engine(args: argparse.Namespace, scratch: Path) -> None:
    import pyarrow.parquet as pq

    from trackrec.config import DecodingSettings, EncodeSettings
    from trackrec.features import wire
    from trackrec.features.prompts import prompts
    from trackrec.fetch import fetch
    from trackrec.serving import repository, server
    from trackrec.serving_config import ExportSettings

    models, smollm2 = scratch / "models", fetch("smollm2-135m-instruct")
    models.mkdir()
    settings, decoding = ExportSettings(dtype="float32"), DecodingSettings(max_tokens=args.tokens)
    contract = repository.write_generator(
        models / "generator",
        settings,
        decoding,
        domain="movies",
        history_length=args.items,
        base_model=smollm2,
        generator=smollm2,
    )
    repository.write_encoder(models / "encoder", EncodeSettings(), encoder=fetch("all-minilm-l6-v2"))
    table = write_users(scratch / "users.parquet", args.users, args.items)
    texts = [prompt.text for prompt in prompts(pq.read_table(table), contract)]
    (scratch / "prompts.json").write_text(json.dumps({"texts": texts, "sampling": wire.sampling_parameters(contract)}))
    python = str((ROOT / os.environ.get(server.ENV, ".venv-triton")).absolute() / "bin/python")
    print(f"{args.users} users with {args.items} items, SmolLM2-135M, {args.tokens} new tokens at most")
    print(f"{'':10}{'RecCoTs/s':>10}{'ratio':>8}")
    ratios = []
    for run in range(args.runs):
        alone = in_own_process("peer", args, python=python, table=scratch / "prompts.json", out=models)
        with server.running(models, scratch / "log") as triton:
            in_own_process(
                "job",
                args,
                table=write_users(scratch / "few.parquet", 2, args.items),
                triton=triton.grpc,
                out=scratch / "warm-up",
                dt=f"2026-10-{run + 1:02}",
            )
            ours = in_own_process("job", args, table=table, triton=triton.grpc, out=scratch / f"out-{run}", dt=DT)
        speeds = {"engine": alone["users"] / alone["seconds"], "job": ours["users"] / ours["seconds"]}
        ratios.append(speeds["job"] / speeds["engine"])
        for way, speed in speeds.items():
            print(f"{way:10}{speed:10.3f}{speed / speeds['engine']:8.2f}")
    print(f"median ratio {sorted(ratios)[len(ratios) // 2]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["overhead", "memory", "engine", "job", "peer"])
    parser.add_argument("--users", type=int, help="20,000; 64 for `engine`")
    parser.add_argument("--items", type=int, default=20, help="of a user's history")
    parser.add_argument("--tokens", type=int, default=64, help="of a RecCoT, at most")
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--million", action="store_true", help="also 1,000,000 users")
    for name in ("table", "out"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    for name in ("triton", "dt"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.users = args.users or (64 if args.way == "engine" else 20_000)
    if args.way in ("job", "peer"):
        print(json.dumps({"job": job, "peer": peer}[args.way](args)))
        return
    with tempfile.TemporaryDirectory(prefix="trackrec-features-") as scratch:
        {"overhead": overhead, "memory": memory, "engine": engine}[args.way](args, Path(scratch))


if __name__ == "__main__":
    main()
