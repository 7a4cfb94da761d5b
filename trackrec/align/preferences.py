"""Preference sets from rewards (paper eq. 2): the best-rewarded RecCoT of a context against all its others."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass
class Tally:
    """What became of the contexts. `contexts` = preference sets + `dropped_equal` + `dropped_same_text`."""

    contexts: int = 0
    preferences: int = 0
    # All rewards within the tolerance of one another: nothing to prefer.
    dropped_equal: int = 0
    # Every other sample is the chosen text over again: no negative is left.
    dropped_same_text: int = 0
    # Negatives left out, in the sets that remain, because they are the chosen text over again.
    removed_same_text: int = 0


def build(
    recots: Iterable[dict[str, Any]], rewards: Iterable[dict[str, Any]], tolerance: float
) -> tuple[list[dict[str, Any]], Tally]:
    """Preference sets, ordered by context_id; the rejected ones by sample.

    A sample's reward is the mean of r_ij over the context's train examples. Chosen is the sample with the highest
    reward, of equals the one with the lowest index. A text equal to the chosen one is no negative.

    Args:
        recots: rows of table `recots`: N samples a context.
        rewards: rows of table `rewards`: one a context, example and sample.
        tolerance: a context whose highest and lowest reward differ by no more says nothing and is dropped.

    Raises:
        ValueError: a sample is scored on other examples than its siblings, the two tables hold different samples, or
            a reward is no number.
    """
    texts: dict[str, dict[int, str]] = defaultdict(dict)
    finished: dict[str, dict[int, bool]] = defaultdict(dict)
    for row in recots:
        texts[row["context_id"]][row["sample"]] = row["text"]
        finished[row["context_id"]][row["sample"]] = row["finish_reason"] == "stop"
    scored: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rewards:
        scored[row["context_id"]][row["sample"]][row["row_id"]] = row["reward"]
    if texts.keys() != scored.keys():
        odd = sorted(texts.keys() ^ scored.keys())
        raise ValueError(_mismatch(odd[0], f"{len(odd)} contexts are only in one of the two tables"))

    sets: list[dict[str, Any]] = []
    tally = Tally(contexts=len(texts))
    for context_id in sorted(texts):
        samples, by_sample = texts[context_id], scored[context_id]
        if samples.keys() != by_sample.keys():
            raise ValueError(_mismatch(context_id, f"samples {sorted(samples)}, rewards of {sorted(by_sample)}"))
        if len({frozenset(examples) for examples in by_sample.values()}) > 1:
            raise ValueError(_mismatch(context_id, "its samples are scored on different examples"))
        mean = {sample: fmean(examples.values()) for sample, examples in by_sample.items()}
        if not all(map(math.isfinite, mean.values())):
            raise ValueError(f"a reward of context {context_id} is no number; score its RecCoTs again")
        if max(mean.values()) - min(mean.values()) <= tolerance:
            tally.dropped_equal += 1
            continue
        best = min(mean, key=lambda sample: (-mean[sample], sample))
        others = [sample for sample in sorted(samples) if sample != best]
        negatives = [sample for sample in others if samples[sample] != samples[best]]
        if not negatives:
            tally.dropped_same_text += 1
            continue
        tally.removed_same_text += len(others) - len(negatives)
        sets.append(
            {
                "context_id": context_id,
                "chosen": samples[best],
                "rejected": [samples[sample] for sample in negatives],
                "chosen_reward": mean[best],
                "rejected_rewards": [mean[sample] for sample in negatives],
                "chosen_finished": finished[context_id][best],
                "rejected_finished": [finished[context_id][sample] for sample in negatives],
            }
        )
    tally.preferences = len(sets)
    return sets, tally


def _mismatch(context_id: str, what: str) -> str:
    return f"recots and rewards do not belong together: {what} (context {context_id}). Score these RecCoTs again."
