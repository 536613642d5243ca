"""STAGE: train and evaluate a grid of settings, or evaluate blends, and show the trade-off between two objectives."""

from __future__ import annotations

import logging
from pathlib import Path

from bfpo.config import SweepConfig
from bfpo.core.runs import RunFolder
from bfpo.experiments.points import Point, chains_of, plan_points, scores_of

# What is imported where it is used takes seconds (torch, transformers, scipy): a mistake in a grid is told without.

__all__ = ["preview", "run"]

logger = logging.getLogger(__name__)

_GIB = 2**30
# Keys of `bfpo train` whose value no estimate of memory depends on.
_OF_NO_MEMORY = frozenset(
    {"method", "beta", "alpha", "safety_weight", "safedpo_delta", "bso_shift", "sba_lambda", "sba_scale", "sba_clamp"}
    | {"safety_share", "anchor_weight", "buffer_weight", "learning_rate", "lr_scheduler_type", "warmup_steps"}
    | {"weight_decay", "max_grad_norm", "seed"}
)


def run(config: SweepConfig, folder: RunFolder) -> None:
    """Write `tradeoff.json`, `.csv`, `.md` and the figure as `.svg`, `.png`; the runs are below `points/`.

    Tokens and reference log-probs are those of all points: each is computed once. Raises `ConfigError` for a config
    that a stage refuses, before anything runs, `RunError` where a point fails; a resumed sweep goes on from what has
    ended.
    """
    points = plan_points(config)
    files = [file for file in (config.train, config.generate, config.evaluate) if file is not None]
    folder.add_data("configs", files)

    from bfpo.experiments.inputs import check_inputs
    from bfpo.experiments.workers import run_chains

    check_inputs(config, points)
    memory = {} if config.memory_gib is None else _memory(config, points)
    chains = chains_of(config, points, folder.path, memory)
    budget = None if config.memory_gib is None else int(config.memory_gib * _GIB)
    run_chains(chains, config.processes, folder.path / "logs", memory=budget)
    _write_result(config, folder, points)


def preview(config: SweepConfig) -> list[str]:
    """Return the points with the memory that each training needs by estimate; models, data and judge are checked."""
    points = plan_points(config)

    from bfpo.experiments.inputs import check_inputs

    found = check_inputs(config, points)
    memory = _memory(config, points)
    chains = chains_of(config, points, Path("OUT"), memory)
    return [
        *found,
        f"{len(points)} models, {config.processes} at a time",
        *(
            f"{chain.name}: {', '.join(step.stage for step in chain.steps)}, {_memory_words(chain.memory)}"
            if config.blends is None
            else f"{chain.name}: {', '.join(step.stage for step in chain.steps)}"
            for chain in chains
        ),
    ]


def _memory_words(memory: int) -> str:
    return f"{memory / _GIB:.2f} GiB" if memory else "memory not estimated (quantize)"


def _write_result(config: SweepConfig, folder: RunFolder, points: list[Point]) -> None:
    from bfpo.core.console import show
    from bfpo.experiments.judged import read_judged
    from bfpo.experiments.tradeoff import tradeoff, tradeoff_csv, tradeoff_markdown
    from bfpo.plots.style import png_bytes, svg_bytes
    from bfpo.report.figures.front import front_figure
    from bfpo.scores.scores import METRICS

    result = tradeoff(
        {point.name: read_judged(*scores_of(point, folder.path)) for point in points},
        {point.name: point.settings for point in points},
        config.objectives,
        config.reference_point or dict.fromkeys(config.objectives, 0.0),
        at_least=config.at_least,
        validation_share=config.validation_share,
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


def _memory(config: SweepConfig, points: list[Point]) -> dict[str, int]:
    """Return the estimates of `bfpo doctor` for the trainings, bytes by point; those of the same shape are one."""
    from bfpo.commands.doctor_diagnosis import examine

    known: dict[str, int] = {}
    memory: dict[str, int] = {}
    for point in points:
        if point.train is None or config.train is None:
            continue
        if point.train.quantize is not None and config.memory_gib is None:  # which no estimate counts
            continue
        shape = repr({key: value for key, value in point.train if key not in _OF_NO_MEMORY})
        if shape not in known:
            known[shape] = examine(Path(config.train), point.overrides).memory.total
        memory[point.name] = known[shape]
    most = max(memory.values(), default=0) / _GIB
    if config.memory_gib is not None and most > config.memory_gib:
        logger.warning(
            "a training needs %.2f GiB by estimate, memory_gib is %g: it runs alone", most, config.memory_gib
        )
    return memory
