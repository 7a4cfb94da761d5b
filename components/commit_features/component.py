"""The stage `commit_features` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components import images


@dsl.component(base_image=images.released("commit_features"), install_kfp_package=False)
def commit_features(
    settings: dict,
    out: str,
    users: Input[Dataset],
    feature_shards: Input[Dataset],
    committed: Output[Dataset],
) -> None:
    """Checks that a date's features are whole, one row a user, and commits them: from then on rankers read them.

    Args:
        settings: `trackrec.serving_config.FeaturesSettings`.
        out: Where the partitions lie, gs://... or a folder.
        users: Table `users`.
        feature_shards: Table `feature_shards`: what all pods wrote.
        committed: The date's manifest; the metadata name its place.
    """
    from pathlib import Path

    from trackrec import serving_config, storage
    from trackrec.stages import commit_features as stage

    place = stage.run(
        serving_config.FeaturesSettings.model_validate(settings | {"out": out}),
        users=Path(users.path),
        feature_shards=Path(feature_shards.path),
        committed=Path(committed.path),
    )
    committed.metadata.update(storage.numbers(committed.path) | {"place": place})
