"""Where distillation's RecCoTs come from (paper 3.5): a file of recorded ones, or an OpenAI-compatible endpoint."""

from collections.abc import Iterable

from trackrec import seeds


def choose(context_ids: Iterable[str], number: int, seed: int) -> list[str]:
    """`number` of the contexts (all, if there are fewer), drawn by a hash of each.

    Neither their order nor the other contexts matter, and a larger number draws the same ones and more.
    """
    return sorted(context_ids, key=lambda context_id: seeds.derive(seed, "distill_data", context_id))[:number]
