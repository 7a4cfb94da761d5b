"""The stage `gather` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components import images


@dsl.component(base_image=images.released("gather"), install_kfp_package=False)
def gather(table: str, parts: Input[list[Dataset]], joined: Output[Dataset]) -> None:
    """Joins what a stage's shards wrote into the table that one pod would have written.

    Args:
        table: `recots`, `rewards`, `vectors` or `feature_shards`.
        parts: The table's parts, one a shard, in any order.
        joined: The table.
    """
    from pathlib import Path

    from trackrec import storage
    from trackrec.stages import gather as stage

    stage.run(table=table, parts=[Path(part.path) for part in parts], joined=Path(joined.path))
    joined.metadata.update(storage.numbers(joined.path))
