"""The plan as Markdown."""

from collections.abc import Collection, Sequence

from trackrec.planning.estimate import Estimate
from trackrec.planning.memory import GIB, TEXT_BYTES
from trackrec.planning.rates import Rates

_NONE = "–"


def of_run(estimates: Sequence[Estimate]) -> str:
    """A row a stage; the hours and the cost of all its tasks together, the GPU and the disk of one pod."""
    head = ["stage", "tasks", "contexts", "prompts", "tokens in", "tokens out", "tokens/s a GPU", "GPUs"]
    head += ["GPU hours", "wall hours", "USD", "GPU memory, GiB", "disk, GiB", "work directory, GiB"]
    rows = [
        [
            f"`{one.work.stage}`",
            f"{one.work.tasks}",
            *(_count(value) for value in (one.work.contexts, one.work.prompts)),
            *(_tokens(value) for value in (one.work.tokens_in, one.work.tokens_out)),
            f"{one.tokens_per_second:,.0f}" if one.tokens_per_second else _NONE,
            (f"{one.pods} × {one.gpus}" if one.pods > 1 else f"{one.gpus}") if one.gpus else _NONE,
            _hours(one.gpu_hours),
            _hours(one.wall_hours),
            _hours(one.usd),
            _memory(one),
            _gib(one.disk_bytes),
            _gib(one.work_bytes or None),
        ]
        for one in estimates
    ]
    if any(one.gpu_hours for one in estimates):  # else most of them are not known
        sums = [sum(getattr(one, name) or 0.0 for one in estimates) for name in ("gpu_hours", "wall_hours", "usd")]
        rows.append(["**all**", *[""] * 7, *(f"**{_hours(total)}**" for total in sums), *[""] * 3])
    return _table(head, rows)


def of_users(rates: Rates, by_users: Sequence[tuple[int, Sequence[Estimate]]]) -> str:
    """A row for each number of active users: `generate` and `encode` of one RecCoT each."""
    head = ["active users", "tokens in", "tokens out", "GPU hours: generate", "GPU hours: encode", "USD"]
    head += ["USD a million users", f"GPUs for {rates.window_hours:g} hours", "RecCoTs, GiB", "vectors, GiB"]
    rows = []
    for users, estimates in by_users:
        hours = [one.gpu_hours for one in estimates]
        usd = sum(one.usd or 0.0 for one in estimates)
        known = [value for value in hours if value is not None]
        texts, vectors = estimates[0].work.tokens_out * TEXT_BYTES, users * rates.vector_width * 4
        rows.append(
            [
                f"{users:,}",
                *(_tokens(getattr(estimates[0].work, name)) for name in ("tokens_in", "tokens_out")),
                *(_hours(value) for value in hours),
                *(_hours(value) if known else _NONE for value in (usd, usd / users * 1e6)),
                f"{-(-sum(known) // rates.window_hours):,.0f}" if known else _NONE,
                _gib(texts),
                _gib(vectors),
            ]
        )
    return _table(head, rows)


def sources(rates: Rates, cards: Collection[str], datasets: Sequence[str]) -> str:
    """What the numbers rest on, as a list."""
    lines = [
        "- speeds on one H100 80GB, of a model of 7.6 billion parameters (encode: of a BERT base); another model's by "
        "its parameters, another card's by its TFLOP/s, and of what is written by its TB/s:"
    ]
    lines += [
        f"  - {name.replace('_', ' ')}: {speed['tokens_per_second']:,.0f} tokens/s – {speed['source']}"
        for name, speed in rates.speeds.model_dump().items()
    ]
    lines += [
        f"- {name}: {card.usd_per_hour:g} USD an hour (assumed), {card.memory_gib:g} GiB, {card.tflops:g} TFLOP/s, "
        f"{card.terabytes_per_second:g} TB/s"
        for name, card in rates.cards.items()
        if name in cards
    ]
    for dataset in dict.fromkeys(datasets):
        sizes = rates.datasets[dataset]
        lines.append(
            f"- {dataset}: {sizes.contexts.all:,} contexts and {sizes.examples.all:,} examples – {sizes.source}"
        )
    lengths = rates.lengths
    lines += [
        f"- tokens: G's prompt {lengths.prompt:g}, V's {lengths.history + lengths.target + lengths.closing:g} and the "
        f"RecCoT, a RecCoT {lengths.recot:g} – {lengths.source}",
        f"- assumed: {rates.start_seconds:g} s to start a pod, {rates.zero_efficiency:g} of the speed left under ZeRO, "
        f"{rates.ctr_epochs:g} epochs of a ranking model, {rates.usd_per_core_hour:g} USD a core and hour",
    ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = [":---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *rows))


def _count(value: int) -> str:
    return f"{value:,}" if value else _NONE


def _tokens(value: float) -> str:
    if not value:
        return _NONE
    return f"{value / 1e6:,.1f} M" if value >= 1e5 else f"{value / 1e3:,.1f} K"


def _hours(value: float | None) -> str:
    if value is None:
        return _NONE
    if value < 0.1:
        return f"{value:.3f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _gib(value: float | None) -> str:
    return f"{value / GIB:,.0f}" if value is not None else _NONE


def _memory(one: Estimate) -> str:
    if one.gpu_bytes is None:
        return _NONE
    of = f" of {one.room_bytes / GIB:.0f}" if one.room_bytes else ""
    return f"{one.gpu_bytes / GIB:.0f}{of}"
