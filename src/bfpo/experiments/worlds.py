"""`bfpo compare` over several worlds: what each method loses from the first one to the others, and who stays ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bfpo.config import CompareConfig
from bfpo.core.console import level_text
from bfpo.core.markdown import table
from bfpo.core.records import load
from bfpo.core.schema import Score
from bfpo.experiments.compare import SHOWN, models_of, rivals_of, scores_folder, value_text
from bfpo.experiments.points import read_judged
from bfpo.experiments.steps import CEILING, START, seeds_of
from bfpo.scores.categories import category_table, spread_over
from bfpo.scores.comparisons import paired_row, with_holm
from bfpo.scores.records import ComparedWorld, ComparisonFile, WorldChange, WorldMethod, WorldsFile
from bfpo.scores.scores import METRICS, Judged, p_text, pair_values
from bfpo.world.dials import NO_DIALS, Dials

__all__ = ["collect_worlds", "dials_of", "draw_worlds", "noise_of", "score_line", "world_folder", "worlds_markdown"]

METRIC = SHOWN[0]
_NOISE = ("safety_flips", "order_flips")
_TICKS = (2, 5, 10, 20, 30, 50, 70, 80, 90, 95, 98, 99, 99.5, 99.9)


def world_folder(root: Path, name: str) -> Path:
    """Return the run folder of the comparison in one world."""
    return root / "worlds" / name


def noise_of(dials: Mapping[str, Any]) -> float | None:
    """Return the share of flipped labels of both kinds if it is one and nothing else is changed, else `None`."""
    shares = {float(dials.get(key) or 0.0) for key in _NOISE}
    others = any(value for key, value in dials.items() if key not in _NOISE)
    return shares.pop() if len(shares) == 1 and not others else None


def dials_of(config: CompareConfig, name: str) -> dict[str, Any]:
    """Return the dials that a world is trained with, its own and those of `world`, without defaults."""
    world = config.of_world(name).world
    return {key: value for key in Dials.model_fields if (value := getattr(world, key)) != getattr(NO_DIALS, key)}


def collect_worlds(config: CompareConfig, root: Path) -> WorldsFile:
    """Return the comparisons of all worlds side by side.

    A change is paired by topic and seed with the first world, over its prompts; all changes are one family under Holm's
    correction. Raises `RunError` for a file of a world that cannot be read.
    """
    found = {name: load(ComparisonFile, world_folder(root, name) / "comparison.json") for name in config.worlds}
    worlds = [
        ComparedWorld(
            name,
            dials=(dials := dials_of(config, name)),
            noise=noise_of(dials),
            best=result.best,
            not_told_from_best=result.comparisons.not_told_from_best or [],
            methods=[
                WorldMethod(m.name, m.title, m.trainings, m.scores[METRIC], m.seed_values[METRIC], m.setting)
                for m in result.methods
            ],
        )
        for name, result in found.items()
    ]
    return WorldsFile(config.confidence, METRIC, worlds, list(_changes(config, root, worlds)))


def _changes(config: CompareConfig, root: Path, worlds: Sequence[ComparedWorld]) -> Iterator[WorldChange]:
    before = _judged(config, root, worlds[0])
    rows = []
    for world in worlds[1:]:
        for name, judged in _judged(config, root, world).items():
            if name not in (START, CEILING):
                paired = pair_values(_with_prompts_of(before[name], judged), before[name], METRIC)
                row = WorldChange(name, world.name)
                rows.append(paired_row(row, paired, confidence=config.confidence))
    yield from with_holm(rows)


def _with_prompts_of(first: Sequence[Judged], judged: Sequence[Judged]) -> list[Judged]:
    """Return answers with the prompts of the first world: an id names a topic, `multi_turn` changes the words."""
    prompts = {(row.id, row.seed): row.prompt for row in first}
    return [replace(row, prompt=prompts.get((row.id, row.seed), row.prompt)) for row in judged]


def _judged(config: CompareConfig, root: Path, world: ComparedWorld) -> dict[str, list[Judged]]:
    """Return the judged test answers of every method at its chosen setting, all seeds."""
    folder, rivals = world_folder(root, world.name), rivals_of(config)
    judged: dict[str, list[Judged]] = {}
    for method in world.methods:
        model = method.name
        if model in rivals:
            number = [dict(trial) for trial in rivals[model].trials].index(method.setting)
            model = models_of(rivals[model], [number])[0]
        runs = {seed: scores_folder(folder, model, seed, "test") for seed in seeds_of(config)}
        judged[method.name] = [
            row for seed, run in runs.items() for row in read_judged(run / "answers", run / "scores", seed=seed)
        ]
    return judged


# ------------------------------------------------------------------------------------------------ the table


def worlds_markdown(result: WorldsFile) -> str:
    """Return the worlds as Markdown: scores, changes from the first world, spread and worst category, who is ahead."""
    names = [world.name for world in result.worlds]
    order = _ordered(result)
    first = result.worlds[0]
    changes = {(row.method, row.world): row for row in result.changes}
    scores = {(m.name, world.name): m for world in result.worlds for m in world.methods}
    level = level_text(result.confidence)
    lines = [
        f"{METRICS[result.metric].title.capitalize()}, per cent, {level} intervals over prompts and "
        f"seeds, number of seeds {len(first.methods[0].seed_values)}; every method at the best of its settings in that "
        "world, chosen on validation prompts by the exact oracle, which noise does not touch. Bold: the highest, and "
        "those not distinguishable from it in that world. Sorted by the mean over worlds.",
        "",
        *table(
            ["method", *names],
            (
                [title, *(_cell(world, scores[name, world.name]) for world in result.worlds)]
                for name, title in order.items()
            ),
        ),
        "",
        *(f"- {world.name}: {_dials(world.dials)}. {_ahead(world)}" for world in result.worlds),
    ]
    if len(names) > 1:
        lines += [
            "",
            f"## Change from {first.name}",
            "",
            f"In points, paired by prompt and seed, with the p-value after Holm's correction over all "
            f"{len(result.changes)} changes.",
            "",
            *table(
                ["method", *names[1:]],
                (
                    [title, *(_change(changes[name, world]) for world in names[1:])]
                    for name, title in order.items()
                    if (name, names[1]) in changes
                ),
            ),
        ]
    lines += ["", "## Spread over seeds", "", "Values of the seeds, per cent, and the largest minus the smallest.", ""]
    seeds = ([title, *(_seeds(scores[name, world]) for world in names)] for name, title in order.items())
    lines += table(["method", *names], seeds)
    named = (([world.name, one.title], one.score) for world in result.worlds for one in world.methods)
    worst = category_table(named, ["world", "method"])
    lines += ["", "## Worst category", *worst] if worst else []
    chosen = (
        [title, *(_dials(scores[name, world].setting) for world in names)]
        for name, title in order.items()
        if name not in (START, CEILING)
    )
    lines += ["", "## Settings chosen", "", *table(["method", *names], chosen)]
    return "\n".join(lines) + "\n"


def _ordered(result: WorldsFile) -> dict[str, str]:
    """Return the titles of the methods by name, the highest mean over worlds first, start and ceiling last."""
    values: dict[str, list[float]] = {}
    for world in result.worlds:
        for one in world.methods:
            values.setdefault(one.name, []).append(one.score.value or 0.0)
    titles = {one.name: one.title for one in result.worlds[0].methods}
    return {
        name: titles[name] for name in sorted(titles, key=lambda name: (name in (START, CEILING), -sum(values[name])))
    }


def _cell(world: ComparedWorld, method: WorldMethod) -> str:
    text = _number(method.score)
    return f"**{text}**" if method.name in (world.best, *world.not_told_from_best) else text


def _number(score: Score) -> str:
    if score.value is None:
        return "not measured"
    if score.low is None or score.high is None:
        return f"{100 * score.value:.1f}"
    return f"{100 * score.value:.1f} ({100 * score.low:.1f} to {100 * score.high:.1f})"


def _change(row: WorldChange) -> str:
    if row.difference is None or row.low is None or row.high is None:
        return "not measured"
    p_value = "" if row.p_holm is None else f", p {p_text(row.p_holm)}"
    return f"{100 * row.difference:+.1f} ({100 * row.low:+.1f} to {100 * row.high:+.1f}){p_value}"


def _seeds(method: WorldMethod) -> str:
    values = ", ".join("none" if value is None else f"{100 * value:.1f}" for value in method.seed_values)
    spread = spread_over(method.seed_values)
    return values if spread is None else f"{values} ({100 * spread:.1f})"


def _dials(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value_text(value)}" for key, value in values.items()) or "no dial"


def _ahead(world: ComparedWorld) -> str:
    titles = {method.name: method.title for method in world.methods}
    if not world.not_told_from_best:
        return f"{titles[world.best]} is ahead of all others."
    alike = ", ".join(titles[name] for name in world.not_told_from_best)
    return f"{titles[world.best]} is highest, not distinguishable from {alike}."


# ------------------------------------------------------------------------------------------------ the figure


def draw_worlds(result: WorldsFile) -> dict[str, bytes]:
    """Return `worlds.png` and `worlds.svg`: score against noise, one line a method, and the other worlds beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bfpo.plots.style import (
        CEILING_COLOUR,
        MARKERS,
        METHOD_COLOURS,
        START_COLOUR,
        figure_style,
        png_bytes,
        svg_bytes,
    )

    order = _ordered(result)
    noisy = sorted((world for world in result.worlds if world.noise is not None), key=lambda world: world.noise or 0.0)
    others = [world for world in result.worlds if world.noise is None]
    ends = {START: START_COLOUR, CEILING: CEILING_COLOUR}
    panels = [worlds for worlds in (noisy, others) if worlds]
    with figure_style("worlds"):
        figure = Figure(figsize=(6.6 + 1.5 * len(others) * bool(noisy), 6.4), layout="constrained")
        FigureCanvasAgg(figure)
        widths = [max(3.0, float(len(worlds))) if worlds is noisy else float(len(worlds)) for worlds in panels]
        every = figure.subplots(1, len(panels), sharey=True, width_ratios=widths, squeeze=False)[0]
        _spread_ends(every[0])
        for axes, worlds in zip(every, panels, strict=True):
            places = [100 * (world.noise or 0.0) for world in worlds] if worlds is noisy else list(range(len(worlds)))
            step = 0.012 * (max(places) - min(places) or 1.0) if worlds is noisy else 0.7 / len(order)
            for number, (name, title) in enumerate(order.items()):
                found = [next(one.score for one in world.methods if one.name == name) for world in worlds]
                shift = step * (number - (len(order) - 1) / 2) * (0.35 if worlds is noisy else 1.0)
                score_line(
                    axes,
                    [place + shift for place in places],
                    found,
                    label=title,
                    color=ends.get(name, METHOD_COLOURS[number % len(METHOD_COLOURS)]),
                    marker="x" if name in ends else MARKERS[number // len(METHOD_COLOURS) % len(MARKERS)],
                    linestyle="none" if worlds is others else "--" if name in ends else "-",
                    linewidth=2.4 if name == "bfpo" else 1.3,
                )
            axes.set_xticks(
                places, [world.name for world in worlds] if worlds is others else [f"{x:g}" for x in places]
            )
            if worlds is noisy:
                axes.set_xlabel(f"flipped labels ({' and '.join(key.replace('_', ' ') for key in _NOISE)}), per cent")
        every[0].set_ylabel(f"{METRICS[result.metric].title}, per cent")
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8.5)
    return {"worlds.png": png_bytes(figure), "worlds.svg": svg_bytes(figure, salt="worlds")}


def _spread_ends(axes: Any) -> None:
    """Draw per cent by their log odds: otherwise the methods near 100 lie on each other below one that is at 30."""
    lowest, highest = 1.0, 99.9

    def odds(per_cent: Any) -> Any:
        share = np.clip(np.asarray(per_cent, dtype=float), lowest, highest) / 100
        return np.log(share / (1 - share))

    def per_cent(log_odds: Any) -> Any:
        return 100 / (1 + np.exp(-np.asarray(log_odds, dtype=float)))

    from matplotlib.ticker import FixedLocator, StrMethodFormatter

    axes.set_ylim(10, 99, auto=True)  # until there is data: both limits of the default are outside the scale
    axes.set_yscale("function", functions=(odds, per_cent))
    axes.yaxis.set_major_locator(FixedLocator(_TICKS))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def score_line(axes: Any, places: Sequence[float], scores: Sequence[Score], **style: Any) -> None:
    """Draw the measured scores of a method with their intervals, in per cent."""
    known = [(x, one.value, one) for x, one in zip(places, scores, strict=True) if one.value is not None]
    below = [100 * (value - (value if one.low is None else one.low)) for _, value, one in known]
    above = [100 * ((value if one.high is None else one.high) - value) for _, value, one in known]
    xs, ys = [x for x, _, _ in known], [100 * value for _, value, _ in known]
    axes.errorbar(xs, ys, yerr=[below, above], markersize=4.5, elinewidth=0.8, capsize=1.5, **style)
