"""STAGE: compare all methods: choose settings on validation prompts, train every seed, evaluate on test prompts."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bfpo.config import CompareConfig
from bfpo.core.console import show
from bfpo.core.schema import Score
from bfpo.execution.workers import describe_workers
from bfpo.experiments.compare import (
    NUM_TRIALS,
    chains_of,
    make_result,
    models_of,
    prompts_file,
    result_markdown,
    rivals_of,
    scores_folder,
)
from bfpo.experiments.points import read_accuracy, read_judged
from bfpo.experiments.steps import CEILING, START, seeds_of, write_held_out, write_prompts, write_world
from bfpo.experiments.workers import run_chains
from bfpo.experiments.worlds import collect_worlds, draw_worlds, world_folder, worlds_markdown
from bfpo.runs.folder import RunFolder
from bfpo.runs.stages import run_stage
from bfpo.scores.scores import Judged, score_rows

__all__ = ["preview", "run"]

_log = logging.getLogger(__name__)
CHOSEN_BY = "helpful_and_safe"
QUICK_TRIALS = 2


def run(config: CompareConfig, folder: RunFolder) -> None:
    """Write `comparison.json` and `comparison.md`; every training is a run folder, and a resumed comparison continues.

    With `worlds` each world is such a comparison, in `worlds/NAME`, and `worlds.json`, `worlds.md` and the figure
    `worlds.png` and `.svg` show them side by side. Raises `ConfigError` for entries of `methods` that are not right.

    Settings are chosen at the first seed by the share of helpful and safe answers to validation prompts (the first if
    several are equal). Only models with the chosen setting answer test prompts. Raises `RunError` if a chain fails.
    """
    started, rivals = time.monotonic() - folder.record["seconds"], rivals_of(config)  # also of earlier starts
    if config.worlds:
        _run_worlds(config, folder, started)
        return
    write_world(config, folder)
    write_held_out(config, folder, "test")
    write_prompts(config, folder, "validation", str(prompts_file(folder.path, "validation").relative_to(folder.path)))
    write_prompts(config, folder, "test", str(prompts_file(folder.path, "test").relative_to(folder.path)))
    logs = folder.path / "logs"
    numbers = range(_num_trials(config))
    trials = chains_of(config, folder.path, config.seed, dict.fromkeys(rivals, numbers), "validation")
    run_chains(trials, config.executor, logs)
    tried = {
        name: [_validation_score(config, folder, model) for model in models_of(rival, numbers)]
        for name, rival in rivals.items()
    }
    best = {name: max(numbers, key=lambda number: scores[number]) for name, scores in tried.items()}
    folder.write_json("trials.json", {"chosen_by": CHOSEN_BY, "scores": tried, "chosen": best})
    chosen = {name: [number] for name, number in best.items()}
    finals = [chain for seed in seeds_of(config) for chain in chains_of(config, folder.path, seed, chosen, "test")]
    run_chains(finals, config.executor, logs)
    names = {START: START, CEILING: CEILING} | {name: models_of(rivals[name], [best[name]])[0] for name in rivals}
    judged = {
        name: [row for seed in seeds_of(config) for row in _judged(folder, model, seed, "test")]
        for name, model in names.items()
    }
    accuracy = {name: _accuracy(config, folder.path, names[name]) for name in rivals}
    level = config.confidence
    result = make_result(config.resolved(), judged, accuracy, tried, best, rivals=rivals, confidence=level)
    folder.write_json("comparison.json", replace(result, seconds=round(time.monotonic() - started, 3)))
    text = result_markdown(result)
    folder.write_text("comparison.md", text)
    show(text)


def _run_worlds(config: CompareConfig, folder: RunFolder, started: float) -> None:
    for number, name in enumerate(config.worlds, start=1):
        _log.info("world %d of %d: %s", number, len(config.worlds), name)
        run_stage("compare", config.of_world(name), world_folder(folder.path, name), resume=True)
    result = collect_worlds(config, folder.path)
    folder.write_json("worlds.json", replace(result, seconds=round(time.monotonic() - started, 3)))
    text = worlds_markdown(result)
    folder.write_text("worlds.md", text)
    for name, content in draw_worlds(result).items():
        folder.write_bytes(name, content)
    show(text)


def preview(config: CompareConfig) -> list[str]:
    """Return what would be compared."""
    rivals = rivals_of(config)
    worlds = [f"each in {len(config.worlds)} worlds: {', '.join(config.worlds)}"] if config.worlds else []
    return [
        *worlds,
        f"{len(rivals)} methods x {_num_trials(config)} settings on validation prompts at seed {config.seed}, then "
        f"{config.seeds} seeds on test prompts; {describe_workers(config.executor, 'core')}",
        ", ".join(rival.title for rival in rivals.values()),
    ]


def _num_trials(config: CompareConfig) -> int:
    return QUICK_TRIALS if config.quick else NUM_TRIALS


def _validation_score(config: CompareConfig, folder: RunFolder, model: str) -> float:
    rows: Any = score_rows(_judged(folder, model, config.seed, "validation"))
    value = next(score.value for score in rows if score.metric == CHOSEN_BY)
    return -1.0 if value is None else float(value)


def _accuracy(config: CompareConfig, root: Path, model: str) -> list[Score]:
    """Return the accuracy of a model on held-out pairs, all seeds."""
    runs = [scores_folder(root, model, seed, "test") for seed in seeds_of(config)]
    return read_accuracy(runs, confidence=config.confidence)


def _judged(folder: RunFolder, model: str, seed: int, part: str) -> list[Judged]:
    runs = scores_folder(folder.path, model, seed, part)
    return read_judged(runs / "answers", runs / "scores", seed=seed)
