"""COMMAND `doctor`: this machine, whether a training config fits, and with `--data` what it asks of its pairs.

Without `--data` it reads no weights and uses no network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bfpo.config import AlignConfig
from bfpo.core.console import Outcome, show
from bfpo.core.errors import SettingError
from bfpo.core.provenance import describe_platform, describe_versions, documents_folder
from bfpo.core.records import as_json
from bfpo.policy.devices import EXTRAS, describe_hub, find_devices, free_disk, installed_extras
from bfpo.policy.memory import Sharding
from bfpo.runs.hub_data import with_hub_files
from bfpo.training.diagnosis import GIB, KEPT_FREE, Diagnosis, examine, load_training
from bfpo.training.rehearsal import sampled_forecast

__all__ = ["diagnosis_lines", "run"]

_KEPT = {False: "kept", True: "recomputed", "selective": "recomputed but for products and attention"}
_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state (AdamW)",
    "reference": "reference (copy of what trains)",
    "activations": "activations kept for the backward pass",
    "working": "working space of a pass",
    "head": "output head",
    "exchange": "exchange between processes",
    "margin": "more for the pass of margin_model, before",
    "saving": "more for merging the adapter, at the end",
}


def run(
    config: Path | None,
    settings: Sequence[str],
    *,
    processes: int,
    sharding: Sharding,
    memory_gib: float | None,
    data: bool = False,
) -> Outcome:
    """Show the machine, or with a config whether it fits. The exit code is 1 if it does not fit, else 0.

    `data`: also what the setting asks of a sample of the pairs, for which weights and data are read. Raises
    `SettingError` for options that need a config, and the errors of `examine` and of reading the data.
    """
    if config is None and not settings:
        if processes != 1 or sharding != "none" or memory_gib is not None or data:
            raise SettingError("--processes, --sharding, --memory, --data: not read without --config FILE; add it")
        facts = _machine_facts()
        show("\n".join(_machine_lines(facts)))
        return Outcome(0, facts)
    found = examine(config, settings, processes=processes, sharding=sharding, memory_gib=memory_gib)
    facts, lines = _diagnosis_facts(found), diagnosis_lines(found)
    if data and found.memory_fits is False:
        lines += ["", "data: not read, the training does not fit the memory"]
    elif data:
        training = load_training(config, settings)
        if not isinstance(training, AlignConfig):
            raise SettingError("--data: needs a config of bfpo train, whose pairs have a target; leave it out")
        expected, more = sampled_forecast(with_hub_files(training)[0])
        facts["forecast"] = as_json(expected)
        lines += ["", *more, *([f"warning: {expected.warning}"] if expected.warning else [])]
    show("\n".join(lines))
    return Outcome(0 if found.fits else 1, facts)


def _machine_facts() -> dict[str, Any]:
    """Return versions, documents, devices, free disk, optional packages and the source of models; sizes in bytes."""
    return {
        "versions": describe_versions(),
        "platform": describe_platform(),
        "documents": str(documents_folder()),
        "threads": torch.get_num_threads(),
        "devices": [dataclasses.asdict(device) for device in find_devices()],
        "disk_free_bytes": free_disk(),
        "extras": installed_extras(),
        "hub": describe_hub(),
    }


def _machine_lines(facts: dict[str, Any]) -> list[str]:
    """Return `_machine_facts` as lines of text."""
    versions = {name: version or "not installed" for name, version in facts["versions"].items()}
    lines = [f"{name:<14} {version}" for name, version in versions.items()]
    lines += [f"{'system':<14} {facts['platform']['system']}, {facts['platform']['cores']} cores"]
    lines += [f"{'documents':<14} {facts['documents']}", ""]
    for device in facts["devices"]:
        free, total = (_size(device[f"{name}_bytes"]) for name in ("free", "total"))
        halves = "bfloat16" if device["bfloat16"] else "no instructions for bfloat16"
        lines.append(f"{device['name']:<14} {device['description']}; memory {free} free of {total}; {halves}")
    lines += [f"{'disk here':<14} {_size(facts['disk_free_bytes'])} free", f"{'hub':<14} {facts['hub']}", ""]
    return lines + [f"{name:<14} {facts['extras'][name] or 'not installed'} ({use})" for name, use in EXTRAS.items()]


def _size(value: int | None) -> str:
    return "unknown" if value is None else f"{value / GIB:.1f} GiB"


def _diagnosis_facts(found: Diagnosis) -> dict[str, Any]:
    """Return the diagnosis as JSON types; sizes in bytes."""
    plan = dataclasses.asdict(dataclasses.replace(found.plan, config=None, margin=None))
    del plan["config"], plan["margin"]
    return {
        "stage": found.stage,
        "model": found.model,
        "trains": found.trains,
        "reference": found.reference,
        "plan": plan,
        "memory_bytes": {**dataclasses.asdict(found.memory), "total": found.memory.total},
        "margin_model_bytes": found.margin_bytes,
        "host_bytes": found.host,
        "memory_source": found.memory_source,
        "available_bytes": found.available,
        "kept_free_share": KEPT_FREE,
        "checkpoint_bytes": found.checkpoint,
        "disk_bytes": found.disk,
        "disk_free_bytes": found.disk_free,
        "memory_fits": found.memory_fits,
        "disk_fits": found.disk_fits,
        "fits": found.fits,
        **({"lacking_tokens": list(found.lacking)} if found.lacking else {}),
        "remedies": [dataclasses.asdict(remedy) for remedy in found.remedies],
    }


def diagnosis_lines(found: Diagnosis) -> list[str]:
    """Return the diagnosis as lines of text."""
    plan, memory = found.plan, found.memory
    scale = _scale(memory.total)
    lines = [
        f"config of:  bfpo {found.stage}",
        f"model:      {found.model}",
        f"trains:     {found.trains}",
        f"a pass:     {plan.tokens} tokens, {plan.dtype}, activations {_KEPT[plan.checkpointing]}",
        f"reference:  {found.reference}",
        *_margin_lines(found),
        f"processes:  {plan.processes}, sharding {plan.sharding}",
        *_lacking_lines(found),
        "",
        f"{'memory of one process, estimated':<40}{scale[0]}",
    ]
    lines += [_row(_PARTS[name], value, scale) for name, value in dataclasses.asdict(memory).items() if value]
    lines += [_row("in all", memory.total, scale), _row(f"free ({found.memory_source})", found.available, scale)]
    if found.host:
        lines += ["memory of the first process' host", _row("the whole model, at the end", found.host, scale)]
    lines += ["disk, for checkpoints and the model", _row("one checkpoint", found.checkpoint, scale)]
    lines += [_row("in all", found.disk, scale)]
    lines += ["" if found.disk_free is None else _row("free", found.disk_free, scale) + "\n"]
    lines.append(_verdict(found))
    if found.remedies:
        lines += ["", f"{'what a process would need with':<40}{scale[0]}"]
        lines += [_row(r.change, r.total, scale) + ("  fits" if r.fits else "") for r in found.remedies]
    return lines


def _scale(value: int) -> tuple[str, int]:
    """Return the unit for sizes of this order, with its bytes."""
    return ("GiB", GIB) if value >= GIB else ("MiB", GIB // 1024)


def _margin_lines(found: Diagnosis) -> list[str]:
    if not found.margin_bytes:
        return []
    unit, size = _scale(found.margin_bytes)
    return [f"margins:    a pass of margin_model before training, {found.margin_bytes / size:.2f} {unit} of weights"]


def _lacking_lines(found: Diagnosis) -> list[str]:
    if not found.lacking:
        return []
    some = ", ".join(found.lacking[:5]) + (", ..." if len(found.lacking) > 5 else "")
    return [
        f"tokens:     {len(found.lacking)} of the tokenizer are not in the model, a text with one stops the run: {some}"
    ]


def _row(name: str, value: int | None, scale: tuple[str, int]) -> str:
    return f"  {name:<44} {'unknown' if value is None else f'{value / scale[1]:9.2f}'}"


def _verdict(found: Diagnosis) -> str:
    if found.memory_fits is None:
        memory = "the free memory of this machine is unknown; set --memory"
    elif found.memory_fits:
        memory = "fits" if found.disk_fits is not False else "the memory is enough"
    else:
        memory = f"does not fit: {KEPT_FREE:.0%} of the memory must stay free"
    too_small = "; the disk is too small: free some space, or keep fewer checkpoints"
    return memory if found.disk_fits is not False else memory + too_small
