"""An OpenAI-compatible server on loopback that answers as told, late, wrongly, in part, or not at all."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("429", "500", "503", "drop", "cut", "half JSON", "page", "timeout", "drip")
"""Faults of the server or of the way: a request sent again may go well."""


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has hung up is what these tests are about."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def guard_answer(text: str) -> str:
    """What a guard of Llama Guard's kind says here: whatever holds the word `bad` is unsafe."""
    return "unsafe\nS1" if "bad" in text else "safe"


class FaultServer:
    """`plan(text, attempt)` names what becomes of a request about `text`: "ok", a fault, or a delay in seconds.

    `answer(text)` is what the model writes and `finish(text)` why it ended, `text` the last message or the prompt.
    `reply(text, body)`, where it is not `None`, comes before all that: status, JSON or bytes, and further headers.
    `requests` counts requests by text, `answered` those that got a whole good answer; `bodies` holds what was asked.
    """

    def __init__(self, plan: Callable[[str, int], str | float] | None = None) -> None:
        self.plan = plan or (lambda text, attempt: "ok")
        self.answer: Callable[[str], str | None] = guard_answer
        self.finish: Callable[[str], str | None] = lambda text: "stop"
        self.reply: Callable[[str, dict[str, Any]], tuple[int, Any, dict[str, str]] | None] = lambda text, body: None
        self.usage: dict[str, int] | None = None
        self.logprobs: Callable[[str], Any] | None = None
        self.requests: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.headers: list[dict[str, str]] = []
        self.drip_seconds = 5.0
        self._lock = threading.Lock()
        self._http = _Quiet(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    @property
    def num_requests(self) -> int:
        return sum(self.requests.values())

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                content = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
                text = content if isinstance(content, str) else content[0]["text"]
                with server._lock:
                    attempt = server.requests[text]
                    server.requests[text] += 1
                    server.bodies.append(body)
                    server.keys.add(self.headers.get("authorization", ""))
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                if (reply := server.reply(text, body)) is not None:
                    status, content, headers = reply
                    content = content if isinstance(content, bytes) else json.dumps(content).encode()
                    server._send(self, status, content, headers=headers)
                    return
                server._respond(self, body, text, server.plan(text, attempt))

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler

    def _respond(self, to: BaseHTTPRequestHandler, body: dict[str, Any], text: str, what: str | float) -> None:
        if isinstance(what, float):
            time.sleep(what)
            what = "ok"
        whole = json.dumps(self._answer(body, text)).encode()
        if what == "drop":
            to.close_connection = True
        elif what == "timeout":
            time.sleep(self.drip_seconds / 5)
            to.close_connection = True
        elif what in ("cut", "drip"):
            self._send(to, 200, whole[: len(whole) // 2], length=len(whole))
            for byte in whole[len(whole) // 2 :] if what == "drip" else b"":
                time.sleep(self.drip_seconds / 100)
                to.wfile.write(bytes([byte]))
            to.close_connection = True
        elif what == "half JSON":
            self._send(to, 200, whole[: len(whole) // 2])
        elif what == "page":
            self._send(to, 200, b"<html>Bad gateway</html>", kind="text/html")
        elif what.isdigit():
            self._send(to, int(what), json.dumps({"error": {"message": f"told to say {what}"}}).encode(), retry="1")
        elif what.startswith("401:"):
            self._send(to, 401, json.dumps({"error": {"message": what}}).encode())
        else:
            with self._lock:
                self.answered[text] += 1
            self._send(to, 200, whole)

    @staticmethod
    def _send(
        to: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        *,
        kind: str = "application/json",
        length: int | None = None,
        retry: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        to.send_response(status)
        to.send_header("content-type", kind)
        to.send_header("content-length", str(len(content) if length is None else length))
        if retry is not None and status in (429, 500, 503):
            to.send_header("retry-after-ms", retry)
        for name, value in (headers or {}).items():
            to.send_header(name, value)
        to.end_headers()
        to.wfile.write(content)

    def _answer(self, body: dict[str, Any], text: str) -> dict[str, Any]:
        written = self.answer(text)
        logprobs = self.logprobs(text) if self.logprobs is not None and body.get("logprobs") else None
        message = {"role": "assistant", "content": written} if "messages" in body else None
        choice = {"index": 0, "finish_reason": self.finish(text), "logprobs": logprobs}
        choice |= {"message": message} if message else {"text": written}
        usage = {} if self.usage is None else {"usage": self.usage}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
            **usage,
        }

    @contextmanager
    def running(self) -> Iterator[FaultServer]:
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()
