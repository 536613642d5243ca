from __future__ import annotations

from http.server import BaseHTTPRequestHandler

import pytest

from bfpo.core.errors import ConfigError
from bfpo.core.local_server import LocalServer


def test_a_browser_that_went_away_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with LocalServer(0, BaseHTTPRequestHandler) as server:
        for error, shown in ((ConnectionResetError(), False), (BrokenPipeError(), False), (ValueError("bad"), True)):
            try:
                raise error
            except (OSError, ValueError):
                server.handle_error(None, ("127.0.0.1", 1))
            assert ("Traceback" in capsys.readouterr().err) == shown


def test_a_port_that_cannot_be_used_is_named() -> None:
    with LocalServer(0, BaseHTTPRequestHandler) as server:
        for port in (server.server_port, 70000):
            with pytest.raises(ConfigError, match="--port"):  # the number of a free port is in the message
                LocalServer(port, BaseHTTPRequestHandler)
