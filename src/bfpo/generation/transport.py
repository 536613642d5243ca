"""The HTTP client for servers; imports the extra `server` and is itself imported on the first request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx2
from openai import DefaultAsyncHttpxClient

__all__ = ["BoundedClient"]


class BoundedClient(DefaultAsyncHttpxClient):
    """Sends requests that end within `timeout` seconds, body included, and asks `count` before each one.

    Without it, a body that arrives in small pieces would never time out. A success status with a body that is not a
    JSON object (a lost connection, a proxy's page) is raised as a network error, so that the request is sent again.
    """

    def __init__(self, *, timeout: float, max_connections: int, count: Callable[[], None]) -> None:
        async def before(request: httpx2.Request) -> None:
            count()

        super().__init__(
            timeout=timeout,
            limits=httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
            event_hooks={"request": [before]},
        )
        self._seconds = timeout

    async def send(self, request: httpx2.Request, **kwargs: Any) -> httpx2.Response:
        """Send a request; raises `httpx2.RequestError` for an incomplete answer."""
        try:
            response = await asyncio.wait_for(super().send(request, **kwargs), self._seconds)
        except asyncio.TimeoutError as error:
            raise httpx2.ReadTimeout(f"no whole answer in {self._seconds:g} s", request=request) from error
        if response.is_success and not _is_object(response.content):
            raise httpx2.RemoteProtocolError("the answer's body is not a JSON object", request=request)
        return response


def _is_object(body: bytes) -> bool:
    try:
        return isinstance(json.loads(body), dict)
    except (ValueError, RecursionError):
        return False
