"""The stage `preferences` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components import images


@dsl.component(base_image=images.released("preferences"), install_kfp_package=False)
def preferences(
    settings: dict,
    recots: Input[Dataset],
    rewards: Input[Dataset],
    preferences: Output[Dataset],
) -> None:
    """Builds preference sets: the best-rewarded RecCoT against all others (eq. 2).

    A context whose rewards are all equal within the tolerance is dropped and counted.

    Args:
        settings: `trackrec.config.PreferencesSettings`.
        recots: Table `recots`, the samples.
        rewards: Table `rewards`.
        preferences: Table `preferences`.
    """
    from pathlib import Path

    from trackrec import config, storage
    from trackrec.stages import preferences as stage

    stage.run(
        config.PreferencesSettings.model_validate(settings),
        recots=Path(recots.path),
        rewards=Path(rewards.path),
        preferences=Path(preferences.path),
    )
    preferences.metadata.update(storage.numbers(preferences.path))
