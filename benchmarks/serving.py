"""Table 5b: what the RecCoT costs the online ranker in latency, in the real server under open-loop load.

    python -m benchmarks.serving                       # DIN, 100 candidates, 100 to 1000 requests a second
    python -m benchmarks.serving --backbone deepfm --rates 100 400 --seconds 5

One server has `ranker_base` and `ranker_trackrec`: one backbone with random weights, one feature table. A client in a
process of its own sends requests at Poisson arrivals, whether or not earlier ones are answered, and counts from the
moment a request was due: a queue counts, in the server and in the client. Both models get the same users, candidates
and arrivals, in turn, rate by rate; the table has the medians over the runs, and of the runs' own ratios, with the
smallest and the largest: a rate at which these are far apart is one at which the machine decides, not the model.
"""

import argparse
import hashlib
import multiprocessing
import os
import queue
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import get_args

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tritonclient.grpc import service_pb2

from trackrec.config import Backbone
from trackrec.ctr import ranker
from trackrec.ctr.embedding import Vocabulary
from trackrec.ctr.features import Names
from trackrec.data import schema
from trackrec.features import table as features
from trackrec.serving import repository, server
from trackrec.serving.contract import EncoderContract
from trackrec.serving.feature_store import CACHE_ENV
from trackrec.serving.server import FEATURES_ENV
from trackrec.serving_config import ExportSettings

MODELS = ("ranker_base", "ranker_trackrec")
DATE = "2026-11-28"
SHARD = 25_000
WIDTH = 384
SIZE = 16
HIDDEN = (64, 32)
ATTRIBUTES = 18
RATINGS = (1.0, 2.0, 3.0, 4.0, 5.0)
WARM_REQUESTS = 300
# Kept as bytes and sent again and again: making requests costs the client more than sending them.
DIFFERENT_REQUESTS = 1000
# A rate is served when so many of its requests are answered while it lasts.
SERVED = 0.98
PERCENTILES = (50, 95, 99)
_METHOD = "/inference.GRPCInferenceService/ModelInfer"
# What is not answered by then is given up, its latency counted as so long.
_DRAIN_SECONDS = 60


@dataclass(frozen=True)
class Load:
    """One run: `seconds` at `rate` requests a second."""

    model: str
    rate: float
    seconds: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    percentiles: tuple[float, ...]  # of the latency, ms
    answered: float  # share of the requests, while the run lasted
    lag: float  # ms, p99: how late the client sent a request


def write_models(out: Path, args: argparse.Namespace) -> None:
    """Both models, as `export` writes them: known users and items, each item with two attributes."""
    users, items = ([f"{kind}{k:07}" for k in range(n)] for kind, n in (("u", args.users), ("i", args.items)))
    names = Names(users, items, [f"a{k}" for k in range(ATTRIBUTES)], list(RATINGS), [])
    rows = [
        {"item_id": item, "title": item, "attributes": [f"a{k % ATTRIBUTES}", f"a{k * 7 % ATTRIBUTES}"]}
        for k, item in enumerate(items)
    ]
    catalogue = out.parent / "items"
    catalogue.mkdir()
    schema.write(catalogue, "items", rows)
    for name, width in zip(MODELS, (0, WIDTH), strict=True):
        vocabulary = Vocabulary(
            users=len(users) + 2, items=len(items) + 2, attributes=ATTRIBUTES + 2, ratings=len(RATINGS) + 2,
            vector_width=width,
        )  # fmt: skip
        config = ranker.RankerConfig(
            backbone=args.backbone, embedding_size=SIZE, hidden=HIDDEN, history_length=args.history,
            vocabulary=vocabulary, names=names, seeds=(0,),
        )  # fmt: skip
        trained = out.parent / name
        trained.mkdir()
        ranker.save(trained, config, [ranker.build(args.backbone, vocabulary, SIZE, HIDDEN, 0).state_dict()])
        repository.write_ranker(
            out / name,
            ExportSettings(),
            ranker=trained,
            items=catalogue,
            generator=None,
            encoder=encoder() if width else None,
        )


def encoder() -> EncoderContract:
    return EncoderContract(model_version="encoder", width=WIDTH, pooling="mean", limit=256)


def write_features(root: Path, args: argparse.Namespace) -> None:
    """A committed date of all users, with full histories and vectors of random numbers."""
    date, rng = root / features.date_folder(DATE), np.random.default_rng(0)
    wanted = features.schema(WIDTH, "float16")
    entries = []
    for shard, start in enumerate(range(0, args.users, SHARD)):
        rows = min(SHARD, args.users - start)
        users = [f"u{k:07}" for k in range(start, start + rows)]
        earlier = rows * args.history
        history = pa.StructArray.from_arrays(
            [
                pa.array([f"i{k:07}" for k in rng.integers(0, args.items, earlier)]),
                pa.array(rng.integers(1, 6, earlier).astype(np.float32)),
                pa.array(rng.integers(0, 2, earlier).astype(np.int8)),
            ],
            fields=list(features.HISTORY.value_type),
        )
        vectors = rng.standard_normal((rows * WIDTH,), dtype=np.float32).astype(np.float16)
        columns: dict[str, pa.Array] = {
            "user_id": pa.array(users),
            "status": pa.array(["ok"] * rows),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors), WIDTH),
            "encoder_version": pa.array([encoder().model_version] * rows),
            "history": pa.ListArray.from_arrays(np.arange(0, earlier + 1, args.history, dtype=np.int32), history),
        }
        table = pa.Table.from_arrays(
            [columns.get(field.name, pa.nulls(rows, field.type)) for field in wanted], schema=wanted
        )
        path = date / features.shard_path(shard)
        path.parent.mkdir(parents=True)
        pq.write_table(table, path)
        entries.append(
            features.ShardEntry(
                path=features.shard_path(shard),
                rows=rows,
                bytes=path.stat().st_size,
                first_user=users[0],
                last_user=users[-1],
            )
        )
    identity = features.Identity(
        dt=DATE, users="", num_users=args.users, shard_users=SHARD, generator_version="", width=WIDTH,
        encoder_version=encoder().model_version, embedding_dtype="float16", generation="",
    )  # fmt: skip
    manifest = features.Manifest(
        identity=identity, committed=DATE, rows=args.users, status={"ok": args.users}, copied=0, generated=0,
        prompt_tokens=None, recot_tokens=None, seconds=None, generator_seconds=0, usd_per_hour=None,
        usd_per_1000_users=None, settings={}, shards=entries,
    )  # fmt: skip
    text = manifest.model_dump_json()
    (date / features.MANIFEST).write_text(text, encoding="utf-8")
    (date / features.SUCCESS).write_text(hashlib.sha256(text.encode()).hexdigest(), encoding="utf-8")


def requests_of(model: str, args: argparse.Namespace) -> list[bytes]:
    """Serialised; the same users and candidates for every model."""
    rng, made = np.random.default_rng(1), []
    for _ in range(DIFFERENT_REQUESTS):
        request = service_pb2.ModelInferRequest(model_name=model)
        user = [f"u{rng.integers(0, args.users):07}"]
        items = [f"i{k:07}" for k in rng.integers(0, args.items, args.candidates)]
        for name, ids in (("user_id", user), ("item_id", items)):
            given = request.inputs.add(name=name, datatype="BYTES", shape=[1, len(ids)])
            given.contents.bytes_contents.extend(text.encode() for text in ids)
        made.append(request.SerializeToString())
    return made


def client(
    address: str,
    args: argparse.Namespace,
    loads: "multiprocessing.Queue[Load | None]",
    outcomes: "multiprocessing.Queue[Outcome]",
) -> None:
    """Answers each load with its outcome, until None."""
    made = {model: requests_of(model, args) for model in MODELS}
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(_METHOD)  # bytes to bytes
        for model in MODELS:
            for request in made[model][:WARM_REQUESTS]:
                answer = service_pb2.ModelInferResponse.FromString(call(request))
                assert list(answer.outputs[0].shape) == [1, args.candidates], answer
        while (load := loads.get()) is not None:
            outcomes.put(run(call, made[load.model], load))


def run(call: grpc.UnaryUnaryMultiCallable, made: list[bytes], load: Load) -> Outcome:
    """Sends at the arrivals of a Poisson process, and waits for the last answer, or its deadline.

    Raises:
        RuntimeError: a request failed otherwise.
    """
    gaps = np.random.default_rng(load.seed).exponential(1 / load.rate, int(load.rate * load.seconds * 2) + 100)
    due = np.cumsum(gaps)
    due = due[due < load.seconds]
    sent, answered = np.empty(len(due)), np.full(len(due), np.nan)
    given_up = np.zeros(len(due), dtype=bool)
    failed: list[str] = []
    waiting: SimpleQueue[None] = SimpleQueue()
    started = time.perf_counter() + 0.1

    def done(number: int) -> "grpc.Future":
        def note(future: grpc.Future) -> None:
            answered[number] = time.perf_counter() - started
            # Not answered for so long: the rate is more than the machine serves, which the table shall say.
            given_up[number] = future.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if future.exception() is not None and not given_up[number]:
                failed.append(str(future.exception()))
            waiting.put(None)

        return note

    for number, moment in enumerate(due):
        while (left := started + moment - time.perf_counter()) > 0:
            time.sleep(left)
        sent[number] = time.perf_counter() - started
        call.future(made[number % len(made)], timeout=_DRAIN_SECONDS).add_done_callback(done(number))
    for _ in due:
        waiting.get(timeout=_DRAIN_SECONDS + 5)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(due)} requests failed; the first: {failed[0]}")
    latency = (answered - due) * 1000
    return Outcome(
        percentiles=tuple(np.percentile(latency, PERCENTILES).tolist()),
        answered=float(((answered < load.seconds) & ~given_up).mean()),
        lag=float(np.percentile((sent - due) * 1000, 99)),
    )


def measured(args: argparse.Namespace, address: str) -> dict[float, dict[str, list[Outcome]]]:
    """By rate and model, one outcome a run."""
    spawn = multiprocessing.get_context("spawn")
    loads: multiprocessing.Queue[Load | None] = spawn.Queue()
    outcomes: multiprocessing.Queue[Outcome] = spawn.Queue()
    process = spawn.Process(target=client, args=(address, args, loads, outcomes))
    process.start()
    found: dict[float, dict[str, list[Outcome]]] = {rate: {model: [] for model in MODELS} for rate in args.rates}
    try:
        for number in range(args.runs):
            for rate in args.rates:
                # Who comes first changes from run to run.
                for model in MODELS if number % 2 == 0 else reversed(MODELS):
                    loads.put(Load(model, rate, args.seconds, seed=number))
                    outcome = answer_of(outcomes, process, args.seconds)
                    found[rate][model].append(outcome)
                    shown = ", ".join(f"p{p} {ms:.2f}" for p, ms in zip(PERCENTILES, outcome.percentiles, strict=True))
                    print(
                        f"run {number + 1}/{args.runs}, {rate:g}/s, {model:15} {shown} ms; answered in time "
                        f"{outcome.answered:.1%}, client late by {outcome.lag:.2f} ms (p99)",
                        flush=True,
                    )
        loads.put(None)
        process.join()
    finally:
        process.kill()
    return found


def answer_of(
    outcomes: "multiprocessing.Queue[Outcome]", process: multiprocessing.process.BaseProcess, seconds: float
) -> Outcome:
    end = time.monotonic() + seconds + 2 * _DRAIN_SECONDS
    while time.monotonic() < end:
        try:
            return outcomes.get(timeout=1)
        except queue.Empty:
            if not process.is_alive():
                raise SystemExit("the client ended; its error is above") from None
    raise SystemExit("the client does not answer")


def table(found: dict[float, dict[str, list[Outcome]]]) -> str:
    """Markdown: medians over the runs, in ms, and the medians of the runs' own ratios."""
    lines = [
        "| requests/s | model | p50 | p95 | p99 | p99, ratio (of the runs) | answered in time | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rate, models in found.items():
        base, trackrec = (models[model] for model in MODELS)
        ratios = [b.percentiles[-1] / a.percentiles[-1] for a, b in zip(base, trackrec, strict=True)]
        for model, outcomes in models.items():
            columns = [statistics.median(column) for column in zip(*(o.percentiles for o in outcomes), strict=True)]
            answered = statistics.median(outcome.answered for outcome in outcomes)
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            ratio = spread if model == MODELS[1] else ""
            lines.append(
                f"| {rate:g} | `{model}` | {' | '.join(f'{ms:.2f}' for ms in columns)} | {ratio} | {answered:.1%} | "
                f"{'' if answered >= SERVED else 'more than this machine serves'} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=get_args(Backbone), default="din")
    parser.add_argument("--rates", type=float, nargs="+", default=[100, 200, 400, 1000], help="requests a second")
    parser.add_argument("--seconds", type=float, default=10, help="of one run at one rate")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--candidates", type=int, default=100, help="in a request")
    parser.add_argument("--history", type=int, default=20, help="earlier items of a user")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models, tables, cache = (Path(scratch) / name for name in ("repository", "features", "cache"))
        write_models(models, args)
        write_features(tables, args)
        variables = {FEATURES_ENV: str(tables), CACHE_ENV: str(cache), "OMP_NUM_THREADS": "1"}
        started = time.perf_counter()
        with server.running(models, Path(scratch) / "server.log", models=MODELS, environment=variables) as running:
            print(f"ready after {time.perf_counter() - started:.0f} s with {args.users} users' features", flush=True)
            for folder in sorted(cache.iterdir()):
                held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                print(f"arrays of one ranker: {held / args.users:.0f} bytes a user", flush=True)
            found = measured(args, running.grpc)
    print(
        f"\n{args.backbone}, {args.candidates} candidates, {args.history} earlier items, {args.users} users, "
        f"{args.items} items, {os.cpu_count()} cores; ms, medians of {args.runs} runs of {args.seconds:g} s\n"
    )
    print(table(found))


if __name__ == "__main__":
    main()
