"""`trackrec explain`: a run's artifacts for one user, drawn for the terminal."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from pipelines import single
from pipelines.recording import RunRecord
from trackrec.explain import Explanation, Turn, explain
from trackrec.run_config import RunConfig


def of_run(record: RunRecord, config: RunConfig, user: str, item: str | None) -> Explanation:
    """
    Raises:
        LookupError: the run lacks a task that is needed, or has nothing about the user or item.
    """
    prepared = single.find(record, "contexts").outputs
    base_model = Path(single.find(record, "generate 0").inputs["base_model"].uri)
    turns = []
    for t in range(config.loop.iterations + 1):
        evaluated = single.find(record, f"evaluate (iteration {t})").inputs
        turns.append(Turn(t, Path(evaluated["recots"].uri), Path(evaluated["validator"].uri)))
    return explain(
        turns,
        engine=config.evaluate.engine,
        contexts=Path(prepared["contexts"].uri),
        examples=Path(prepared["examples"].uri),
        items=Path(single.find(record, "ingest").outputs["items"].uri),
        base_model=base_model,
        user=user,
        item=item,
    )


def show(found: Explanation, console: Console) -> None:
    """The history, the RecCoT of each iteration, and V's probability with and without it."""
    history = Table(title=f"What user {escape(found.user_id)} had seen, oldest first", title_justify="left")
    history.add_column("item")
    history.add_column("rating", justify="right")
    history.add_column("liked")
    for entry in found.context["history"]:
        rating = "–" if entry["rating"] is None else f"{entry['rating']:g}"
        history.add_row(escape(entry["title"]), rating, _liked(entry["label"]))
    console.print(history)
    for answer in found.answers:
        console.print(Panel(escape(answer.recot), title=f"RecCoT of iteration {answer.iteration}", title_align="left"))
    table = Table(title="V's probability that the user likes it", title_justify="left")
    table.add_column("item")
    table.add_column("liked")
    table.add_column("iteration", justify="right")
    for heading in ("with the RecCoT", "without", "difference"):
        table.add_column(heading, justify="right")
    for place, target in enumerate(found.targets):
        for answer in found.answers:
            ours, base = answer.with_recot[place], answer.without[place]
            title = f"{escape(target.title)} ({escape(target.item_id)})" if answer is found.answers[0] else ""
            liked = _liked(target.label) if answer is found.answers[0] else ""
            table.add_row(title, liked, str(answer.iteration), f"{ours:.3f}", f"{base:.3f}", f"{ours - base:+.3f}")
        table.add_section()
    console.print(table)


def _liked(label: int | None) -> str:
    return "unknown" if label is None else "yes" if label else "no"
