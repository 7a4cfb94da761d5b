"""What a teacher was asked, what it answered and what that cost, kept on disk: nothing is paid for twice."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass

from trackrec.journal import Journal


class SpendingCapError(RuntimeError):
    """The next request might pass the spending cap."""


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: str
    # By the teacher's tokenizer; a recording has none.
    num_tokens: int | None


Settle = Callable[[Usage, Answer | None], None]


class Ledger:
    """Requests and answers by the prompt's key, under a spending cap in US dollars.

    A request is written down with the most it can cost before it is sent, and again with what it did cost when that is
    known. One whose outcome never comes (a timeout, a kill) stays charged with the most. So the sum over all tries does
    not pass the cap, and a later try finds every answer.
    """

    def __init__(self, journal: Journal, *, cap_usd: float, prompt_usd: float, completion_usd: float) -> None:
        """`prompt_usd` and `completion_usd`: prices of a million tokens."""
        self._journal = journal
        self._cap_usd = cap_usd
        self._prices = prompt_usd, completion_usd
        self._charges: list[Usage] = []
        self._in_flight = 0
        self._changed = asyncio.Condition()
        self.answers: dict[str, Answer] = {}
        for record in journal.records:
            if "at_most" in record:
                self._charges.append(Usage(**record["at_most"]))
            else:
                self._charges[record["request"]] = Usage(**record["usage"])
                if record["answer"] is not None:
                    self.answers[record["key"]] = Answer(**record["answer"])
        # Over all tries; of requests without a known outcome, the most they can cost.
        self.spent_usd = sum(map(self._cost, self._charges))

    @contextlib.asynccontextmanager
    async def request(self, key: str, at_most: Usage) -> AsyncIterator[Settle]:
        """Around sending one request: writes it down, after waiting for others' outcomes where they decide if it fits.

        Yields:
            what to call with the request's outcome: the tokens it is billed for, and the answer if it gave one.

        Raises:
            SpendingCapError: it does not fit under the cap, and no outcome is awaited that could change that.
        """
        async with self._changed:
            while self.spent_usd + self._cost(at_most) > self._cap_usd:
                if not self._in_flight:
                    raise SpendingCapError
                await self._changed.wait()
            number = len(self._charges)
            self._journal.append({"key": key, "at_most": asdict(at_most)})
            self._charges.append(at_most)
            self.spent_usd += self._cost(at_most)
            self._in_flight += 1

        def settle(usage: Usage, answer: Answer | None) -> None:
            found = None if answer is None else asdict(answer)
            self._journal.append({"key": key, "request": number, "usage": asdict(usage), "answer": found})
            self.spent_usd += self._cost(usage) - self._cost(self._charges[number])
            self._charges[number] = usage
            if answer is not None:
                self.answers[key] = answer

        try:
            yield settle
        finally:
            self._in_flight -= 1
            async with self._changed:
                self._changed.notify_all()

    def _cost(self, usage: Usage) -> float:
        prompt_usd, completion_usd = self._prices
        return (usage.prompt_tokens * prompt_usd + usage.completion_tokens * completion_usd) / 1e6
