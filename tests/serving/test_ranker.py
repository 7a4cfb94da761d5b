"""The models `ranker_base` and `ranker_trackrec` in the real server, against the ranking model itself."""

import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

from tests.serving.ranking import (
    ASKED_ITEMS,
    ASKED_USERS,
    USERS,
    reference,
    vector,
    write_features,
    write_ranker,
)
from trackrec.serving import server
from trackrec.serving.contract import RankerContract
from trackrec.serving.feature_store import CACHE_ENV, SECONDS_ENV

MODELS = ("ranker_base", "ranker_trackrec")
# The second commits of a test follow each other: a look costs little.
LOOK_SECONDS = "0.1"
NEXT = [replace(user, history=user.history[1:], vector=user.vector and vector(90 + k)) for k, user in enumerate(USERS)]


@dataclass
class Serving:
    server: server.Server
    repository: Path
    features: Path
    cache: Path

    def client(self) -> triton.InferenceServerClient:
        return triton.InferenceServerClient(self.server.grpc)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("ranking")
    repository, features, cache = folder / "repository", folder / "features", folder / "cache"
    for name in MODELS:
        write_ranker(repository, "din", reads=name == "ranker_trackrec")
        # Two processes share one table.
        with (repository / name / "config.pbtxt").open("a", encoding="utf-8") as config:
            config.write("instance_group { count: 1 kind: KIND_CPU }\n")
    write_features(features, "2026-11-01", USERS)
    variables = {server.FEATURES_ENV: str(features), CACHE_ENV: str(cache), SECONDS_ENV: LOOK_SECONDS}
    with server.running(repository, folder / "server.log", models=MODELS, environment=variables) as running:
        yield Serving(running, repository, features, cache)


def ask(client: triton.InferenceServerClient, model: str, users: Sequence[str], items: Sequence[str]) -> np.ndarray:
    """[users, items]"""
    given = [triton.InferInput("user_id", [len(users), 1], "BYTES")]
    given += [triton.InferInput("item_id", [len(users), len(items)], "BYTES")]
    given[0].set_data_from_numpy(np.array([[user.encode()] for user in users], dtype=object))
    given[1].set_data_from_numpy(np.array([[item.encode() for item in items]] * len(users), dtype=object))
    found: np.ndarray = client.infer(model, given).as_numpy("score")
    return found


@pytest.mark.parametrize("model", MODELS)
def test_the_scores_are_the_rankers_own(serving: Serving, model: str) -> None:
    expected = reference(serving.repository / model, USERS, ASKED_USERS, ASKED_ITEMS)
    client = serving.client()
    np.testing.assert_allclose(ask(client, model, ASKED_USERS, ASKED_ITEMS), expected, rtol=2e-5)

    def one(number: int) -> None:
        user, items = number % len(ASKED_USERS), 1 + number % len(ASKED_ITEMS)
        found = ask(client, model, [ASKED_USERS[user]], ASKED_ITEMS[:items])
        np.testing.assert_allclose(found, expected[[user], :items], rtol=2e-5)

    # At once: requests of several lengths are scored together.
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(100)))
    contract = RankerContract.of(client.get_model_config(model))
    assert contract.uses_recot == (model == "ranker_trackrec")


def test_the_processes_of_a_model_share_its_table(serving: Serving) -> None:
    maps = [path for path in Path("/proc").glob("[0-9]*/maps") if mapped(path, serving.cache)]
    assert len(maps) == 4
    assert len(set.union(*(mapped(path, serving.cache) for path in maps))) == len(MODELS)


def mapped(maps: Path, cache: Path) -> set[str]:
    """The files of hashes in `cache` that a process has in memory."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:  # it has ended, or is another's
        return set()
    return {line.split()[-1] for line in lines if str(cache) in line and line.endswith("hash.npy")}


def test_a_malformed_request_fails_alone(serving: Serving) -> None:
    client = serving.client()
    expected = reference(serving.repository / MODELS[1], USERS, ["u0"], ASKED_ITEMS)

    def good(_: int) -> None:
        np.testing.assert_allclose(ask(client, MODELS[1], ["u0"], ASKED_ITEMS), expected, rtol=2e-5)

    def bad(number: int) -> None:
        with pytest.raises(InferenceServerException, match="send 1 to 10000"):
            ask(client, MODELS[1], ["u0"], ["i0"] * (10_001 if number % 2 else 0))

    with ThreadPoolExecutor(8) as pool:
        work = [pool.submit(bad if number % 3 == 0 else good, number) for number in range(30)]
        for future in work:
            future.result()


def test_a_new_date_is_taken_while_requests_are_under_way(serving: Serving) -> None:
    """No request fails, and each is scored by one date as a whole: first by the old one, in the end by the new one."""
    model = serving.repository / MODELS[1]
    asked = ["u0", "u1", "u2", "u4"]
    dates = {"old": USERS, "new": NEXT}
    expected = {name: reference(model, users, asked, ASKED_ITEMS) for name, users in dates.items()}
    assert not np.isclose(expected["old"], expected["new"], rtol=1e-3).any()
    ended = threading.Event()

    def load() -> list[str]:
        client, seen = serving.client(), []
        while not ended.is_set():
            found = ask(client, MODELS[1], asked, ASKED_ITEMS)
            [which] = [name for name, scores in expected.items() if np.allclose(found, scores, rtol=2e-5)]
            seen.append(which)
        return seen

    with ThreadPoolExecutor(6) as pool:
        work = [pool.submit(load) for _ in range(6)]
        try:
            time.sleep(0.5)
            write_features(serving.features, "2026-11-02", NEXT)
            until(lambda: np.allclose(ask(serving.client(), MODELS[1], asked, ASKED_ITEMS), expected["new"], rtol=2e-5))
            time.sleep(0.5)
        finally:
            ended.set()
        answers = [future.result() for future in work]
    for seen in answers:
        assert seen[0] == "old" and seen[-1] == "new"


def test_a_broken_date_leaves_the_one_before(serving: Serving) -> None:
    client = serving.client()
    before = ask(client, MODELS[1], ASKED_USERS, ASKED_ITEMS)
    date = write_features(serving.features, "2026-11-03", USERS)
    path = date / "shard=00000/part.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    until(lambda: serving.server.log.read_text().count("dt=2026-11-03 are refused") == 4)
    np.testing.assert_array_equal(ask(client, MODELS[1], ASKED_USERS, ASKED_ITEMS), before)
    shutil.rmtree(date)


def test_the_server_counts_users_without_features(serving: Serving) -> None:
    before = metric(serving, "trackrec_users_without_features", MODELS[0])
    ask(serving.client(), MODELS[0], ["nobody", "u0", "no one"], ASKED_ITEMS)
    until(lambda: metric(serving, "trackrec_users_without_features", MODELS[0]) == before + 2)
    assert metric(serving, "trackrec_features_age_seconds", MODELS[0]) > 0


def metric(serving: Serving, name: str, model: str) -> float:
    with urllib.request.urlopen(f"http://{serving.server.metrics}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    [value] = [line.split()[-1] for line in lines if line.startswith(f"{name}{{") and f'model="{model}"' in line]
    return float(value)


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
