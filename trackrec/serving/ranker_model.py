"""The models `ranker_base` and `ranker_trackrec`: Triton python models that score a user's candidates.

Histories and RecCoTs come from the feature table that TRACKREC_FEATURES names (`trackrec.serving.feature_store`). A
user without a row there is scored without a history, and with the vector that was learned for a missing RecCoT.
"""

import datetime
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from trackrec.serving import feature_store
from trackrec.serving.contract import RankerContract
from trackrec.serving.scorer import Scorer, Users

# Candidates in one request; more belong into several, which are scored as they come.
MAX_CANDIDATES = 10_000
_SWITCH_SECONDS = 0.0005


# From users and each one's candidates, in UTF-8, to the outputs by name, of each a row a user.
Answers = Callable[[list[bytes], list[list[bytes]]], Mapping[str, Sequence[np.ndarray]]]


class TritonPythonModel:
    """Inputs `user_id` BYTES [1] and `item_id` BYTES [-1]; output `score` FP32 [-1], P(liked), in the items' order.

    All requests at hand are scored in one pass, whatever their numbers of candidates.
    """

    def initialize(self, args: dict[str, str]) -> None:
        contract = RankerContract.of(json.loads(args["model_config"]))
        folder = Path(args["model_repository"]) / args["model_version"]
        self.ranking = Ranking(args["model_name"], folder, contract)

    def execute(self, requests: list[Any]) -> list[Any]:
        return answered(requests, lambda users, candidates: {"score": self.ranking.score(users, candidates)})

    def finalize(self) -> None:
        self.ranking.close()


class Ranking:
    """A ranker in this process, with what the feature table knows of its users.

    Args:
        name: in the log and in metrics.
        folder: the ranker's files.
    """

    def __init__(self, name: str, folder: Path, contract: RankerContract) -> None:
        torch.set_num_threads(1)  # an instance is a core: `export.ranker_instances`
        # A thread that builds the next date's arrays hands over this much sooner than Python's 5 ms.
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._scorer = Scorer(folder, contract.seed)
        if self._scorer.reads_recot != contract.uses_recot:
            raise pb_utils.TritonModelException(
                f"the ranker of {name} and its config differ in whether it reads RecCoTs; export it again"
            )
        self._nobody = self._scorer.no_one()
        self._users = self._missing = 0
        self._metrics = _Metrics(name)
        self._store = feature_store.of_environment(
            self._scorer, contract, lambda line: pb_utils.Logger.log_warn(f"{name}: {line}")
        )
        if self._store is not None:
            self._report()
            self._store.follow(feature_store.seconds(), self._report)

    def score(self, users: list[bytes], candidates: list[list[bytes]]) -> list[np.ndarray]:
        """P(liked) of each user's candidates: float32 [candidates] each."""
        return self._scorer.score(users, self._known(users), candidates) if users else []

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    def _known(self, users: list[bytes]) -> Users:
        # Taken once: the date may change while this request is under way.
        table = self._store.table if self._store is not None else None
        self._users += len(users)
        if table is None:
            self._missing += len(users)
            return Users(*(part.expand(len(users), -1) for part in self._nobody))
        rows = table.rows(users)
        self._missing += int((rows == 0).sum())
        return table.users(rows)

    def _report(self) -> None:
        """Here and not with each request: a metric is a call to the server's process."""
        table = self._store.table if self._store is not None else None
        self._metrics.set(table.dt if table else None, self._users, self._missing)


def answered(requests: list[Any], answers: Answers) -> list[Any]:
    """The responses: `answers` is asked once, for all requests that are well formed."""
    responses: list[Any] = [None] * len(requests)
    users: list[bytes] = []
    candidates: list[list[bytes]] = []
    own: list[tuple[int, slice]] = []
    for number, request in enumerate(requests):
        user = pb_utils.get_input_tensor_by_name(request, "user_id").as_numpy()
        items = pb_utils.get_input_tensor_by_name(request, "item_id").as_numpy()
        if not 0 < items.size <= MAX_CANDIDATES:
            # This request's alone: the others are scored.
            error = f"`item_id` has {items.size} candidates; send 1 to {MAX_CANDIDATES}"
            code = pb_utils.TritonError.INVALID_ARG
            responses[number] = pb_utils.InferenceResponse(error=pb_utils.TritonError(error, code))
            continue
        own.append((number, slice(len(users), len(users) + len(items))))
        users += user[:, 0].tolist()
        candidates += items.tolist()
    if own:
        outputs = answers(users, candidates)
        for number, part in own:
            tensors = [pb_utils.Tensor(name, np.stack(rows[part])) for name, rows in outputs.items()]
            responses[number] = pb_utils.InferenceResponse(output_tensors=tensors)
    return responses


class _Metrics:
    """Of one model: how old its features are, and how many users it was asked for who have none."""

    def __init__(self, model: str) -> None:
        gauge, counter = pb_utils.MetricFamily.GAUGE, pb_utils.MetricFamily.COUNTER
        age = pb_utils.MetricFamily(
            name="trackrec_features_age_seconds", description="Since the served date began (UTC)", kind=gauge
        )
        users = pb_utils.MetricFamily(name="trackrec_users", description="Users asked for", kind=counter)
        missing = pb_utils.MetricFamily(
            name="trackrec_users_without_features", description="Users asked for whom the date lacks", kind=counter
        )
        # The families are kept: the server forgets one that is not.
        self.families = (age, users, missing)
        self.age, self.users, self.missing = (family.Metric(labels={"model": model}) for family in self.families)
        self.counted = (0, 0)

    def set(self, dt: str | None, users: int, missing: int) -> None:
        if dt is not None:
            began = datetime.datetime.fromisoformat(dt).replace(tzinfo=datetime.UTC)
            self.age.set((datetime.datetime.now(datetime.UTC) - began).total_seconds())
        self.users.increment(users - self.counted[0])
        self.missing.increment(missing - self.counted[1])
        self.counted = (users, missing)
