"""HTTP on this machine alone: the server of `bfpo watch` and of the page of `bfpo annotate`."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from bfpo.core.errors import ConfigError

__all__ = ["HOST", "LocalServer"]

HOST = "127.0.0.1"


class LocalServer(ThreadingHTTPServer):
    """A server bound to 127.0.0.1 and a port, 0 for any free one. Raises `ConfigError` for a port that is in use."""

    daemon_threads = True

    def __init__(self, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        try:
            super().__init__((HOST, port), handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"--port: {port} cannot be used ({reason}); choose another, or 0 for any free port"
            ) from error

    @property
    def names(self) -> set[str]:
        """The values of `Host` by which a browser of this machine asks."""
        return {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Show an error of a request, but not that a browser went away before it had its answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)
