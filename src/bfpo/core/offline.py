"""Work without a network: the variables that ask for it, and a guard for packages that do not read them."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

__all__ = ["no_network_if_offline", "offline_variable"]

_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_HOST_AT = {"socket.connect": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}
"""Audit events of the standard library that name a machine, and the place of its address in their arguments."""
_guards: list[str] = []  # the variable of each guard that is active


def offline_variable() -> str | None:
    """Return the environment variable that asks for work without a network; `None` if none is set."""
    return next((name for name in _VARIABLES if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None)


@contextmanager
def no_network_if_offline() -> Iterator[None]:
    """Refuse connections to other machines by an `OSError` while inside, in all threads, if offline work is asked for.

    For packages that download files without reading the variables (NLTK, tasks that fetch a URL).
    """
    variable = offline_variable()
    if variable is None:
        yield
        return
    _install()
    _guards.append(variable)
    try:
        yield
    finally:
        _guards.remove(variable)


@cache
def _install() -> None:
    sys.addaudithook(_refuse)  # for the rest of the process; it acts only while there are guards


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if not _guards or event not in _HOST_AT:
        return
    address = arguments[_HOST_AT[event]]
    host = address[0] if isinstance(address, tuple) else address
    if event in ("socket.connect", "socket.sendto") and not isinstance(address, tuple):
        return  # a socket of this machine's file system
    if not _is_this_machine(host):
        raise OSError(f"{_guards[-1]} is set, so {host} is not asked for a file")


def _is_this_machine(host: object) -> bool:
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host or "")
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return name in ("", "localhost")
