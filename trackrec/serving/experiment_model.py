"""The model `ranker`: both rankers of an A/B test, and for each user the one of the user's bucket.

The bucket is the one that the read-out computes from the same salt and shares (`trackrec.abtest.bucketing`), so what is
served and what is counted cannot drift apart.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from trackrec.abtest.bucketing import CONTROL, TREATMENT
from trackrec.serving.contract import ExperimentContract
from trackrec.serving.ranker_model import Ranking, answered

_MODELS = {CONTROL: "ranker_base", TREATMENT: "ranker_trackrec"}


class TritonPythonModel:
    """A ranker's inputs and `score`, and output `arm` BYTES [1]: the user's bucket; "" outside the experiment, where
    the control's ranker answers."""

    def initialize(self, args: dict[str, str]) -> None:
        contract = ExperimentContract.of(json.loads(args["model_config"]))
        self.experiment = contract.experiment
        contracts = {CONTROL: contract.control, TREATMENT: contract.treatment}
        # Their files lie beside this model's.
        beside = Path(args["model_repository"]).parent
        self.rankings = {
            arm: Ranking(f"{args['model_name']}/{arm}", beside / model / args["model_version"], contracts[arm])
            for arm, model in _MODELS.items()
        }

    def execute(self, requests: list[Any]) -> list[Any]:
        return answered(requests, self._answers)

    def finalize(self) -> None:
        for ranking in self.rankings.values():
            ranking.close()

    def _answers(self, users: list[bytes], candidates: list[list[bytes]]) -> dict[str, list[np.ndarray]]:
        # Bytes that are no text are in no log, but they get an answer, too.
        arms = [self.experiment.bucket(user.decode(errors="replace")) for user in users]
        scores: list[np.ndarray] = [np.empty(0)] * len(users)
        for arm, ranking in self.rankings.items():
            own = [k for k, found in enumerate(arms) if (found or CONTROL) == arm]
            found = ranking.score([users[k] for k in own], [candidates[k] for k in own])
            for k, each in zip(own, found, strict=True):
                scores[k] = each
        return {"score": scores, "arm": [np.array([(arm or "").encode()], dtype=object) for arm in arms]}
