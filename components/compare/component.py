"""The stage `compare` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Output

from components import images


@dsl.component(base_image=images.released("compare"), install_kfp_package=False)
def compare(
    report: Input[Dataset],
    contexts: Input[Dataset],
    results: Output[Dataset],
    page: Output[HTML],
    before: Input[Dataset] = None,
    after: Input[Dataset] = None,
    untuned: Input[Dataset] = None,
) -> None:
    """Makes the final report: tables with significance tests, plots and examples, as one HTML page and as CSV.

    Args:
        report: The run's results, as `tabulate` and `tabulate_ctr` collected them.
        contexts: Table `contexts`.
        results: `report.html`, a CSV a table, and `rankings.md`.
        page: The same page, drawn on the run's page.
        before: Table `recots` of the first generator, for the examples.
        after: Table `recots` of the last generator.
        untuned: Table `recots` of the base model as it is, for Table 5a.
    """
    import shutil
    from pathlib import Path

    from trackrec.stages import compare as stage

    stage.run(
        report=Path(report.path),
        contexts=Path(contexts.path),
        before=Path(before.path) if before else None,
        after=Path(after.path) if after else None,
        untuned=Path(untuned.path) if untuned else None,
        results=Path(results.path),
    )
    shutil.copyfile(Path(results.path) / "report.html", page.path)
