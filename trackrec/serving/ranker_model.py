"""The models `ranker_base` and `ranker_trackrec`: Triton python models that score a user's candidates.

Histories and RecCoTs come from the feature table that TRACKREC_FEATURES names (`trackrec.serving.feature_store`). A
user without a row there is scored without a history, and with the vector that was learned for a missing RecCoT.
"""

import datetime
import json
import sys
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


class TritonPythonModel:
    """Inputs `user_id` BYTES [1] and `item_id` BYTES [-1]; output `score` FP32 [-1], P(liked), in the items' order.

    All requests at hand are scored in one pass, whatever their numbers of candidates.
    """

    def initialize(self, args: dict[str, str]) -> None:
        torch.set_num_threads(1)  # an instance is a core: more cores, more instances
        # A thread that builds the next date's arrays hands over this much sooner than Python's 5 ms.
        sys.setswitchinterval(_SWITCH_SECONDS)
        contract = RankerContract.of(json.loads(args["model_config"]))
        self.scorer = Scorer(Path(args["model_repository"]) / args["model_version"], contract.seed)
        if self.scorer.reads_recot != contract.uses_recot:
            raise pb_utils.TritonModelException(
                f"the ranker of {args['model_name']} and its config differ in whether it reads RecCoTs; export it again"
            )
        self.nobody = self.scorer.no_one()
        self.users = self.missing = 0
        self.metrics = _Metrics(args["model_name"])
        self.store = feature_store.of_environment(
            self.scorer, contract, lambda line: pb_utils.Logger.log_warn(f"{args['model_name']}: {line}")
        )
        if self.store is not None:
            self._report()
            self.store.follow(feature_store.seconds(), self._report)

    def execute(self, requests: list[Any]) -> list[Any]:
        responses: list[Any] = [None] * len(requests)
        users: list[bytes] = []
        candidates: list[list[bytes]] = []
        own: list[tuple[int, slice, tuple[int, ...]]] = []
        for number, request in enumerate(requests):
            user = pb_utils.get_input_tensor_by_name(request, "user_id").as_numpy()
            items = pb_utils.get_input_tensor_by_name(request, "item_id").as_numpy()
            if not 0 < items.size <= MAX_CANDIDATES:
                # This request's alone: the others are scored.
                error = f"`item_id` has {items.size} candidates; send 1 to {MAX_CANDIDATES}"
                code = pb_utils.TritonError.INVALID_ARG
                responses[number] = pb_utils.InferenceResponse(error=pb_utils.TritonError(error, code))
                continue
            own.append((number, slice(len(users), len(users) + len(items)), items.shape))
            users += user[:, 0].tolist()
            candidates += items.tolist()
        if own:
            scores = self.scorer.score(users, self._known(users), candidates)
            for number, part, shape in own:
                score = pb_utils.Tensor("score", np.concatenate(scores[part]).reshape(shape))
                responses[number] = pb_utils.InferenceResponse(output_tensors=[score])
        return responses

    def finalize(self) -> None:
        if self.store is not None:
            self.store.close()

    def _known(self, users: list[bytes]) -> Users:
        # Taken once: the date may change while this request is under way.
        table = self.store.table if self.store is not None else None
        self.users += len(users)
        if table is None:
            self.missing += len(users)
            return Users(*(part.expand(len(users), -1) for part in self.nobody))
        rows = table.rows(users)
        self.missing += int((rows == 0).sum())
        return table.users(rows)

    def _report(self) -> None:
        """Here and not in `execute`: a metric is a call to the server's process."""
        table = self.store.table if self.store is not None else None
        self.metrics.set(table.dt if table else None, self.users, self.missing)


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
