import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers.trainer
from transformers import TrainerCallback

from tests.stages.training_inputs import TITLES, publish_table, publish_tables
from trackrec import storage
from trackrec.config import LoraSettings, SdpoSettings
from trackrec.llm.models import load_model
from trackrec.stages import sdpo

CONTEXTS = 8
SETTINGS = SdpoSettings(
    learning_rate=3e-3,
    epochs=3,
    batch_size=CONTEXTS,
    micro_batch_size=4,
    lora=LoraSettings(r=4, alpha=8),
    checkpoint_steps=1,
    holdout=0.25,  # c3
)


@pytest.fixture(autouse=True)
def work_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))


@pytest.fixture
def tables(tmp_path: Path) -> Mapping[str, Path]:
    contexts = publish_tables(tmp_path / "tables", CONTEXTS)["contexts"]
    preferences = [
        {
            "context_id": f"c{number}",
            "chosen": f"The user likes {TITLES[number % 6]}.",
            "rejected": [f"I liked {TITLES[(number + j) % 6]} in" for j in (1, 2, 3)],
            "chosen_reward": 0.8,
            "rejected_rewards": [0.4, 0.3, 0.2],
            "chosen_finished": True,
            "rejected_finished": [False, False, False],
        }
        for number in range(CONTEXTS)
    ]
    return {
        "contexts": contexts,
        "preferences": publish_table(tmp_path / "tables" / "preferences", "preferences", preferences),
    }


def facts(directory: Path) -> dict[str, Any]:
    return storage.read_manifest(directory).facts


def test_writes_an_adapter_that_prefers_the_chosen(
    tables: Mapping[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    aligned = tmp_path / "aligned"
    sdpo.run(SETTINGS, **tables, base_model=tiny_model, generator=tiny_model, aligned=aligned)
    measured = facts(aligned)
    assert (measured["examples"], measured["held_out"]) == (CONTEXTS - 1, 1)
    assert measured["steps"] == len(measured["loss"]) == len(measured["reward_margins"]) == 3
    # At first the policy is the reference: every implicit reward is 0 and the loss log N.
    assert measured["loss"][0] == pytest.approx(math.log(4), abs=1e-4)
    assert measured["reward_margins"][0] == pytest.approx(0, abs=1e-3)
    assert measured["reward_margin"] > 0.1 and measured["preference_accuracy"] > 0.9
    load_model(tiny_model, aligned, dtype="float32")  # an adapter on that very base
    assert not any((tmp_path / "work").iterdir()), "checkpoints stay behind"


def test_the_reference_is_the_given_generator(tables: Mapping[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    """The next iteration goes on with the adapter, and starts from a loss of log N again: not from the base model's."""
    for generator, aligned in (("", "first"), ("first", "second")):
        start = tmp_path / generator if generator else tiny_model
        sdpo.run(SETTINGS, **tables, base_model=tiny_model, generator=start, aligned=tmp_path / aligned)
    assert facts(tmp_path / "first")["loss"][-1] < math.log(4) - 0.05
    assert facts(tmp_path / "second")["loss"][0] == pytest.approx(math.log(4), abs=1e-4)


def test_a_killed_stage_goes_on_to_the_same_weights(
    tables: Mapping[str, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {**tables, "base_model": tiny_model, "generator": tiny_model}
    sdpo.run(SETTINGS, **inputs, aligned=tmp_path / "whole", seed=1)

    class Killed(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        callbacks = transformers.trainer.DEFAULT_CALLBACKS
        patch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*callbacks, Killed])
        with pytest.raises(KeyboardInterrupt):
            sdpo.run(SETTINGS, **inputs, aligned=tmp_path / "killed", seed=1)
    assert not (tmp_path / "killed").exists()
    sdpo.run(SETTINGS, **inputs, aligned=tmp_path / "killed", seed=1)
    assert facts(tmp_path / "killed")["resumed_from_step"] == 2
    assert facts(tmp_path / "killed")["loss"] == facts(tmp_path / "whole")["loss"]
    whole, killed = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys()
    assert all(torch.equal(killed[name], weight) for name, weight in whole.items())


def test_a_preference_of_another_contexts_table_is_refused(
    tables: Mapping[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    other = publish_tables(tmp_path / "other", CONTEXTS - 1)["contexts"]
    inputs = {**tables, "contexts": other, "base_model": tiny_model, "generator": tiny_model}
    with pytest.raises(KeyError, match="c7"):
        sdpo.run(SETTINGS, **inputs, aligned=tmp_path / "aligned")
    assert not (tmp_path / "aligned").exists()
