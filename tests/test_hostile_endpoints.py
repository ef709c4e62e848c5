"""What --live makes of an endpoint that misbehaves: one line, a right exit status, no key shown.

A real HTTP server on loopback answers each request in one of the ways below. The scripts play
the demo that asks a model, with the real client.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any
from urllib.parse import quote, unquote

import pytest
from conftest import load_chapter

KEY = "sk-secret-0123456789abcdef"
DEMOS = {2: "6", 3: "8", 4: "2", 5: "5", 8: "4"}  # the demo of each chapter that asks a model
JSON, HTML, EVENTS = "application/json", "text/html", "text/event-stream"
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}


def completion(message: dict[str, Any], finish: Any = "stop", usage: Any = USAGE) -> str:
    choice = {"index": 0, "message": {"role": "assistant"} | message, "finish_reason": finish}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "gpt-4o-mini"}
    return json.dumps(body | {"choices": [choice], "usage": usage})


HALF_A_STREAM = 'data: {"id": "1", "choices": [{"index": 0, "delta": {"content": "Half'
ENDPOINTS: dict[str, tuple[int, str, str]] = {  # status, content type, body
    "a web page": (200, HTML, "<html><body>Sign in</body></html>"),
    "an error with status 200": (200, JSON, '{"error": {"message": "no such model"}}'),
    "nulls": (200, JSON, '{"id": null, "choices": null, "usage": null}'),
    "nothing": (200, JSON, ""),
    "no choices": (200, JSON, '{"id": "1", "choices": [], "model": "gpt-4o-mini"}'),
    "a list": (200, JSON, "[1, 2]"),
    "no content": (200, JSON, completion({"content": None})),
    "no end": (200, JSON, completion({"content": "Half"}, finish="")),
    "half a stream": (200, EVENTS, HALF_A_STREAM),
    "infinite usage": (200, JSON, completion({"content": "x"}, usage={"prompt_tokens": 1e400})),
    "a wrong key, which it quotes": (401, JSON, json.dumps({"error": {"message": f"bad: {KEY}"}})),
    "too many requests": (429, JSON, '{"error": {"message": "slow down"}}'),
    "a redirect to itself": (307, HTML, ""),
    "a server error": (500, HTML, "<html>Internal Server Error</html>"),
}
BELIEVED = {  # these answers are good enough
    ("infinite usage", 4),  # a call whose cost is not known
    ("infinite usage", 5),  # the worst case is spent
    ("infinite usage", 8),  # it counts no tokens
}


class Handler(BaseHTTPRequestHandler):
    """The first part of a path is the name of an endpoint."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        status, kind, body = ENDPOINTS[unquote(self.path.split("/")[1])]
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body.encode())))
        self.send_header("retry-after-ms", "1")
        if status == 307:
            self.send_header("location", self.path)
        self.end_headers()
        with suppress(ConnectionError):  # a client may have gone away
            self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002


@pytest.fixture
def server() -> Iterator[str]:
    """The address of all endpoints. One thread serves them, so that nothing outlives its end."""
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.005})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def quick_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that load no certificates, which loopback does not need, and try again at once."""
    monkeypatch.setattr("ssl.SSLContext.load_verify_locations", lambda *args, **files: None)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0)


def play(number: int, url: str, monkeypatch: pytest.MonkeyPatch, key: str = KEY) -> int:
    """Play the demo with --live; return the exit status."""
    chapter = load_chapter(number)
    monkeypatch.setattr(chapter, "live", False, raising=False)
    monkeypatch.setattr(sys, "argv", [f"{number:02d}.py", DEMOS[number], "--live"])
    settings = {"API_KEY": key, "BASE_URL": url, "MODEL": "gpt-4o-mini"}
    for name, value in settings.items():
        monkeypatch.setenv(f"OPENAI_{name}", value)
    try:
        return int(chapter.main())
    except SystemExit as ended:
        return int(str(ended.code))


@pytest.mark.parametrize("number", DEMOS)
@pytest.mark.parametrize("name", ENDPOINTS)
def test_a_broken_endpoint_ends_a_script_with_one_line(
    name: str,
    number: int,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = play(number, f"{server}/{quote(name)}", monkeypatch)
    shown = capsys.readouterr()
    if (name, number) in BELIEVED:
        assert (status, shown.err) == (0, "")
        return
    assert status == 1
    assert shown.err.count("\n") == 1, shown.err
    assert "the model did not answer" in shown.err
    assert "Traceback" not in shown.out + shown.err
    assert KEY not in shown.out + shown.err


@pytest.mark.parametrize("number", DEMOS)
def test_live_needs_a_key(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play(number, "", monkeypatch, key="") == 2
    expected = "--live needs OPENAI_API_KEY; a local server takes any value\n"
    assert capsys.readouterr().err.endswith(expected)
