"""The models `ranker_base` and `ranker_trackrec` in the real server, against the ranking model itself."""

from collections.abc import Iterator, Sequence
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
from trackrec.serving.feature_store import CACHE_ENV, ROOT_ENV, SECONDS_ENV

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
    variables = {ROOT_ENV: str(features), CACHE_ENV: str(cache), SECONDS_ENV: LOOK_SECONDS}
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
