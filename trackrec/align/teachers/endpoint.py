"""A teacher behind an OpenAI-compatible endpoint: retried, rate-limited, resumable, under a spending cap."""

import asyncio
import email.utils
import hashlib
import os
import time
from collections.abc import Mapping
from json import JSONDecodeError
from pathlib import Path

from aiolimiter import AsyncLimiter
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, OpenAIError
from openai.types.chat import ChatCompletion
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from trackrec.align.teachers.ledger import Answer, Ledger, SpendingCapError, Usage
from trackrec.config import OpenAITeacher
from trackrec.journal import Journal
from trackrec.progress import track

# What a chat template may add to a prompt, in tokens; and a token is at least one byte of UTF-8.
_TEMPLATE_TOKENS = 64
# Seconds: the longest pause a server may ask for (Retry-After) before the stage gives up instead.
_LONGEST_PAUSE = 900.0
_NOT_BILLED = Usage(0, 0)


class TeacherError(RuntimeError):
    """The teacher cannot be asked any further; what it has answered is kept for the next try. Says what to do."""


class _MalformedError(Exception):
    """An answer that is no chat completion."""


def ask(teacher: OpenAITeacher, prompts: Mapping[str, str], journal: Path) -> dict[str, Answer]:
    """The teacher's answers to `prompts`, by the same names.

    Args:
        journal: a file of answers that outlives the process. What it holds is not asked again; it may be shared by runs
            that differ in anything but endpoint, model, temperature and token limit.

    Raises:
        TeacherError: no key, the spending cap, a refused request, or an endpoint that keeps failing.
        JournalBusyError: another process is asking.
    """
    key = os.environ.get(teacher.key_env)
    if not key:
        raise TeacherError(
            f"the teacher's key is missing: set the environment variable {teacher.key_env} (on Kubernetes: "
            "`resources.distill_data.secrets`); any text will do for a server that asks for none"
        )
    with Journal(journal) as opened:
        ledger = Ledger(
            opened,
            cap_usd=teacher.max_cost_usd,
            prompt_usd=teacher.prompt_usd_per_million,
            completion_usd=teacher.completion_usd_per_million,
        )
        try:
            asyncio.run(_Asking(teacher, key, ledger).all(prompts))
        except SpendingCapError:
            missing = sum(_key(prompt) not in ledger.answers for prompt in prompts.values())
            raise TeacherError(
                f"the next request might pass the spending cap of {teacher.max_cost_usd:g} USD: {ledger.spent_usd:.4f} "
                f"are spent, {missing} of {len(prompts)} answers are missing. Raise "
                "`distill_data.teacher.max_cost_usd` or lower `distill_data.share`, and run again; what is answered is "
                "kept and not asked again."
            ) from None
        except (OpenAIError, _MalformedError) as error:
            # The server's message may quote the key, and the chained exceptions hold the request's headers.
            what = f"{type(error).__name__}: {error}".replace(key, "***")
            raise TeacherError(
                f"the teacher at {teacher.base_url} failed after {teacher.retries} retries or refused: {what}. "
                f"{len(ledger.answers)} answers are kept; run again to ask for the rest."
            ) from None
        return {name: ledger.answers[_key(prompt)] for name, prompt in prompts.items()}


def _key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


class _Asking:
    """One try at the prompts that have no answer yet."""

    def __init__(self, teacher: OpenAITeacher, key: str, ledger: Ledger) -> None:
        self._teacher = teacher
        self._ledger = ledger
        # The library's own retries would pass by the rate limit and the ledger.
        self._client = AsyncOpenAI(api_key=key, base_url=teacher.base_url, timeout=teacher.timeout_s, max_retries=0)
        # Evenly spaced: a bucket of a whole minute's requests would let twice as many through in the first minute.
        self._rate = AsyncLimiter(1, 60 / teacher.requests_per_minute)
        # All workers pause until here (monotonic seconds) when the server asks one of them to.
        self._not_before = 0.0

    async def all(self, prompts: Mapping[str, str]) -> None:
        """Asks for what is missing; on a fault lets the requests under way finish, since they are paid for.

        Raises:
            The first fault.
        """
        missing = {_key(prompt): prompt for prompt in prompts.values() if _key(prompt) not in self._ledger.answers}
        waiting = iter(missing.items())
        faults: list[Exception] = []

        async def work() -> None:
            for key, prompt in waiting:
                try:
                    await self._ask(key, prompt)
                except Exception as fault:
                    faults.append(fault)
                if faults:
                    return
                bar.update()

        with track(range(len(prompts)), "Teacher", unit="RecCoT") as bar:
            bar.update(len(prompts) - len(missing))
            async with self._client:
                await asyncio.gather(*(work() for _ in range(self._teacher.concurrency)))
        if faults:
            raise faults[0]

    async def _ask(self, key: str, prompt: str) -> None:
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(_is_transient),
            wait=wait_random_exponential(multiplier=0.5, max=30),
            stop=stop_after_attempt(1 + self._teacher.retries),
            reraise=True,
        ):
            with attempt:
                await self._attempt(key, prompt)

    async def _attempt(self, key: str, prompt: str) -> None:
        teacher = self._teacher
        at_most = Usage(len(prompt.encode()) + _TEMPLATE_TOKENS, teacher.max_tokens)
        async with self._ledger.request(key, at_most) as settle:
            while (pause := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            await self._rate.acquire()
            try:
                completion = await self._client.chat.completions.create(
                    model=teacher.model,
                    messages=[{"role": "user", "content": prompt}],
                    temperature=teacher.temperature,
                    max_tokens=teacher.max_tokens,
                )
            except APIStatusError as error:
                # A gateway's error says nothing about what became of the request behind it.
                if error.status_code not in (502, 504):
                    settle(_NOT_BILLED, None)
                pause = _retry_after(error)
                self._not_before = max(self._not_before, time.monotonic() + min(pause, _LONGEST_PAUSE))
                raise
            except APIConnectionError as error:
                if _never_connected(error):
                    settle(_NOT_BILLED, None)
                raise
            except JSONDecodeError as error:
                raise _MalformedError(f"the answer is no JSON: {error}") from error
            settle(*_read(completion))


def _read(completion: ChatCompletion) -> tuple[Usage, Answer]:
    """The library does not validate what a server sends.

    Raises:
        _MalformedError: it is no chat completion with text, finish reason and usage.
    """
    try:
        counts = completion.usage
        if counts is None:
            raise ValueError("no usage")
        usage = Usage(int(counts.prompt_tokens), int(counts.completion_tokens))
        choice = completion.choices[0]
        # A refusal has no content.
        text = choice.message.content or ""
        return usage, Answer(text.strip(), str(choice.finish_reason), usage.completion_tokens)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise _MalformedError(f"the answer is no chat completion with usage: {str(completion)[:200]!r}") from error


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, APIStatusError):
        if _retry_after(error) > _LONGEST_PAUSE or error.code == "insufficient_quota":
            return False
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, APIConnectionError | _MalformedError)


def _never_connected(error: APIConnectionError) -> bool:
    """Whether the request cannot have reached the server; by name, since the HTTP library below openai's varies."""
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")


def _retry_after(error: APIStatusError) -> float:
    """Seconds the server asks to wait: a number, or an HTTP date; 0 where it asks for nothing."""
    value = error.response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
