"""The model `ranker` of an A/B test in the real server, against its two rankers and the read-out."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tritonclient import grpc as triton
from typer.testing import CliRunner

from tests.serving.ranking import ASKED_ITEMS, USERS, reference, write_features, write_ranker
from trackrec.cli import app
from trackrec.serving import repository, server, smoke
from trackrec.serving.contract import ExperimentContract
from trackrec.serving.feature_store import CACHE_ENV
from trackrec.serving_config import ExperimentSettings, ExportSettings

SETTINGS = ExperimentSettings(salt="exp-1", control=0.25, treatment=0.5)
STRANGERS = [f"user-{k}" for k in range(60)]
ASKED = [*(user.user_id for user in USERS), *STRANGERS]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, server.Server]]:
    folder = tmp_path_factory.mktemp("experiment")
    models = folder / "repository"
    control, treatment = (write_ranker(models, "deepfm", reads=reads) for reads in (False, True))
    repository.write_experiment(
        models / "ranker", ExportSettings(experiment=SETTINGS), control=control, treatment=treatment
    )
    write_features(folder / "features", "2026-11-01", USERS)
    variables = {server.FEATURES_ENV: str(folder / "features"), CACHE_ENV: str(folder / "cache")}
    with server.running(models, folder / "log", models=["ranker"], environment=variables) as running:
        yield models, running


def ask(running: server.Server, users: list[bytes], items: list[str]) -> tuple[np.ndarray, list[str]]:
    """Scores [users, items] and arms [users]."""
    given = [triton.InferInput("user_id", [len(users), 1], "BYTES")]
    given += [triton.InferInput("item_id", [len(users), len(items)], "BYTES")]
    given[0].set_data_from_numpy(np.array([[user] for user in users], dtype=object))
    given[1].set_data_from_numpy(np.array([[item.encode() for item in items]] * len(users), dtype=object))
    with triton.InferenceServerClient(running.grpc) as client:
        found = client.infer("ranker", given)
    return found.as_numpy("score"), [arm.decode() for arm in found.as_numpy("arm")[:, 0]]


def test_each_user_gets_the_ranker_of_its_bucket(served: tuple[Path, server.Server]) -> None:
    models, running = served
    buckets = [SETTINGS.experiment.bucket(user) for user in ASKED]
    assert set(buckets) == {"control", "treatment", None}
    by_model = {
        name: reference(models / name, USERS, ASKED, ASKED_ITEMS) for name in ("ranker_base", "ranker_trackrec")
    }
    # Outside the experiment nobody sees the treatment.
    chosen = ["ranker_trackrec" if bucket == "treatment" else "ranker_base" for bucket in buckets]
    expected = np.array([by_model[model][k] for k, model in enumerate(chosen)])
    assert not np.isclose(by_model["ranker_base"], by_model["ranker_trackrec"], rtol=1e-3).all(axis=1).any()
    scores, arms = [], []
    for start in range(0, len(ASKED), 33):
        found, arm = ask(running, [user.encode() for user in ASKED[start : start + 33]], ASKED_ITEMS)
        scores.append(found)
        arms += arm
    np.testing.assert_allclose(np.concatenate(scores), expected, rtol=2e-5)
    assert arms == [bucket or "" for bucket in buckets]

    def one(number: int) -> None:
        user, items = number % len(ASKED), 1 + number % len(ASKED_ITEMS)
        found, [arm] = ask(running, [ASKED[user].encode()], ASKED_ITEMS[:items])
        np.testing.assert_allclose(found, expected[[user], :items], rtol=2e-5)
        assert arm == (buckets[user] or "")

    # At once: users of both buckets, with several numbers of candidates, in one pass.
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(100)))


def test_bytes_that_are_no_text_are_answered(served: tuple[Path, server.Server]) -> None:
    scores, [arm] = ask(served[1], [b"\xff\xfe"], ASKED_ITEMS)
    assert np.isfinite(scores).all() and arm in ("control", "treatment", "")


def test_what_was_served_is_what_is_read_out(served: tuple[Path, server.Server], tmp_path: Path) -> None:
    """The read-out computes buckets from the salt, and refuses a log whose users were in others."""
    arms = [ask(served[1], [user.encode()], ASKED_ITEMS[:1])[1][0] for user in STRANGERS]
    rows = {"user_id": STRANGERS, "bucket": arms, "conversions": [k % 3 for k in range(len(arms))]}
    rows["revenue"] = [1.0 + k % 5 for k in range(len(arms))]
    shares = ["--share", f"control={SETTINGS.control}", "--share", f"treatment={SETTINGS.treatment}"]

    def read_out() -> tuple[int, str]:
        pq.write_table(pa.table(rows), tmp_path / "log.parquet")
        options = ["abtest", f"--log={tmp_path / 'log.parquet'}", f"--salt={SETTINGS.salt}", *shares]
        found = CliRunner().invoke(app, [*options, "--bootstrap=0", "--halvings=0"])
        return found.exit_code, found.output

    assert "" in arms
    code, output = read_out()
    assert code == 0 and f"treatment {arms.count('treatment')}" in output, output
    rows["bucket"] = ["control" if arm == "treatment" and k > 30 else arm for k, arm in enumerate(arms)]
    code, output = read_out()
    assert code == 1 and "in another bucket than salt" in output


def test_it_passes_the_inference_of_a_version(served: tuple[Path, server.Server]) -> None:
    """Someone of each bucket is asked for."""
    models, running = served
    expected = smoke.expected(models)
    answer = smoke.check(running.grpc, smoke.Expected({"ranker": expected.versions["ranker"]}, expected.items))
    assert answer["ranker"]["scores"].keys() == {"control", "treatment"}
    contract = ExperimentContract.of(repository.read_config(models / "ranker"))
    assert contract.experiment == SETTINGS.experiment
    assert contract.model_version == expected.versions["ranker"] != contract.treatment.model_version
    # One that buckets otherwise than its config says does not.
    other = contract.model_copy(update={"experiment": SETTINGS.model_copy(update={"salt": "exp-2"}).experiment})
    with (
        triton.InferenceServerClient(running.grpc) as client,
        pytest.raises(smoke.SmokeError, match=r"ranker puts user trackrec-smoke-\d+ into .* in bucket 'treatment'"),
    ):
        smoke._split(client, "ranker", other, expected.items, lambda: 20)


def test_another_salt_or_share_is_another_version(served: tuple[Path, server.Server], tmp_path: Path) -> None:
    first = ExperimentContract.of(repository.read_config(served[0] / "ranker"))
    changes: list[dict[str, object]] = [{}, {"salt": "exp-2"}, {"control": 0.1}]
    versions = {
        repository.write_experiment(
            tmp_path / str(k),
            ExportSettings(experiment=SETTINGS.model_copy(update=change)),
            control=first.control,
            treatment=first.treatment,
        ).model_version
        for k, change in enumerate(changes)
    }
    assert len(versions) == 3 and first.model_version in versions
