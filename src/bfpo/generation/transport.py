"""The HTTP client for servers; imports the extra `server` and is itself imported on the first request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx2
from openai import DefaultAsyncHttpxClient

from bfpo.generation.replies import reported_fault

__all__ = ["MOST_BYTES", "BoundedClient", "LossyRedirect", "OversizedAnswer", "RefusedRedirect"]

MOST_BYTES = 32 << 20
"""Longest answer of a server; 4,000 tokens with 20 log-probabilities each have about 8 MB."""

_MOST_REDIRECTS = 5
# What a request needs; the client's library adds others from the environment (OPENAI_ORG_ID, OPENAI_CUSTOM_HEADERS).
_HEADERS = frozenset(
    {
        *("accept", "authorization", "connection", "content-length", "content-type", "host", "idempotency-key"),
        *(
            "user-agent",
            "x-stainless-raw-response",
        ),  # the last one is how the client's library finds out what to return
    }
)


class OversizedAnswer(BaseException):
    """An answer of more than `MOST_BYTES`; not an `Exception`, since the client's library would retry the request."""


class RefusedRedirect(BaseException):
    """A redirect to another host, which is named; not an `Exception` for the same reason."""


class LossyRedirect(BaseException):
    """A redirect to the named URL by a status that turns a POST into a GET without its body; as above."""


class BoundedClient(DefaultAsyncHttpxClient):
    """Sends requests that end within `timeout` seconds, body included, and asks `count` before each one.

    Without it, a body that arrives in small pieces would never time out. A success status with a body that is not a
    JSON object (a lost connection, a proxy's page), or that says that it is not whole, is raised as a network error, so
    that the request is sent again; one that reports a busy or broken server becomes the status that it names.
    The key is sent only with `has_key`, headers from the environment only with `is_openai`; redirects are followed only
    to the same host, and only with their body.
    """

    def __init__(
        self, *, timeout: float, max_connections: int, count: Callable[[], None], has_key: bool, is_openai: bool
    ) -> None:
        async def before(request: httpx2.Request) -> None:
            count()

        super().__init__(
            timeout=timeout,
            limits=httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
            event_hooks={"request": [before]},
            follow_redirects=False,
        )
        self._seconds = timeout
        self._has_key, self._is_openai = has_key, is_openai

    async def send(self, request: httpx2.Request, **kwargs: Any) -> httpx2.Response:
        """Send a request; raises `httpx2.RequestError` for an incomplete answer, and the three exceptions above."""
        for name in list(request.headers):
            if (name == "authorization" and not self._has_key) or not (self._is_openai or name in _HEADERS):
                del request.headers[name]
        request.headers["accept-encoding"] = "identity"
        try:
            response = await asyncio.wait_for(self._follow(request, kwargs), self._seconds)
        except asyncio.TimeoutError as error:
            raise httpx2.ReadTimeout(f"no whole answer in {self._seconds:g} s", request=request) from error
        if not response.is_success:
            return response
        reply = _read_object(response.content)
        fault = "the answer's body is not a JSON object" if reply is None else reported_fault(reply)
        if isinstance(fault, str):
            raise httpx2.RemoteProtocolError(fault, request=request)
        if fault is None:
            return response
        status, reported = fault
        return httpx2.Response(status, headers=response.headers, json={"error": reported}, request=request)

    async def _follow(self, request: httpx2.Request, settings: dict[str, Any]) -> httpx2.Response:
        for _ in range(_MOST_REDIRECTS):
            response = await super().send(request, **{**settings, "stream": True, "follow_redirects": False})
            following = response.next_request
            if following is None:
                return await _read(response)
            await response.aclose()
            if not _same_host(request.url, following.url):
                raise RefusedRedirect(following.url.netloc.decode("ascii", "replace"))
            if following.method != request.method:
                raise LossyRedirect(str(following.url))
            request = following
        raise httpx2.TooManyRedirects(f"more than {_MOST_REDIRECTS} redirects", request=request)


def _same_host(old: httpx2.URL, new: httpx2.URL) -> bool:
    """Return whether a redirect stays at the same server; http may become https, not the other way."""
    if old.host != new.host:
        return False
    return (old.scheme, old.port) == (new.scheme, new.port) or (old.scheme, new.scheme) == ("http", "https")


async def _read(response: httpx2.Response) -> httpx2.Response:
    """Return the response with its body, read piece by piece up to `MOST_BYTES`."""
    # Of other encodings, and of several, a small piece may unpack to any size.
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    content = bytearray()
    try:
        if encoding not in ("", "identity", "gzip", "deflate"):
            raise httpx2.DecodingError(f"content-encoding {encoding!r} was not asked for", request=response.request)
        async for piece in response.aiter_bytes():
            content += piece
            if len(content) > MOST_BYTES:
                raise OversizedAnswer
    finally:
        await response.aclose()
    unpacked = ("content-encoding", "content-length", "transfer-encoding")
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in unpacked]
    return httpx2.Response(response.status_code, headers=headers, content=bytes(content), request=response.request)


def _read_object(body: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
