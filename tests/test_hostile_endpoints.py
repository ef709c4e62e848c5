"""What --live makes of an endpoint that misbehaves: one line, a right exit status, no key shown.

A real HTTP server on loopback answers each request in one of the ways below. The scripts play
the demo that asks a model, with the real client.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import quote, unquote

import pytest
from conftest import load_chapter

KEY = "sk-secret-0123456789abcdef"
DEMOS = {2: "6", 3: "8", 4: "2", 5: "5", 8: "4"}  # the demo of each chapter that asks a model
JSON, HTML, EVENTS = "application/json", "text/html", "text/event-stream"


def completion(usage: Any = None, finish: str = "stop", **message: Any) -> str:
    choice = {"index": 0, "message": {"role": "assistant"} | message, "finish_reason": finish}
    return json.dumps({"id": "1", "model": "gpt-4o-mini", "choices": [choice], "usage": usage})


USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
SEARCH = {"name": "notes__search", "arguments": '{"words": "gpus"}'}
CALL = {"id": "1", "type": "function", "function": SEARCH}
ENDPOINTS: dict[str, tuple[int, str, str]] = {  # status, content type, body
    "a web page": (200, HTML, "<html><body>Sign in</body></html>"),
    "an error with status 200": (200, JSON, '{"error": {"message": "no such model"}}'),
    "nulls": (200, JSON, '{"id": null, "choices": null, "usage": null}'),
    "nothing": (200, JSON, ""),
    "a list": (200, JSON, "[1, 2]"),
    "no choices": (200, JSON, '{"id": "1", "choices": [], "model": "gpt-4o-mini"}'),
    "no content": (200, JSON, completion(USAGE, content=None)),
    "no end": (200, JSON, completion(USAGE, finish="", content="Half")),
    "a number for a text": (200, JSON, completion(USAGE, content=5)),
    "half a stream": (200, EVENTS, 'data: {"id": "1", "choices": [{"index": 0, "delta": {"content'),
    "infinite usage": (200, JSON, completion({"prompt_tokens": 1e400}, content="x")),
    "huge usage": (200, JSON, completion(USAGE | {"completion_tokens": 10**30}, content="x")),
    "a wrong key, which it quotes": (401, JSON, json.dumps({"error": {"message": f"bad: {KEY}"}})),
    "too many requests": (429, JSON, '{"error": {"message": "slow down"}}'),
    "a server error": (500, HTML, "<html>Internal Server Error</html>"),
    "a redirect to itself": (307, HTML, ""),
    "one byte at a time": (200, JSON, completion(USAGE, content="Yes.")),
    "a refusal": (200, JSON, completion(USAGE, content=None, refusal="No.")),
    "tool calls": (200, JSON, completion(USAGE, "tool_calls", content=None, tool_calls=[CALL])),
    "an endless page": (200, HTML, ""),
}
# The chapters for which it is an answer. A usage that cannot be is a cost that 04, 05 and 08 do not
# know; 03 counts what it is told. Only 08 calls the tool, and asks again.
BELIEVERS = {
    "infinite usage": {4, 5, 8},
    "huge usage": {3, 4, 5, 8},
    "one byte at a time": {2, 3, 4, 5, 8},
    "a refusal": {2, 3, 4, 5, 8},
    "tool calls": {2, 3, 4, 5, 8},
}


class Handler(BaseHTTPRequestHandler):
    """The first part of a path is the name of an endpoint."""

    def do_POST(self) -> None:
        request = self.rfile.read(int(self.headers["content-length"]))
        name = unquote(self.path.split("/")[1])
        status, kind, body = ENDPOINTS[name]
        if b'"tool_call_id"' in request:
            body = completion(content="Done.", reasoning_content="Hm.")
        headers = {"content-type": kind, "retry-after-ms": 1, "connection": "close"}
        self.send_response(status)
        for header, value in (headers | {"location": self.path}).items():
            self.send_header(header, str(value))
        self.end_headers()
        with suppress(ConnectionError):  # a client may have gone away
            for byte in body if name == "one byte at a time" else [body]:
                self.wfile.write(byte.encode())
            if name == "an endless page":
                os.kill(os.getpid(), signal.SIGINT)  # the learner has had enough
                while True:
                    self.wfile.write(b" " * 1000)

    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002


@pytest.fixture
def server() -> Iterator[str]:
    """The address of all endpoints. One thread serves them, so that nothing outlives its end."""
    with ThreadPoolExecutor(1) as pool, HTTPServer(("127.0.0.1", 0), Handler) as http:
        pool.submit(http.serve_forever, poll_interval=0.005)
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def play(number: int, url: str, monkeypatch: pytest.MonkeyPatch, key: str = KEY) -> int:
    """Play the demo with --live; return the exit status."""
    chapter = load_chapter(number)
    # Clients load no certificates, which loopback does not need, and try again at once.
    monkeypatch.setattr("ssl.SSLContext.load_verify_locations", lambda *args, **files: None)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0)
    monkeypatch.setattr(chapter, "live", False, raising=False)
    monkeypatch.setattr(sys, "argv", [f"{number:02d}.py", DEMOS[number], "--live"])
    for name, value in {"API_KEY": key, "BASE_URL": url, "MODEL": "gpt-4o-mini"}.items():
        monkeypatch.setenv(f"OPENAI_{name}", value)
    try:
        return int(chapter.main())
    except SystemExit as ended:
        return int(str(ended.code))


@pytest.mark.parametrize("number", DEMOS)
@pytest.mark.parametrize("name", ENDPOINTS)
def test_a_broken_endpoint_ends_a_script_with_one_line(
    name: str, number: int, server: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    status = play(number, f"{server}/{quote(name)}", monkeypatch)
    shown = capsys.readouterr()
    if number in BELIEVERS.get(name, ()):
        assert (status, shown.err) == (0, "")
        assert (name, number) != ("tool calls", 8) or "Done." in shown.out
        return
    if name == "an endless page":
        assert status == 130
        return
    assert (status, shown.err.count("\n")) == (1, 1), shown.err
    assert "the model did not answer" in shown.err
    assert KEY not in shown.out + shown.err


@pytest.mark.parametrize("number", DEMOS)
def test_live_needs_a_key(number: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert play(number, "", monkeypatch, key="") == 2
    assert "--live needs OPENAI_API_KEY" in capsys.readouterr().err
