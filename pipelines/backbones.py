"""Finished RecCoTs as a feature of ranking models (paper 3.6, Table 2): another encoder, grid or set of backbones."""

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent

from pipelines.placement import imported
from pipelines.preparation import Tables, preflighted
from pipelines.ranking import Ranking, reported
from trackrec.run_config import RunConfig


def build(config: RunConfig) -> GraphComponent:
    """The pipeline; the tables of a finished run are parameters.

    Raises:
        ValueError: the config has no `ranking`.
    """
    ranked = config.ranking
    if ranked is None:
        raise ValueError("the pipeline `backbones` needs `ranking` in the config")

    @dsl.pipeline(name=f"{config.name}-backbones", description=__doc__)
    def backbones(
        interactions: str,
        items: str,
        contexts: str,
        examples: str,
        recots: str,
        encoder: str = config.encoder or "",
    ) -> None:
        checked = preflighted(config, encoder=encoder)
        tables = Tables(
            imported(interactions, "", dsl.Dataset, "interactions", checked),
            imported(items, "", dsl.Dataset, "items", checked),
            imported(contexts, "", dsl.Dataset, "contexts", checked),
            imported(examples, "", dsl.Dataset, "examples", checked),
        )
        texts = imported(recots, "", dsl.Dataset, "recots", checked)
        ranking = Ranking(config, imported(encoder, config.encoder_version, dsl.Model, "encoder", checked), tables)
        report = ranking.compared(texts, config.loop.iterations, ranked.backbones, None, controls_of=ranked.controls_of)
        reported(config, report, tables.contexts, None, texts)

    return backbones
