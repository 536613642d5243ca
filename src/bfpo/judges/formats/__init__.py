"""How a guard model is asked and how its answer is read: one file per family, one row per format."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from bfpo.core.errors import SettingError
from bfpo.judges.formats.gpt_oss_safeguard import gpt_oss_safeguard
from bfpo.judges.formats.granite_guardian import granite_guardian, granite_guardian_4_1
from bfpo.judges.formats.harmbench import harmbench, harmbench_contextual
from bfpo.judges.formats.llama_guard import llama_guard_3, llama_guard_4
from bfpo.judges.formats.pairwise import PAIR_FORMATS, PairFormat, both_orders
from bfpo.judges.formats.qwen3guard import qwen3guard
from bfpo.judges.formats.shieldgemma import shieldgemma
from bfpo.judges.formats.types import Ask, Format, Reading, disarm
from bfpo.judges.formats.wildguard import wildguard

__all__ = [
    "FORMATS",
    "FORMAT_SETTINGS",
    "PAIR_FORMATS",
    "Ask",
    "Format",
    "PairFormat",
    "Reading",
    "both_orders",
    "disarm",
    "make_format",
]

_MAKERS: dict[str, Callable[..., Format]] = {
    "harmbench": harmbench,
    "harmbench-contextual": harmbench_contextual,
    "llama-guard-3": llama_guard_3,
    "llama-guard-4": llama_guard_4,
    "wildguard": wildguard,
    "qwen3guard": qwen3guard,
    "shieldgemma": shieldgemma,
    "granite-guardian": granite_guardian,
    "granite-guardian-4.1": granite_guardian_4_1,
    "gpt-oss-safeguard": gpt_oss_safeguard,
}

FORMATS: dict[str, Format] = {name: make() for name, make in _MAKERS.items()}
"""Formats by the name that a config gives them, with their default settings."""

FORMAT_SETTINGS = {name: tuple(inspect.signature(make).parameters) for name, make in _MAKERS.items()}
"""The settings that each format takes."""


def make_format(name: str, **settings: str) -> Format:
    """Return the format of that name, with settings of its own in place of the defaults.

    Settings: `controversial` of qwen3guard (unsafe, safe or unscored), `policy` of shieldgemma and gpt-oss-safeguard,
    `criterion` of granite-guardian and granite-guardian-4.1, `behaviour` and `context` of harmbench-contextual. Raises
    `SettingError` for an unknown name, setting or value.
    """
    if name not in _MAKERS:
        raise SettingError(f"format: got {name!r}; allowed: {', '.join(_MAKERS)}")
    for key in settings:
        if key not in FORMAT_SETTINGS[name]:
            allowed = ", ".join(FORMAT_SETTINGS[name]) or "none"
            raise SettingError(f"{key}: no setting of the format {name!r}; its settings: {allowed}")
    return _MAKERS[name](**settings)
