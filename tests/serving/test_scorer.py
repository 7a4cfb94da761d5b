"""Scores of the online ranker against the ranking model itself, on rows numbered by training's own code."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from tests.serving.ranking import ASKED_ITEMS, ASKED_USERS, SEED, USERS, reference, write_features, write_ranker
from trackrec.config import Backbone
from trackrec.features.partition import Place, read_manifest
from trackrec.serving import scorer as scorers
from trackrec.serving.contract import RankerContract
from trackrec.serving.feature_table import FeatureTable, open_or_build
from trackrec.serving.scorer import Scorer


def table_of(root: Path, dt: str, scorer: Scorer, contract: RankerContract, cache: Path) -> FeatureTable:
    manifest = read_manifest(Place(str(root)), dt)
    assert manifest is not None
    cache.mkdir(exist_ok=True)
    return open_or_build(
        Place(str(root / f"dt={dt}")), manifest, scorer, version=contract.model_version,
        encoder_version=contract.encoder_version, cache=cache,
    )  # fmt: skip


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("backbone", get_args(Backbone))
def test_the_scores_are_the_rankers_own(backbone: Backbone, reads: bool, tmp_path: Path) -> None:
    """Users with and without history, RecCoT and number; items that training, or even the catalogue, does not have."""
    contract = write_ranker(tmp_path, backbone, reads=reads)
    model = tmp_path / ("ranker_trackrec" if reads else "ranker_base")
    write_features(tmp_path / "features", "2026-11-28", USERS)
    scorer = Scorer(model / "1", SEED)
    table = table_of(tmp_path / "features", "2026-11-28", scorer, contract, tmp_path / "cache")
    users, items = ([text.encode() for text in texts] for texts in (ASKED_USERS, ASKED_ITEMS))
    expected = reference(model, USERS, ASKED_USERS, ASKED_ITEMS)
    # As good as no two rows are alike: a mixed-up row would show.
    assert len(np.unique(expected.round(5))) > expected.size // 2
    known = table.users(table.rows(users))
    np.testing.assert_allclose(scorer.score(users, known, [items] * len(users)), expected, rtol=2e-5)
    # Different numbers of candidates, and another order of users; a single row.
    ragged = scorer.score(users[::-1], table.users(table.rows(users[::-1])), [items[: 1 + k % 6] for k in range(8)])
    for k, scores in enumerate(ragged):
        np.testing.assert_allclose(scores, expected[7 - k, : 1 + k % 6], rtol=2e-5)
    [alone] = scorer.score(users[:1], table.users(table.rows(users[:1])), [items[:1]])
    np.testing.assert_allclose(alone, expected[0, :1], rtol=2e-5)


def test_without_a_feature_table_every_user_is_nobody(tmp_path: Path) -> None:
    write_ranker(tmp_path, "din", reads=True)
    model = tmp_path / "ranker_trackrec"
    scorer = Scorer(model / "1", SEED)
    found = scorer.score([b"u0"], scorer.no_one(), [[item.encode() for item in ASKED_ITEMS]])
    np.testing.assert_allclose(found, reference(model, [], ["u0"], ASKED_ITEMS), rtol=2e-5)


def test_many_candidates_are_scored_in_several_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that end inside a user's candidates, and hold those of several."""
    contract = write_ranker(tmp_path, "din", reads=True)
    write_features(tmp_path / "features", "2026-11-28", USERS)
    scorer = Scorer(tmp_path / "ranker_trackrec/1", SEED)
    table = table_of(tmp_path / "features", "2026-11-28", scorer, contract, tmp_path / "cache")
    users, items = ([text.encode() for text in texts] for texts in (ASKED_USERS, ASKED_ITEMS))
    asked = [items[: 1 + k % 6] for k in range(len(users))]
    whole = scorer.score(users, table.users(table.rows(users)), asked)
    for rows in (1, 4, 7):
        monkeypatch.setattr(scorers, "_CHUNK", rows)
        for scores, expected in zip(scorer.score(users, table.users(table.rows(users)), asked), whole, strict=True):
            np.testing.assert_allclose(scores, expected, rtol=2e-5)
