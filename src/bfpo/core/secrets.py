"""Detects keys and passwords, so that none is written to a file or a message."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["hide_in_setting", "hide_in_values", "hide_secrets", "looks_secret"]

_NAME = re.compile(r"(^|_)(token|api_?key|password|secret)$", re.IGNORECASE)
_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\b(?:sk-|gsk_|xai-|pplx-)[\w-]{16,}|\bgh[pousr]_\w{16,}|\bBearer\s+\S+"
    r"|(?<=://)[^/\s@]+(?=@)"
)
_HELD_IN = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "COMET_API_KEY",
    "SWANLAB_API_KEY",
    "NEPTUNE_API_TOKEN",
)
"""Variables that hold keys; their values are hidden wherever they stand, whatever their form."""
_SHORTEST_KEY = 8
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


def _is_secret_name(name: str) -> bool:
    """Return whether a setting of this name holds a secret, such as `api_key`."""
    return bool(_NAME.search(name))


def hide_secrets(text: str) -> str:
    """Return the text with `***` for what looks like a key or a URL's user and password, and for keys that are held."""
    for value in (os.environ.get(name, "") for name in _HELD_IN):
        text = text.replace(value, "***") if len(value) >= _SHORTEST_KEY else text
    return _VALUE.sub("***", text)


def hide_in_setting(setting: str) -> str:
    """Return `key=value` for a message, with `***` for a secret value; `KEY_env` should hold a variable's name."""
    key, equals, value = setting.partition("=")
    last = key.strip().rpartition(".")[2]
    is_secret = _is_secret_name(last) or (last.endswith("_env") and looks_secret(value.strip()))
    return f"{key}{equals}{'***' if is_secret else hide_secrets(value)}"


def hide_in_values(value: Any) -> Any:
    """Return nested plain values with `***` for the text under secret names and for anything like a key in the rest."""
    if isinstance(value, Mapping):
        return {key: _hide_under(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_in_values(item) for item in value]
    return hide_secrets(value) if isinstance(value, str) else value


def _hide_under(name: str, value: Any) -> Any:
    is_secret = _is_secret_name(name) and not isinstance(value, (int, float))  # keeps numbers, such as counts of tokens
    return "***" if is_secret and value else hide_in_values(value)


def looks_secret(text: str) -> bool:
    """Return whether text given as the name of an environment variable looks like a key instead."""
    return hide_secrets(text) != text or not _VARIABLE.fullmatch(text) or (len(text) > 24 and "_" not in text)
