"""Names of a package that are imported when they are first used, so that importing the package stays fast."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["imported_on_use"]


def imported_on_use(package: str, homes: Mapping[str, tuple[str, ...]]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package: module -> the names that are imported from it (PEP 562).

    It raises `AttributeError`, with the names there are, for another name.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            names = ", ".join(sorted(home_of))
            raise AttributeError(f"module {package!r} has no attribute {name!r}; its names: {names}")
        value = getattr(import_module(home_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
