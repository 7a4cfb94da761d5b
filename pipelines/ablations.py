"""What each part of TrackRec is worth (paper 4.4): the loop whole, after one iteration, and without a part of it.

One DAG: what two variants have in common is one task. On one machine, what `pipelines/trackrec.py` has run under the
same config comes from the cache; Kubeflow's cache does not look into runs of a pipeline of another name.
"""

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent

from pipelines.loop import Loop
from pipelines.placement import imported
from pipelines.preparation import preflighted, prepared
from pipelines.ranking import Ranking, reported
from trackrec.run_config import RunConfig


def build(config: RunConfig) -> GraphComponent:
    """The pipeline, with the parameters of `pipelines/trackrec.py`.

    Raises:
        ValueError: the config leaves out what is to be ablated: distillation, or iterating.
    """
    last = config.loop.iterations
    if not config.loop.distillation or last < 2:
        raise ValueError("the pipeline `ablations` needs `loop.distillation: true` and `loop.iterations` of 2 or more")

    @dsl.pipeline(name=f"{config.name}-ablations", description=__doc__)
    def ablations(
        raw_data: str = config.raw_data,
        base_model: str = config.base_model,
        encoder: str = config.encoder or "",
    ) -> None:
        checked = preflighted(config, raw_data=raw_data, base_model=base_model, encoder=encoder)
        base = imported(base_model, config.base_model_version, dsl.Model, "base model", checked)
        tables = prepared(config, raw_data, checked)

        full = Loop(config, base, tables, train_texts_of_first_generator=True)
        turns = full.alternate(full.distilled())
        # Table 6, without M_c, in a single iteration (4.4.1): G stays as distilled, and V is tuned on its texts.
        unaligned = Loop(config, base, tables, variant="no alignment", report=full.report)
        validator = unaligned.tuned(validator=base, iteration=1, recots=turns.recots[0])
        unaligned.evaluated("iteration 1", 1, "iteration", validator=validator, recots=turns.recots[0])
        # Table 7, without M_d: G begins as the base model.
        undistilled = Loop(config, base, tables, variant="no distillation", report=unaligned.report)
        others = undistilled.alternate(base)

        report = undistilled.report
        if config.ranking is not None:
            ranking = Ranking(config, imported(encoder, config.encoder_version, dsl.Model, "encoder", checked), tables)
            ranked = config.ranking.by_iteration_of or config.ranking.backbones
            # Iteration 1 is what both Table 6 and iterating are compared with.
            for t in (1, last):
                report = ranking.compared(turns.recots[t], t, ranked, report)
            report = ranking.compared(turns.recots[0], 0, ranked, report, variant="no alignment")
            report = ranking.compared(others.recots[last], last, ranked, report, variant="no distillation")
        reported(config, report, tables.contexts, turns.recots[0], turns.recots[last], full.untuned(turns))

    return ablations
