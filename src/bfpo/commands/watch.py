"""COMMAND `watch`: serve the page of a run in progress to browsers on this machine, until the run has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from bfpo.core.console import Outcome, show
from bfpo.core.errors import BfpoError, ConfigError
from bfpo.core.local_server import HOST, LocalServer
from bfpo.report.data import ReportData
from bfpo.report.gather import gather
from bfpo.report.page import render_html

__all__ = ["make_server", "run"]

_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def run(folders: Sequence[Path], port: int, every: int, main: str | None) -> Outcome:
    """Serve the page until the run has ended and a browser has its last page, or until Ctrl-C.

    A run that had ended before is served until Ctrl-C. Runs that cannot be read yet are added later.

    Raises `DataError` for a folder without a run, `ConfigError` for a port that is in use.
    """
    gather(folders, main=main)  # raises errors in the folders here, not in a browser
    with make_server(folders, port=port, every=every, main=main) as server:
        show(f"The page, on this machine only: http://{HOST}:{server.server_port}/ (Ctrl-C to stop)")
        server.serve_forever()
    show(
        "The run has ended, and the browser has its last page; make a file of it with: bfpo report RUN --out PAGE.html"
    )
    return Outcome(0, {"runs": [str(folder) for folder in folders]})


def make_server(folders: Sequence[Path], *, port: int = 0, every: int = 10, main: str | None = None) -> LocalServer:
    """Return a server, bound to 127.0.0.1, that answers GET / with the current page of the folders.

    The page is remade once it is older than `every` seconds, and reloads itself at that interval while a run is in
    progress. Once the page of a run that has ended meanwhile is delivered, the server stops. Requests with another
    `Host` are refused (403), as a protection against DNS rebinding; other paths are 404. Raises `ConfigError` for a
    port that is in use.
    """
    page = _Page(folders, every, main)
    ended_before = not page.in_progress()

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "bfpo", ""

        def do_GET(self) -> None:
            """Answer with the page."""
            if self.headers.get_all("Host") is None or not set(self.headers.get_all("Host") or ()) <= server.names:
                self._answer(HTTPStatus.FORBIDDEN, f"only for this machine: open it as {HOST}")
            elif self.path != "/":
                self._answer(HTTPStatus.NOT_FOUND, "the only page is /")
            else:
                text, ended = page.text()
                self._answer(HTTPStatus.OK, text)
                if ended and not ended_before:
                    threading.Thread(target=server.shutdown).start()  # it waits for the loop that this thread serves

        def _answer(self, status: HTTPStatus, text: str) -> None:
            content = text.encode("utf-8")
            self.send_response(status)
            for name, value in {**_HEADERS, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Do not log requests."""

    server = LocalServer(port, Handler)
    return server


class _Page:
    """The latest page; kept while a new one cannot be made."""

    def __init__(self, folders: Sequence[Path], every: int, main: str | None) -> None:
        self._folders, self._every, self._main = folders, every, main
        self._lock = threading.Lock()
        self._text, self._ended, self._made_at = "", False, float("-inf")

    def in_progress(self) -> bool:
        """Return whether a run is in progress; a folder that cannot be read now may become one."""
        try:
            return _in_progress(gather(self._folders, main=self._main))
        except (BfpoError, OSError):
            return True

    def text(self) -> tuple[str, bool]:
        """Return the page and whether it is the last one, since its runs have ended."""
        with self._lock:
            if time.monotonic() - self._made_at >= self._every:
                try:
                    data = gather(self._folders, main=self._main)
                    self._ended = not _in_progress(data)
                    data = replace(data, title="A run that has ended" if self._ended else "A run in progress")
                    self._text = render_html(data, refresh_seconds=None if self._ended else self._every)
                except (BfpoError, OSError) as error:
                    if not self._text:
                        raise ConfigError(f"the page cannot be made: {error}") from error
                self._made_at = time.monotonic()
            return self._text, self._ended


def _in_progress(data: ReportData) -> bool:
    return any(run.status == "running" for run in data.runs)
