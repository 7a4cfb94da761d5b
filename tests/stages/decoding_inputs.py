"""Contexts, and an engine that is killed half way, for the tests of `sample`, `generate` and `score`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.tables import publish
from trackrec.config import EngineSettings
from trackrec.llm.engine import Engine, open_engine

TITLES = ["Heat (1995)", "Alien (1979)", "Babe (1995)", "Fargo (1996)"]


class Killed(Exception):
    pass


def contexts(directory: Path, train: int = 4) -> Path:
    """`train` train contexts c0…, and two held-out ones."""
    splits = ["train"] * train + ["valid", "test"]
    return publish(directory, contexts=[context(f"c{k}", k, split) for k, split in enumerate(splits)])


def examples(directory: Path, train: int = 4) -> Path:
    """One example a context of `contexts`, of its split, and a test example in c0, a train context."""
    splits = ["train"] * train + ["valid", "test"]
    rows = [example(k, f"c{k}", split) for k, split in enumerate(splits)]
    return publish(directory, examples=[*rows, example(train + 2, "c0", "test")])


def example(row_id: int, context_id: str, split: str) -> dict[str, Any]:
    shown = {"row_id": row_id, "split": split, "context_id": context_id, "user_id": context_id, "item_id": "i"}
    return shown | {"title": TITLES[0], "label": 1, "user_train_rows": 1, "item_train_rows": 1, "item_mean": None}


def context(name: str, number: int, split: str) -> dict[str, Any]:
    history = [
        {"title": TITLES[(number + k) % 4], "rating": float(1 + k), "label": k % 2} for k in range(1 + number % 3)
    ]
    shown = {"context_id": name, "user_id": f"u{number}", "as_of": number, "split": split}
    return shown | {"domain": "movies", "history": history}


def watched(killed_after: int | None, asked: list[int]) -> Callable[[EngineSettings, Path, Path], Engine]:
    """`open_engine` whose engine's methods note how many results were asked for, and stop after so many."""

    def opened(settings: EngineSettings, base_model: Path, model: Path) -> Engine:
        engine = open_engine(settings, base_model, model)
        for name in ("sample", "greedy", "score"):
            setattr(engine, name, _watch(getattr(engine, name), killed_after, asked))
        return engine

    return opened


def _watch(method: Callable[..., Iterator[Any]], killed_after: int | None, asked: list[int]) -> Callable[..., Any]:
    def run(prompts: list[Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
        asked.append(len(prompts))
        for number, result in enumerate(method(prompts, *args, **kwargs)):
            if number == killed_after:
                raise Killed
            yield result

    return run
