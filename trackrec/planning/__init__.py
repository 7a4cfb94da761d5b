"""What a run will take: tokens, GPU hours, cost, memory and disk, from a stated model."""

from collections.abc import Sequence

from trackrec.planning import estimate, tables
from trackrec.planning.estimate import Estimate
from trackrec.planning.rates import Rates, read
from trackrec.run_config import RunConfig

__all__ = ["Rates", "read", "report"]


def report(configs: Sequence[RunConfig], rates: Rates, users: Sequence[int]) -> str:
    """The plan of each run, and of the first one's production job for each number of `users`, as Markdown.

    Raises:
        ConfigError: the data's size or the model's shape is not known; says what to give.
    """
    parts: list[str] = []
    planned: list[Estimate] = []
    for config in configs:
        shape, sizes = estimate.shape_of(config, rates), estimate.sizes_of(config, rates)
        run = estimate.of_run(config, rates, shape, sizes)
        parts += [f"`{config.name}`:", tables.of_run(run)]
        if faults := list(estimate.faults(config, run)):
            parts.append("\n".join(f"- does not fit: {line}" for line in faults))
        planned += run
    if users:
        shape = estimate.shape_of(configs[0], rates)
        jobs = [(count, estimate.nightly(configs[0], rates, shape, count)) for count in users]
        parts += [f"One RecCoT and one vector for each active user, `{configs[0].name}`:", tables.of_users(rates, jobs)]
    cards = {one.card for one in planned if one.card}
    datasets = [config.ingest.dataset for config in configs]
    return "\n\n".join([*parts, "These rest on", tables.sources(rates, cards, datasets)])
