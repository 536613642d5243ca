"""`bfpo doctor`: what this machine has, and whether a training config fits it. Loads no weights and asks no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bfpo.commands.doctor_diagnosis import examine
from bfpo.commands.doctor_view import diagnosis_facts, diagnosis_lines, machine_facts, machine_lines
from bfpo.core.console import show
from bfpo.core.errors import SettingError
from bfpo.policy.memory import Sharding

__all__ = ["run"]


def run(
    config: Path | None,
    settings: Sequence[str],
    *,
    processes: int,
    sharding: Sharding,
    memory_gib: float | None,
    as_json: bool,
) -> int:
    """Show the machine, or with a config whether it fits; returns the exit status, 1 where it does not.

    Raises `SettingError` for options that only a config can use, and as `examine` does.
    """
    if config is None and not settings:
        if processes != 1 or sharding != "none" or memory_gib is not None:
            raise SettingError("--processes, --sharding, --memory: not read without --config FILE; give one")
        facts = machine_facts()
        show(json.dumps(facts, indent=2) if as_json else "\n".join(machine_lines(facts)))
        return 0
    found = examine(config, settings, processes=processes, sharding=sharding, memory_gib=memory_gib)
    show(json.dumps(diagnosis_facts(found), indent=2) if as_json else "\n".join(diagnosis_lines(found)))
    return 0 if found.fits else 1
