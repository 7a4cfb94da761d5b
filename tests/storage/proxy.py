"""A server between the client and Cloud Storage's: tests see each request, and spoil what goes through."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote

import pytest
import requests
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

# Not passed on: they are about one connection.
_HOP = {"connection", "content-length", "date", "host", "keep-alive", "server", "transfer-encoding"}


@dataclass
class Proxy:
    """`spoil_request` changes a body on its way there, `spoil_response` one on its way back; `answer` stands in."""

    seen: list[str] = field(default_factory=list)
    answer: Callable[[Request], Response | None] = lambda request: None
    spoil_request: Callable[[Request, bytes], bytes] = lambda request, body: body
    spoil_response: Callable[[Request, bytes], bytes] = lambda request, body: body

    @property
    def sent(self) -> list[str]:
        """The uploads so far."""
        return [request for request in self.seen if request.startswith("POST /upload/")]


@contextmanager
def between(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Puts a proxy before `server` for as long as the block lasts."""
    proxy = Proxy()
    with HTTPServer(threaded=True) as httpserver, requests.Session() as session:

        def forward(request: Request) -> Response:
            body = request.get_data()
            proxy.seen.append(f"{request.method} {unquote(request.full_path)}")
            if (answer := proxy.answer(request)) is not None:
                return answer
            headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
            url = f"{server}{request.environ['RAW_URI']}"
            got = session.request(request.method, url, data=proxy.spoil_request(request, body), headers=headers)
            kept = {name: value for name, value in got.headers.items() if name.lower() not in _HOP}
            kept.pop("Content-Encoding", None)
            return Response(proxy.spoil_response(request, got.content), got.status_code, kept)

        httpserver.expect_request(re.compile("/.*")).respond_with_handler(forward)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", httpserver.url_for("").rstrip("/"))
        yield proxy
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
