"""The stage `tabulate_ctr` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Output

from components import images


@dsl.component(base_image=images.released("tabulate_ctr"), install_kfp_package=False)
def tabulate_ctr(
    variant: str,
    iteration: int,
    recot: Input[Metrics],
    report: Output[Dataset],
    previous: Input[Dataset] = None,
    none: Input[Metrics] = None,
    shuffled: Input[Metrics] = None,
    random: Input[Metrics] = None,
    history: Input[Metrics] = None,
) -> None:
    """Adds one backbone's rankers to the run's results; the inputs are named after what each reads.

    Args:
        variant: `full`, or the ablation whose RecCoTs they are.
        iteration: t of Algorithm 2, of the generator that wrote them.
        recot: Metrics of the ranker with the RecCoTs.
        report: The results with these.
        previous: The results so far.
        none: Metrics of the ranker without.
        shuffled: Metrics of the control: vectors of other users' RecCoTs.
        random: Metrics of the control: random vectors.
        history: Metrics of the control: vectors of the raw histories.
    """
    from pathlib import Path

    from trackrec.stages import tabulate_ctr as stage

    stage.run(
        variant=variant,
        iteration=iteration,
        found=[Path(given.path) for given in (none, recot, shuffled, random, history) if given],
        previous=Path(previous.path) if previous else None,
        report=Path(report.path),
    )
