"""The stage `ingest` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components import images


@dsl.component(base_image=images.released("ingest"), install_kfp_package=False)
def ingest(
    settings: dict,
    raw: Input[Dataset],
    interactions: Output[Dataset],
    items: Output[Dataset],
) -> None:
    """Turns raw files into interactions (split, label, rating, time, history) and items.

    MovieLens and Amazon-Book follow CoLLM's recipes row by row (paper 4.1.1); a company's own impression log comes
    with a declared column mapping.

    Args:
        settings: `trackrec.config.IngestSettings`.
        raw: The raw file or folder.
        interactions: Table `interactions`.
        items: Table `items`.
    """
    from pathlib import Path

    from trackrec import config, storage
    from trackrec.stages import ingest as stage

    stage.run(
        config.IngestSettings.model_validate(settings),
        raw=Path(raw.path),
        interactions=Path(interactions.path),
        items=Path(items.path),
    )
    interactions.metadata.update(storage.numbers(interactions.path))
    items.metadata.update(storage.numbers(items.path))
