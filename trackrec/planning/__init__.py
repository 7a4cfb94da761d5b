"""What a run will take: tokens, GPU hours, cost, memory and disk, from a stated model."""

from collections.abc import Sequence

from trackrec.planning import estimate, tables
from trackrec.planning.rates import Rates, read
from trackrec.run_config import RunConfig

__all__ = ["Rates", "read", "report"]


def report(config: RunConfig, rates: Rates, users: Sequence[int]) -> str:
    """The plan of a run, or of the production job for each number of `users`, as Markdown.

    Raises:
        ConfigError: the data's size or the model's shape is not known; says what to give.
    """
    shape, sizes = estimate.shape_of(config, rates), estimate.sizes_of(config, rates)
    if users:
        jobs = [(count, estimate.nightly(config, rates, shape, count)) for count in users]
        text, estimates = tables.of_users(rates, jobs), list(jobs[0][1])
    else:
        estimates = estimate.of_run(config, rates, shape, sizes)
        text = tables.of_run(estimates)
    cards = [one.card for one in estimates if one.card]
    faults = "".join(f"\n- does not fit: {line}" for line in estimate.faults(config, estimates))
    return f"{text}\n\n{tables.sources(rates, cards, config.ingest.dataset)}{faults}"
