import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from trackrec.align.teachers import choose, endpoint
from trackrec.config import OpenAITeacher
from trackrec.journal import JournalBusyError

KEY = "sk-secret-0123456789"
PROMPTS = {f"c{i}": f"history {i}" for i in range(6)}

# What the server does with a prompt at its k-th request for it: a status, headers and a body.
Reply = tuple[int, dict[str, str], dict[str, Any] | str]
Script = Callable[[str, int], Reply]


def completion(text: str | None, finish: str = "stop", prompt: int = 10, tokens: int = 20) -> Reply:
    message = {"role": "assistant", "content": text}
    return (
        200,
        {},
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [{"index": 0, "finish_reason": finish, "message": message}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens},
        },
    )


def answer(prompt: str, _: int) -> Reply:
    return completion(f"likes {prompt}")


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on this machine that does what a script says, and notes what it saw."""

    daemon_threads = True

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.lock = threading.Lock()
        self.busy = self.most_busy = 0

    def asked(self) -> Counter[str]:
        return Counter(request["messages"][0]["content"] for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(request)
            server.times.append(time.monotonic())
            server.keys.add(self.headers["Authorization"])
            count = server.asked()[request["messages"][0]["content"]]
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        try:
            status, headers, body = (
                server.script(request["messages"][0]["content"], count)
                if self.path == "/v1/chat/completions"
                else (404, {}, {"error": {"message": f"no {self.path}"}})
            )
        finally:
            with server.lock:
                server.busy -= 1
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client went away, as some tests mean it to
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(script: Script) -> Iterator[Server]:
    with Server(script) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def teacher(server: Server, **settings: Any) -> OpenAITeacher:
    defaults = {
        "model": "teacher-1",
        "base_url": f"http://127.0.0.1:{server.server_port}/v1",
        "requests_per_minute": 60_000,
        "concurrency": 3,
        "max_tokens": 100,
        "retries": 3,
        "max_cost_usd": 1.0,
        # A token costs a millionth of a dollar either way, so costs read as tokens.
        "prompt_usd_per_million": 1.0,
        "completion_usd_per_million": 1.0,
    }
    return OpenAITeacher.model_validate(defaults | settings)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", KEY)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def spent(journal: Path) -> float:
    """Tokens charged, by the journal alone: what an outcome says, else the most."""
    charges: list[dict[str, int]] = []
    for line in journal.read_text().splitlines():
        record = json.loads(line)
        if "at_most" in record:
            charges.append(record["at_most"])
        else:
            charges[record["request"]] = record["usage"]
    return sum(charge["prompt_tokens"] + charge["completion_tokens"] for charge in charges)


def test_every_prompt_gets_its_answer_with_few_requests_at_once(journal: Path) -> None:
    def slow(prompt: str, count: int) -> Reply:
        time.sleep(0.05)
        return answer(prompt, count)

    with serving(slow) as server:
        found = endpoint.ask(teacher(server), PROMPTS, journal)
    assert {name: a.text for name, a in found.items()} == {name: f"likes {p}" for name, p in PROMPTS.items()}
    assert {(a.finish_reason, a.num_tokens) for a in found.values()} == {("stop", 20)}
    assert server.asked() == Counter(PROMPTS.values())
    assert server.most_busy == 3
    assert server.requests[0] | {"messages": None} == {
        "model": "teacher-1",
        "temperature": 0.7,
        "max_tokens": 100,
        "messages": None,
    }
    assert server.keys == {f"Bearer {KEY}"}
    assert spent(journal) == 6 * 30


def test_what_is_answered_is_not_asked_again(journal: Path) -> None:
    with serving(answer) as server:
        endpoint.ask(teacher(server), dict(list(PROMPTS.items())[:4]), journal)
        before = len(server.requests)
        found = endpoint.ask(teacher(server), PROMPTS, journal)
        assert len(server.requests) - before == 2 and found.keys() == PROMPTS.keys()
        endpoint.ask(teacher(server), PROMPTS, journal)
    assert server.asked() == Counter(PROMPTS.values())


def test_equal_prompts_are_asked_once(journal: Path) -> None:
    with serving(answer) as server:
        found = endpoint.ask(teacher(server), {"a": "same", "b": "same"}, journal)
    assert found["a"] == found["b"] and len(server.requests) == 1


def test_retry_after_holds_all_requests_back(journal: Path) -> None:
    def limited(prompt: str, count: int) -> Reply:
        if prompt == "history 0" and count == 1:
            return 429, {"Retry-After": "1"}, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
        time.sleep(0.3)  # so that the others' first requests are under way when the server asks for a pause
        return answer(prompt, count)

    with serving(limited) as server:
        found = endpoint.ask(teacher(server), PROMPTS, journal)
    assert found.keys() == PROMPTS.keys() and server.asked()["history 0"] == 2
    gaps = sorted(later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False))
    # One pause, and nobody asked in it.
    assert gaps[-1] > 0.85 > gaps[-2]
    assert spent(journal) == 6 * 30  # a refusal is not billed


def test_a_date_as_retry_after_and_a_pause_that_is_too_long(journal: Path) -> None:
    long = {"Retry-After": "Fri, 31 Dec 2999 23:59:59 GMT"}
    with serving(lambda *_: (429, long, {"error": {"message": "come back later"}})) as server:
        with pytest.raises(endpoint.TeacherError, match="come back later"):
            endpoint.ask(teacher(server, concurrency=1), PROMPTS, journal)
        assert len(server.requests) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_passing_faults_are_retried_and_not_billed(journal: Path, status: int) -> None:
    def once(prompt: str, count: int) -> Reply:
        return (status, {}, {"error": {"message": "busy"}}) if count == 1 else answer(prompt, count)

    with serving(once) as server:
        found = endpoint.ask(teacher(server), {"a": "x"}, journal)
    assert found["a"].text == "likes x" and len(server.requests) == 2 and spent(journal) == 30


def test_a_gateways_error_stays_charged_with_the_most(journal: Path) -> None:
    def once(prompt: str, count: int) -> Reply:
        return (502, {}, "<html>bad gateway</html>") if count == 1 else answer(prompt, count)

    with serving(once) as server:
        endpoint.ask(teacher(server), {"a": "x"}, journal)
    # One byte of prompt, 64 for the chat template, 100 for the answer; then the answer's 30.
    assert spent(journal) == 165 + 30


def test_a_server_that_keeps_failing_stops_the_stage_and_keeps_the_answers(journal: Path) -> None:
    def broken(prompt: str, count: int) -> Reply:
        return (500, {}, {"error": {"message": "out of order"}}) if prompt == "history 5" else answer(prompt, count)

    with serving(broken) as server:
        with pytest.raises(endpoint.TeacherError, match=r"after 1 retries.*out of order.*5 answers are kept"):
            endpoint.ask(teacher(server, retries=1, concurrency=1), PROMPTS, journal)
        assert server.asked()["history 5"] == 2
        server.script = answer
        assert endpoint.ask(teacher(server), PROMPTS, journal).keys() == PROMPTS.keys()
        assert all(server.asked()[f"history {i}"] == 1 for i in range(5))


def test_a_timeout_is_retried_and_stays_charged_with_the_most(journal: Path) -> None:
    def slow_once(prompt: str, count: int) -> Reply:
        if count == 1:
            time.sleep(1.6)
        return answer(prompt, count)

    with serving(slow_once) as server:
        found = endpoint.ask(teacher(server, timeout_s=1), {"a": "x"}, journal)
        time.sleep(0.7)  # the server's thread is done with the request that nobody waits for
    assert found["a"].text == "likes x" and len(server.requests) == 2
    assert spent(journal) == 165 + 30


def test_a_server_that_is_not_there_costs_nothing(journal: Path) -> None:
    with serving(answer) as server:
        gone = teacher(server, retries=1)
    with pytest.raises(endpoint.TeacherError, match=r"after 1 retries.*Connection error"):
        endpoint.ask(gone, {"a": "x"}, journal)
    assert spent(journal) == 0


@pytest.mark.parametrize(
    "body",
    [
        "not json {",
        {"error": "with status 200"},
        {**completion("x")[2], "choices": []},  # type: ignore[dict-item]
        {key: value for key, value in completion("x")[2].items() if key != "usage"},  # type: ignore[union-attr]
        [],
    ],
)
def test_a_malformed_answer_is_retried_then_refused(journal: Path, body: Any) -> None:
    with serving(lambda *_: (200, {}, body)) as server:
        with pytest.raises(endpoint.TeacherError, match=r"Malformed"):
            endpoint.ask(teacher(server, retries=1), {"a": "x"}, journal)
        assert len(server.requests) == 2
        server.script = answer
        assert endpoint.ask(teacher(server), {"a": "x"}, journal)["a"].text == "likes x"


def test_finish_reasons_and_refusals_come_through(journal: Path) -> None:
    replies = {
        "cut": completion("half a", "length", tokens=100),
        "filtered": completion(None, "content_filter"),
        "fine": completion(" whole \n"),
    }
    with serving(lambda prompt, _: replies[prompt]) as server:
        found = endpoint.ask(teacher(server), {name: name for name in replies}, journal)
    assert {name: (a.text, a.finish_reason) for name, a in found.items()} == {
        "cut": ("half a", "length"),
        "filtered": ("", "content_filter"),
        "fine": ("whole", "stop"),
    }
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "code"), [(400, "bad"), (401, "invalid_api_key"), (404, "x"), (429, "insufficient_quota")]
)
def test_a_refusal_is_not_retried_and_its_message_hides_the_key(journal: Path, status: int, code: str) -> None:
    error = {"error": {"message": f"you said {KEY}", "code": code}}
    with serving(lambda *_: (status, {}, error)) as server:
        with pytest.raises(endpoint.TeacherError, match=r"you said \*\*\*") as caught:
            endpoint.ask(teacher(server, concurrency=1), PROMPTS, journal)
        assert len(server.requests) == 1
    assert KEY not in str(caught.value) and caught.value.__cause__ is None and caught.value.__suppress_context__
    assert spent(journal) == 0


def test_a_missing_key_is_named(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_API_KEY")
    with serving(answer) as server, pytest.raises(endpoint.TeacherError, match="TEACHER_API_KEY"):
        endpoint.ask(teacher(server), PROMPTS, journal)


def test_requests_are_spaced_by_the_rate_limit(journal: Path) -> None:
    with serving(answer) as server:
        endpoint.ask(teacher(server, requests_per_minute=600), PROMPTS, journal)
    # Six requests, a tenth of a second apart.
    assert server.times[-1] - server.times[0] > 0.45


@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_cap_holds_and_what_was_paid_for_is_kept(journal: Path, concurrency: int) -> None:
    """A request costs 30 and at most 9 bytes + 64 + 100 = 173. Under a cap of 300 USD-millionths, requests start while
    30 k + 173 <= 300: k = 0…4, so five are answered for 150."""
    prompts = {f"c{i}": f"history {i}" for i in range(9)}

    def slow(prompt: str, count: int) -> Reply:
        time.sleep(0.02)
        return answer(prompt, count)

    with serving(slow) as server:
        with pytest.raises(endpoint.TeacherError, match=r"spending cap of 0.0003 USD.*4 of 9 answers are missing"):
            endpoint.ask(teacher(server, max_cost_usd=300e-6, concurrency=concurrency), prompts, journal)
        assert len(server.requests) == 5 and spent(journal) == 150
        # The same cap again: nothing is asked.
        with pytest.raises(endpoint.TeacherError, match="spending cap"):
            endpoint.ask(teacher(server, max_cost_usd=300e-6), prompts, journal)
        assert len(server.requests) == 5
        # A higher cap pays for the rest alone.
        assert endpoint.ask(teacher(server, max_cost_usd=1e-3), prompts, journal).keys() == prompts.keys()
        assert server.asked() == Counter(prompts.values())


def test_requests_under_way_count_with_the_most_they_can_cost(journal: Path) -> None:
    # Answers that use all they may. Three at once fit under 3 x 173, and no fourth is ever sent.
    def dear(prompt: str, _: int) -> Reply:
        time.sleep(0.05)
        return completion("long", "length", prompt=73, tokens=100)

    with serving(dear) as server:
        with pytest.raises(endpoint.TeacherError, match="spending cap"):
            endpoint.ask(teacher(server, max_cost_usd=3.5 * 173e-6, concurrency=6), PROMPTS, journal)
        assert len(server.requests) == 3 and spent(journal) == 3 * 173


def test_a_killed_process_resumes_and_its_open_requests_stay_charged(journal: Path) -> None:
    held = threading.Event()

    def hang_after_two(prompt: str, count: int) -> Reply:
        if prompt in ("history 0", "history 1") or held.is_set():
            return answer(prompt, count)
        held.wait(20)
        return answer(prompt, count)

    with serving(hang_after_two) as server:
        settings = teacher(server, concurrency=1)
        code = (
            "import json, sys; from pathlib import Path; from trackrec.align.teachers import endpoint;"
            "from trackrec.config import OpenAITeacher;"
            "endpoint.ask(OpenAITeacher.model_validate_json(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))"
        )
        arguments = [settings.model_dump_json(), json.dumps(PROMPTS), str(journal)]
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(server.requests) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(JournalBusyError, match="being written"):
            endpoint.ask(settings, PROMPTS, journal)
        os.kill(process.pid, signal.SIGKILL)
        output = process.communicate()[1]
        held.set()
        with journal.open("ab") as file:  # as a kill in the middle of a line leaves it
            file.write(b'{"key": "unfini')
        found = endpoint.ask(settings, PROMPTS, journal)
    assert found.keys() == PROMPTS.keys()
    assert server.asked() == Counter({**dict.fromkeys(PROMPTS.values(), 1), "history 2": 2})
    assert spent(journal) == 6 * 30 + 173
    assert KEY.encode() not in output + journal.read_bytes()


def test_contexts_are_drawn_by_hash() -> None:
    ids = [f"c{i}" for i in range(200)]
    drawn = choose(ids, 50, 1)
    assert drawn == choose(ids[::-1], 50, 1) and len(set(drawn)) == 50
    assert drawn == choose(ids, 60, 1)[:50]  # a larger share asks the same ones and more
    assert set(choose(ids, 50, 2)) != set(drawn)
    assert choose(ids[:3], 50, 1) and len(choose(ids[:3], 50, 1)) == 3
