"""STAGE: train and evaluate a grid of settings, or evaluate blends, and show the trade-off between two objectives."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bfpo.config import AlignConfig, EvaluateConfig, GenerateConfig, ReferenceConfig, SweepConfig, load_config
from bfpo.console import show
from bfpo.doctor.diagnosis import GIB, examine
from bfpo.errors import RunError
from bfpo.evaluation.figures.front import front_figure
from bfpo.evaluation.figures.style import png_bytes, svg_bytes
from bfpo.evaluation.scores import METRICS
from bfpo.experiments.chains import Chain, Step
from bfpo.experiments.judged import read_judged
from bfpo.experiments.tradeoff import tradeoff, tradeoff_csv, tradeoff_markdown
from bfpo.experiments.workers import run_chains
from bfpo.runs import RunFolder

__all__ = ["preview", "run"]

logger = logging.getLogger(__name__)

REFERENCE = "reference"


def run(config: SweepConfig, folder: RunFolder) -> None:
    """Write `tradeoff.json`, `.csv`, `.md` and the figure as `.svg`, `.png`; the runs are below `points/`.

    The reference log-probs of all points are computed once, before the first training. Raises `ConfigError` for a
    config file that a stage refuses, `RunError` where a point fails; a resumed sweep goes on from what has ended.
    """
    files = [file for file in (config.train, config.generate, config.evaluate) if file is not None]
    folder.add_data("configs", files)
    points = _points(config)
    chains = _chains(config, folder.path, points)
    run_chains(chains, config.processes, folder.path / "logs", memory=_budget(config))
    judged = {
        name: read_judged(_place(folder.path, name) / "answers", _place(folder.path, name) / "scores")
        for name in points
    }
    result = tradeoff(
        judged,
        points,
        config.objectives,
        config.reference_point or dict.fromkeys(config.objectives, 0.0),
        at_least=config.at_least,
        confidence=config.confidence,
        num_resamples=config.bootstrap_samples,
        random_seed=config.seed,
    )
    folder.write_json("tradeoff.json", result)
    folder.write_text("tradeoff.csv", tradeoff_csv(result))
    text = tradeoff_markdown(result)
    folder.write_text("tradeoff.md", text)
    figure = front_figure(result, {key: METRICS[key].title for key in config.objectives})
    folder.write_bytes("tradeoff.svg", svg_bytes(figure, salt="front"))
    folder.write_bytes("tradeoff.png", png_bytes(figure))
    folder.write_card("Trade-off", {"Trade-off": text})
    show(text)


def preview(config: SweepConfig) -> list[str]:
    """Return the points with the memory that each training needs by estimate, where a budget is given."""
    points = _points(config)
    chains = _chains(config, Path("OUT"), points)
    return [
        f"{len(points)} models, {config.processes} at a time",
        *(
            f"{chain.name}: {', '.join(step.stage for step in chain.steps)}"
            + (f", {chain.memory / GIB:.2f} GiB" if chain.memory else "")
            for chain in chains
        ),
    ]


def _points(config: SweepConfig) -> dict[str, dict[str, Any]]:
    """Return the settings of each point by its name."""
    if config.blends is not None:
        file = Path(config.blends) / "models.json"
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))["models"]
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"{file}: cannot be read as a run of `bfpo interpolate` ({error}); check blends") from error
        return {f"weight={row['weight']:g}": dict(row) for row in rows}
    combinations = itertools.product(*config.grid.values())
    points = [dict(zip(config.grid, values, strict=True)) for values in combinations]
    return {",".join(f"{key}={_text(value)}" for key, value in point.items()): point for point in points}


def _chains(config: SweepConfig, root: Path, points: Mapping[str, Mapping[str, Any]]) -> list[Chain]:
    if config.blends is not None:
        models = {name: Path(point["model"]) for name, point in points.items()}
        return [Chain(name, config.seed, _asking(config, root, name, model)) for name, model in models.items()]
    assert config.train is not None  # the config has checked it
    file = Path(config.train)
    chains: list[Chain] = []
    needs: tuple[str, ...] = ()
    trains = {name: load_config(AlignConfig, file, _settings(point)) for name, point in points.items()}
    if next(iter(trains.values())).reference in ("auto", "precompute"):
        settings = _settings(next(iter(points.values())))
        step = Step("reference", load_config(ReferenceConfig, file, settings), root / REFERENCE)
        chains, needs = [Chain(REFERENCE, config.seed, (step,), memory=_memory(config, settings))], (REFERENCE,)
    for name, train in trains.items():
        place = _place(root, name)
        step = Step("train", train, place / "train")
        steps = (step, *_asking(config, root, name, place / "train" / "model"))
        chains.append(Chain(name, config.seed, steps, needs, _memory(config, _settings(points[name]))))
    return chains


def _asking(config: SweepConfig, root: Path, name: str, model: Path) -> tuple[Step, Step]:
    place = _place(root, name)
    generate = load_config(GenerateConfig, config.generate, [f"model={json.dumps(str(model))}"])
    completions = place / "answers" / "completions.jsonl"
    evaluate = load_config(EvaluateConfig, config.evaluate, [f"completions={json.dumps(str(completions))}"])
    return Step("generate", generate, place / "answers"), Step("evaluate", evaluate, place / "scores")


def _place(root: Path, name: str) -> Path:
    return root / "points" / name.replace("/", "_")


def _settings(point: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in point.items()]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _budget(config: SweepConfig) -> int | None:
    return None if config.memory_gib is None else int(config.memory_gib * GIB)


def _memory(config: SweepConfig, settings: list[str]) -> int:
    """Return the estimate of `bfpo doctor` for a training, 0 where nobody asks."""
    if config.memory_gib is None or config.train is None:
        return 0
    total = examine(Path(config.train), settings).memory.total
    if total > config.memory_gib * GIB:
        needed = total / GIB
        logger.warning(
            "a training needs %.2f GiB by estimate, memory_gib is %g: it runs alone", needed, config.memory_gib
        )
    return total
