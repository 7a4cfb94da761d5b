"""Stage `preflight`: what a run needs from outside, checked before any of its stages takes a GPU.

It alone of all stages reads the whole config, what is asked of pods included.
"""

from collections.abc import Iterator
from pathlib import Path

from trackrec.config_file import ConfigError
from trackrec.planning import estimate
from trackrec.planning.estimate import Estimate
from trackrec.planning.rates import Rates, Sizes, Splits
from trackrec.planning.shapes import ModelShape, known
from trackrec.preflight import models, serving, surroundings
from trackrec.preflight.findings import Finding, PreflightError
from trackrec.preflight.folders import can_be_read, open_folder
from trackrec.run_config import RunConfig, secrets_of
from trackrec.storage import RemoteError

# Of data whose size is not known: what a stage's weights and activations take does not hang on it.
_ANY = Sizes(
    raw_rows=1,
    contexts=Splits(train=1, valid=1, test=1),
    examples=Splits(train=1, valid=1, test=1),
    source="not known",
)


def run(
    config: RunConfig,
    *,
    root: str,
    raw_data: str,
    base_model: str,
    encoder: str,
    checks: Path,
    triton: str = "",
    out: str = "",
) -> None:
    """Writes what was found as Markdown, where nothing is wrong.

    Args:
        root: the URI under which the run's artifacts go.
        raw_data, base_model, encoder: their URIs in this run; an empty one is not used. Without a base model the run
            trains ranking models alone.
        triton, out: Triton's address and the features' place, of the batch feature job alone, which trains nothing.
    Raises:
        PreflightError: all that is wrong, a line each.
    """
    found = list(_findings(config, root, raw_data, base_model, encoder, triton, out))
    for finding in found:
        print(finding)
    faults = [finding for finding in found if finding.level == "fault"]
    if faults:
        lines = "\n".join(f"  {number}. {finding.text}" for number, finding in enumerate(faults, start=1))
        count = "1 thing" if len(faults) == 1 else f"{len(faults)} things"
        raise PreflightError(f"{count} to mend before this run can go through:\n{lines}")
    checks.write_text("\n".join(f"- {finding}" for finding in found) + "\n", encoding="utf-8")


def _findings(
    config: RunConfig, root: str, raw_data: str, base_model: str, encoder: str, triton: str, out: str
) -> Iterator[Finding]:
    teacher = config.distill_data.teacher if base_model and config.loop.distillation and config.distill_data else None
    secrets = secrets_of(config, loop=bool(base_model), features=bool(triton)) if surroundings.in_pod() else {}
    if secrets:
        yield from surroundings.secrets(secrets)
    yield from surroundings.artifact_root(root)
    if raw_data:
        yield from surroundings.raw_data(raw_data)
    if base_model:
        yield from models.base_model(base_model)
    if triton:
        yield from serving.triton(triton, config.contexts.domain, config.user_history_length)
        yield from serving.features(out, pod=surroundings.in_pod())
    elif config.ranking is not None:
        yield from models.encoder(encoder, config.train_ctr.vector_width)
    if teacher is not None:
        yield from surroundings.teacher(teacher, looked_for=secrets)
    estimates = _estimates(config, base_model)
    if not estimates:
        return
    if surroundings.in_pod():
        yield from surroundings.capacity(config, estimates)
        if config.resources.preflight.work_claim:
            yield from surroundings.work_space(estimates)
    else:
        yield from surroundings.work_space(estimates)
        yield from surroundings.artifact_space(Path(root), estimates)


def _estimates(config: RunConfig, base_model: str) -> list[Estimate]:
    """The plan under the base model that this run has; none without one, or where its shape cannot be known."""
    shape = _shape(base_model) if base_model else None
    if shape is None:
        return []
    rates = Rates()
    try:
        sizes = estimate.sizes_of(config, rates)
    except ConfigError:
        sizes = _ANY
    return estimate.of_run(config, rates, shape, sizes)


def _shape(base_model: str) -> ModelShape | None:
    if not can_be_read(base_model):
        return known(base_model)
    try:
        return models.shape_of(open_folder(base_model))
    except (models.BrokenError, RemoteError):  # it is a finding already
        return None
