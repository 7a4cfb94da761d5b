"""Table 5a: what a RecCoT of the aligned G costs, in tokens and seconds, against one of the untuned model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

# A context's RecCoT: its tokens, and whether it was cut at the limit.
Texts = Mapping[str, tuple[int, bool]]
TITLE = "Table 5a: what a RecCoT costs"


@dataclass(frozen=True)
class Timing:
    """What the task that wrote a generator's texts measured."""

    # How many its last try wrote; texts that a killed try before it had finished are not among them.
    decoded: int
    # Of that try's decoding, with many texts at once: the inverse of texts a second, not what a user would wait.
    seconds: float
    # What it ran under: seconds of different settings do not compare.
    settings: object


@dataclass(frozen=True)
class Cost:
    """One line of the table."""

    model: str
    recots: int
    mean_tokens: float
    p95_tokens: float
    # The share that was cut at the token limit: their tokens are the limit's.
    cut: float
    # Null where it was not measured.
    seconds: float | None
    # The number of texts behind `seconds`.
    timed: int


@dataclass(frozen=True)
class Efficiency:
    """Both generators on the same contexts; `difference` is the aligned G's tokens less the untuned model's."""

    untuned: Cost
    aligned: Cost
    difference: float
    # 95 %, over contexts.
    low: float
    high: float
    reason: str = ""

    @property
    def costs(self) -> Sequence[Cost]:
        return self.untuned, self.aligned

    @property
    def verdict(self) -> str:
        """One sentence, whichever way it went."""
        apart = self.high < 0 or self.low > 0
        how = ("shorter" if self.difference < 0 else "longer") if apart else "not told apart in length"
        text = (
            f"The aligned G's RecCoTs are {how}: {self.aligned.mean_tokens:.1f} tokens against "
            f"{self.untuned.mean_tokens:.1f} of the untuned model ({self.difference:+.1f}, 95 % over contexts "
            f"[{self.low:+.1f}, {self.high:+.1f}])"
        )
        ours, theirs = self.aligned.seconds, self.untuned.seconds
        if ours is None or theirs is None:
            return f"{text}; {self.reason}."
        return f"{text}; one takes {ours:.3f} s against {theirs:.3f} s ({ours / theirs:.2f} times)."

    @property
    def notes(self) -> list[str]:
        """What to know when reading the table."""
        said = [
            f"Tokens are of the {self.aligned.recots} contexts that both wrote for. Seconds are decoding "
            "time over texts, many being decoded at once (not what one text takes alone), of the task as it ran: a "
            "task from the cache was timed when it first ran, and one that a kill interrupted for the rest of its "
            "texts. The paper has 1.303 s and 0.613 s on one A800.",
        ]
        if self.untuned.cut or self.aligned.cut:
            said.append("A text that was cut at the token limit would have been longer.")
        return said


def measured(texts: tuple[Texts, Texts], timings: tuple[Timing, Timing]) -> Efficiency | None:
    """
    Args:
        texts, timings: of the untuned model, then of the aligned G.

    Returns:
        None where no context has a text of both.
    """
    names = sorted(texts[0].keys() & texts[1].keys())
    if not names:
        return None
    reason = ""
    if any(not timing.decoded for timing in timings):
        reason = "no seconds, as a killed try had written all of one side's texts"
    elif timings[0].settings != timings[1].settings:
        reason = "no seconds, as both were written under different settings"
    costs = [
        _cost(model, [own[name] for name in names], None if reason else timing)
        for model, own, timing in zip(("untuned", "aligned"), texts, timings, strict=True)
    ]
    differences = np.array([texts[1][name][0] - texts[0][name][0] for name in names], dtype=np.float64)
    mean = float(differences.mean())
    margin = 1.96 * float(differences.std(ddof=1)) / sqrt(len(names)) if len(names) > 1 else float("inf")
    return Efficiency(costs[0], costs[1], mean, mean - margin, mean + margin, reason)


def _cost(model: str, texts: list[tuple[int, bool]], timing: Timing | None) -> Cost:
    tokens = np.array([count for count, _ in texts])
    return Cost(
        model=model,
        recots=len(texts),
        mean_tokens=float(tokens.mean()),
        p95_tokens=float(np.quantile(tokens, 0.95)),
        cut=float(np.mean([was_cut for _, was_cut in texts])),
        seconds=timing.seconds if timing else None,
        timed=timing.decoded if timing else 0,
    )


def markdown(found: Efficiency) -> str:
    """The table as GitHub Markdown, its verdict and its notes."""
    lines = [f"## {TITLE}", "", "| model | RecCoTs | mean tokens | p95 tokens | cut | s per RecCoT |"]
    lines.append("| :--- |" + " ---: |" * 5)
    for cost in found.costs:
        seconds = "–" if cost.seconds is None else f"{cost.seconds:.3f}"
        lines.append(
            f"| {cost.model} | {cost.recots} | {cost.mean_tokens:.1f} | {cost.p95_tokens:.1f} | {cost.cut:.0%} | "
            f"{seconds} |"
        )
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in (found.verdict, *found.notes))]) + "\n"
