"""The stage `preflight` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Markdown, Output

from components import images


@dsl.component(base_image=images.released("preflight"), install_kfp_package=False)
def preflight(
    config: dict,
    raw_data: str,
    base_model: str,
    encoder: str,
    checks: Output[Markdown],
    triton: str = "",
    out: str = "",
) -> None:
    """Checks in seconds what a run needs, before any of its stages takes a GPU, and says all that is wrong at once.

    Secrets, the artifact root, base model and encoder (their small files alone are read), the tokenizer's Yes and No,
    the teacher, and GPU memory and disk against the plan's estimate. For the batch feature job: Triton with its models.

    Args:
        config: `trackrec.run_config.RunConfig`.
        raw_data: The raw data's URI; empty where the run reads none.
        base_model: The base model's URI; empty where the run trains ranking models alone.
        encoder: The encoder's URI; empty without `ranking`.
        checks: What was looked at.
        triton: HOST:PORT of Triton's gRPC endpoint; empty but for the batch feature job.
        out: Where that job's features go; empty but for it.
    """
    from pathlib import Path

    from trackrec.run_config import RunConfig
    from trackrec.stages import preflight as stage

    stage.run(
        RunConfig.model_validate(config),
        root=checks.uri.rpartition("/")[0],
        raw_data=raw_data,
        base_model=base_model,
        encoder=encoder,
        checks=Path(checks.path),
        triton=triton,
        out=out,
    )
