"""The stage `active_users` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components import images


@dsl.component(base_image=images.released("active_users"), install_kfp_package=False)
def active_users(
    settings: dict,
    data: dict,
    seed: int,
    as_of: str,
    domain: str,
    history_length: int,
    interactions: Input[Dataset],
    items: Input[Dataset],
    users: Output[Dataset],
) -> None:
    """Finds the users that were active before a moment, each with the last items before it: the batch job's input.

    A user's prompt is the one that `contexts` of kind `snapshot` has at that moment.

    Args:
        settings: `trackrec.serving_config.ActiveUsersSettings`.
        data: `trackrec.data_config.DataSettings`.
        seed: The run's seed, which `max_users` draws with.
        as_of: The job's moment, ISO 8601; empty for the midnight after the last interaction.
        domain: `contexts.domain` of the run that the generator comes from.
        history_length: Items of each user: as many as that run's prompts hold and its ranking models read.
        interactions: Table `interactions`.
        items: Table `items`.
        users: Table `users`.
    """
    from pathlib import Path

    from components.sparkjob import served
    from trackrec import data_config, serving_config, storage
    from trackrec.stages import active_users as stage

    given = settings | ({"as_of": as_of} if as_of else {})
    with served(data_config.DataSettings.model_validate(data)) as engine:
        stage.run(
            serving_config.ActiveUsersSettings.model_validate(given),
            engine,
            seed=seed,
            domain=domain,
            history_length=history_length,
            interactions=Path(interactions.path),
            items=Path(items.path),
            users=Path(users.path),
        )
    users.metadata.update(storage.numbers(users.path))
