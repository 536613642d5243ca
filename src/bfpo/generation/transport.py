"""The HTTP client of a server: the only module that imports the extra `server`, when a server is asked."""

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

    A body that drips in never times out by itself: its reads are short. A good status whose body is no JSON object is a
    fault of the way, such as a connection cut or a proxy's page; it is raised as one, so that it is sent again.
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
        """Send a request; raises `httpx2.RequestError` for what never became a whole answer."""
        try:
            response = await asyncio.wait_for(super().send(request, **kwargs), self._seconds)
        except asyncio.TimeoutError as error:
            raise httpx2.ReadTimeout(f"no whole answer in {self._seconds:g} s", request=request) from error
        if response.is_success and not _is_object(response.content):
            raise httpx2.RemoteProtocolError("the answer's body is no JSON object", request=request)
        return response


def _is_object(body: bytes) -> bool:
    try:
        return isinstance(json.loads(body), dict)
    except (ValueError, RecursionError):
        return False
