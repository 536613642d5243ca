"""What looks like a key or a password, so that none is written anywhere."""

from __future__ import annotations

import re

__all__ = ["hide_in_setting", "hide_secrets", "is_secret_name", "looks_secret"]

_NAME = re.compile(r"(^|_)(token|api_?key|password|secret)$", re.IGNORECASE)
_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\b(?:sk-|gsk_|xai-|pplx-)[\w-]{16,}|\bgh[pousr]_\w{16,}|\bBearer\s+\S+"
    r"|(?<=://)[^/\s@]+(?=@)"
)
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


def is_secret_name(name: str) -> bool:
    """Whether a key of that name holds a secret, such as `api_key`."""
    return bool(_NAME.search(name))


def hide_secrets(text: str) -> str:
    """Return the text with what looks like a key, or like the name and password of a URL, as `***`."""
    return _VALUE.sub("***", text)


def hide_in_setting(setting: str) -> str:
    """Return `key=value` for a message: the value as `***` where the key holds a secret, or the name of one."""
    key, equals, value = setting.partition("=")
    last = key.strip().rpartition(".")[2]
    fine = not (is_secret_name(last) or (last.endswith("_env") and looks_secret(value.strip())))
    return f"{key}{equals}{hide_secrets(value) if fine else '***'}"


def looks_secret(text: str) -> bool:
    """Whether something is written where the name of an environment variable belongs that is more like a key."""
    return hide_secrets(text) != text or not _VARIABLE.fullmatch(text) or (len(text) > 24 and "_" not in text)
