"""A stage's component by the stage's name: folder, function and config section are all called after the stage."""

import importlib

from kfp.dsl.python_component import PythonComponent

from components import images

STAGES = tuple(images.IMAGE_OF)


def load(stage: str) -> PythonComponent:
    """
    Raises:
        KeyError: there is no such stage; names those there are.
    """
    if stage not in images.IMAGE_OF:
        raise KeyError(f"no stage {stage!r}; there are: {', '.join(STAGES)}")
    component: PythonComponent = getattr(importlib.import_module(f"components.{stage}.component"), stage)
    return component
