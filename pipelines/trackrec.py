"""Algorithm 2 as a pipeline, from raw data to the report.

Distillation, then T iterations of alternating feedback between G and V; then RecCoTs as a feature of ranking models.
"""

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent

from pipelines.loop import Loop
from pipelines.placement import imported
from pipelines.preparation import preflighted, prepared
from pipelines.ranking import Ranking, reported
from trackrec.run_config import RunConfig


def build(config: RunConfig) -> GraphComponent:
    """The pipeline of a run; where raw data and models lie are parameters, everything else is fixed by the config."""

    @dsl.pipeline(name=config.name, description=__doc__)
    def trackrec(
        raw_data: str = config.raw_data,
        base_model: str = config.base_model,
        encoder: str = config.encoder or "",
    ) -> None:
        checked = preflighted(config, raw_data=raw_data, base_model=base_model, encoder=encoder)
        base = imported(base_model, config.base_model_version, dsl.Model, "base model", checked)
        tables = prepared(config, raw_data, checked)
        loop, last = Loop(config, base, tables), config.loop.iterations

        # Initialize: generator G, by distillation (3.5), and validator V, the instruct model itself.
        generator = loop.distilled() if config.loop.distillation else base
        if config.loop.controls:
            loop.evaluated("no RecCoT, zero-shot", 0, "control", validator=base)
        turns = loop.alternate(generator)
        if config.loop.controls and last:
            # As often as V, on the same examples: the RecCoTs are all that V had more.
            loop.evaluated("no RecCoT, tuned", last, "control", validator=loop.tuned_without_recots())
        if config.loop.controls:
            loop.evaluated(
                "RecCoTs shuffled between users",
                last,
                "control",
                validator=turns.validator,
                recots=turns.recots[last],
                shuffled=True,
            )

        untuned = loop.untuned(turns)

        # Preference utilization (3.6): the RecCoTs of the last G for every backbone (Table 2), those of the earlier for
        # some (Figure 5).
        report = loop.report
        if config.ranking is not None:
            ranking = Ranking(config, imported(encoder, config.encoder_version, dsl.Model, "encoder", checked), tables)
            for t in range(last if config.ranking.by_iteration_of else 0):
                report = ranking.compared(turns.recots[t], t, config.ranking.by_iteration_of, report)
            report = ranking.compared(
                turns.recots[last], last, config.ranking.backbones, report, controls_of=config.ranking.controls_of
            )
        reported(config, report, tables.contexts, turns.recots[0] if last else None, turns.recots[last], untuned)

    return trackrec
