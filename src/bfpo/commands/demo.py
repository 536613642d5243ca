"""STAGE: the demo: make the data, run the chains, write the page."""

from __future__ import annotations

import json
import shlex
from datetime import datetime, timezone

from bfpo.config import DemoConfig
from bfpo.core.console import show
from bfpo.execution.workers import describe_workers
from bfpo.experiments.demo import collect, make_data, methods_of, plan_seed
from bfpo.experiments.points import Chain
from bfpo.experiments.steps import seeds_of
from bfpo.experiments.workers import run_chains
from bfpo.runs.folder import RunFolder, flat_settings

__all__ = ["command_of", "preview", "run"]


def run(config: DemoConfig, folder: RunFolder) -> None:
    """Run the demo and write `report.html`, `report.md`, `report.json`, `report.csv` and the figures beside them.

    Raises `RunError` if a chain of stages fails; a resumed demo skips finished runs.
    """
    make_data(config, folder)
    run_chains(_chains(config, folder), config.executor, folder.path / "logs")
    from bfpo.report.page import write_report

    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    data = collect(config, folder, commands=[command_of(config)], created=now)
    page = write_report(data, folder.path)
    show(folder.file("report.md").read_text(encoding="utf-8").split("\n## ")[0].rstrip())
    show(f"\nThe page: {page}")


def preview(config: DemoConfig) -> list[str]:
    """Return what the demo would run."""
    methods = methods_of(config)
    return [
        f"{config.seeds} x (start, ceiling, {', '.join(methods)}), {describe_workers(config.executor, 'core')}",
        f"pairs of each seed: {config.world.main_pairs} main, {config.world.buffer_pairs} buffer; "
        f"a Llama of {config.model.num_hidden_layers} blocks and width {config.model.hidden_size}, all weights trained",
    ]


def _chains(config: DemoConfig, folder: RunFolder) -> list[Chain]:
    return [chain for seed in seeds_of(config) for chain in plan_seed(config, folder.path, seed)]


def command_of(config: DemoConfig) -> str:
    """Return the command that makes this demo again."""
    parts = ["bfpo demo --out DIR"]
    if config.full:
        parts.append("--full")
    if config.seeds > 1:
        parts.append(f"--seeds {config.seeds}")
    default = dict(flat_settings(DemoConfig().resolved()))
    for key, value in flat_settings(config.resolved()):
        if value != default.get(key) and key.partition(".")[0] not in ("full", "seeds", "executor"):
            text = f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            parts.append(f"--set {shlex.quote(text)}")
    return " ".join(parts)
