"""The stage `tabulate` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Markdown, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.released("tabulate"), install_kfp_package=False)
def tabulate(
    label: str,
    iteration: int,
    kind: str,
    variant: str,
    metrics: Input[Metrics],
    report: Output[Dataset],
    table: Output[Markdown],
    previous: Input[Dataset] = None,
    rewards: Input[Dataset] = None,
    generator: Input[Model] = None,
) -> None:
    """Adds one evaluation to the run's table (Figure 5's x-axis, with the controls and the baseline beside it).

    The table grows along the pipeline, so each iteration's result shows as soon as it is there.

    Args:
        label: The row's name.
        iteration: t of Algorithm 2; 0 is before the first alignment.
        kind: `iteration` or `control`.
        variant: `full`, or the ablation it is of.
        metrics: The evaluation.
        report: The table so far as CSV, JSON and Markdown.
        table: The same, drawn on the run's page.
        previous: The report that this row is added to.
        rewards: This iteration's table `rewards`.
        generator: This iteration's G, for its preference accuracy.
    """
    from pathlib import Path

    from trackrec.stages import tabulate as stage

    stage.run(
        label=label,
        iteration=iteration,
        kind=kind,
        variant=variant,
        metrics=Path(metrics.path),
        previous=Path(previous.path) if previous else None,
        rewards=Path(rewards.path) if rewards else None,
        generator=Path(generator.path) if generator else None,
        report=Path(report.path),
    )
    Path(table.path).write_text((Path(report.path) / "report.md").read_text(encoding="utf-8"), encoding="utf-8")
