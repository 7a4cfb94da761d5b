"""The stage `ingest` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components import images


@dsl.component(base_image=images.released("ingest"), install_kfp_package=False)
def ingest(
    settings: dict,
    data: dict,
    interactions: Output[Dataset],
    items: Output[Dataset],
    raw: Input[Dataset] = None,
    raw_uri: str = "",
    raw_version: str = "",
) -> None:
    """Turns raw files into interactions (split, label, rating, time, history) and items.

    MovieLens and Amazon-Book follow CoLLM's recipes row by row (paper 4.1.1); a company's own impression log comes
    with a declared column mapping.

    Args:
        settings: `trackrec.config.IngestSettings`.
        data: `trackrec.data_config.DataSettings`.
        interactions: Table `interactions`.
        items: Table `items`.
        raw: The raw file or folder, or else:
        raw_uri: Where the engine itself reads a log.
        raw_version: What lies there, by any name: a new one runs the stage anew.
    """
    from pathlib import Path

    from components.sparkjob import served
    from trackrec import config, data_config, storage
    from trackrec.stages import ingest as stage

    with served(data_config.DataSettings.model_validate(data)) as engine:
        stage.run(
            config.IngestSettings.model_validate(settings),
            engine,
            raw=Path(raw.path) if raw else raw_uri,
            raw_version=raw_version,
            interactions=Path(interactions.path),
            items=Path(items.path),
        )
    interactions.metadata.update(storage.numbers(interactions.path))
    items.metadata.update(storage.numbers(items.path))
