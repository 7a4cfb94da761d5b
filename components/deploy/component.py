"""The stage `deploy` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Model, Output

from components import images


@dsl.component(base_image=images.released("deploy"), install_kfp_package=False)
def deploy(settings: dict, run: str, repository: Input[Model], rollout: Output[Artifact]) -> None:
    """Rolls the Triton Deployment to a version, one pod at a time; puts the old one back if the new one fails.

    A version counts once every new pod is ready and has passed a smoke inference; until then the old pods serve. One
    that is there already costs nothing.

    Args:
        settings: `trackrec.serving_config.DeploySettings`.
        run: The run's id: what one of its tries has put back, the next does not roll out again.
        repository: The version: what the stage `export` wrote.
        rollout: What was rolled out: version, place, the version before, each new pod's smoke inference.
    """
    from pathlib import Path

    from components.rollout import roller
    from trackrec import serving_config, storage
    from trackrec.stages import deploy as stage

    given = serving_config.DeploySettings.model_validate(settings)
    stage.run(given, repository=Path(repository.path), rollout=Path(rollout.path), roll=roller(given, run))
    rollout.metadata.update(storage.numbers(rollout.path))
