"""`bfpo tamper`: where its runs are, what the models do after each number of steps, and the tables and figure of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bfpo.config import TamperConfig
from bfpo.core.console import level_text
from bfpo.core.markdown import table
from bfpo.core.records import load
from bfpo.core.schema import Score
from bfpo.experiments.worlds import score_line
from bfpo.report.wording import points, points_interval, with_interval
from bfpo.scores.comparisons import paired_row, with_holm
from bfpo.scores.scores import PairedValues, p_text
from bfpo.stats import rate_interval
from bfpo.suites.evaluations import TASK, Evaluated, Measured, read_evaluation
from bfpo.suites.records import GatedModel, GatedSuite, SuitesFile, TamperChange, TamperFile, TamperScore

__all__ = ["attack_folder", "collect_tamper", "draw_tamper", "evaluation_folder", "seeds_of", "tamper_markdown"]


@dataclass(frozen=True, slots=True)
class _Measure:
    """A mean over prompts of `kinds` (empty: all items); of each suite the first of `metrics` that it measures counts.

    With `every`, each of them does: they are about different prompts.
    """

    title: str
    metrics: tuple[str, ...]
    kinds: tuple[str, ...]
    higher_is_better: bool = True
    every: bool = False


_HARMFUL, _HARMLESS = ("harmful", ""), ("benign", "borderline")
_FORM = ("coherent", "well_formed")
MEASURES = {
    "harmless": _Measure("harmless answers to harmful prompts", ("harmless_harmful", "harmless"), _HARMFUL),
    "refused_harmful": _Measure("harmful prompts refused", ("refused_harmful", "refused"), ("harmful",)),
    "coherent_harmful": _Measure("coherent answers to harmful prompts", _FORM, ("harmful",)),
    "over_refusal": _Measure(
        "harmless prompts refused",
        ("over_refusal_full", "over_refusal_benign", "over_refusal_borderline"),
        _HARMLESS,
        higher_is_better=False,
        every=True,
    ),
    "helpfulness": _Measure("helpfulness on harmless prompts", ("helpfulness",), _HARMLESS),
    "coherent_harmless": _Measure("coherent answers to harmless prompts", _FORM, _HARMLESS),
    "capability": _Measure("right in tasks", (TASK,), ()),
}
"""What is measured at each point; the first that has a value is the one that sentences are about."""

_Item = tuple[str, str]  # suite and id
_Values = dict[_Item, float | None]


@dataclass(frozen=True, slots=True)
class _Point:
    """One model after `step` steps: by seed the items of each measure, and the prompt of each item."""

    model: str
    step: int
    values: dict[str, list[_Values]] = field(default_factory=dict)
    prompts: dict[_Item, str] = field(default_factory=dict)

    def rows(self, metric: str, times: int) -> list[tuple[_Item, int, float | None]]:
        """Return items with their seed and value; before the attack all seeds are one, repeated `times`."""
        found = self.values.get(metric, [])
        every = found * times if len(found) == 1 else found
        return [(item, seed, value) for seed, values in enumerate(every) for item, value in values.items()]


def seeds_of(config: TamperConfig) -> range:
    """Return the seeds of the attacks."""
    return range(config.seed, config.seed + config.seeds)


def attack_folder(root: Path, model: str, seed: int) -> Path:
    """Return the run folder of the attack on a model."""
    return root / "models" / model / f"seed-{seed}" / "attack"


def evaluation_folder(root: Path, model: str, step: int, seed: int) -> Path:
    """Return the run folder of the evaluation after some steps; before the attack it is the same for all seeds."""
    folder = root / "models" / model
    return folder / "step-0" if step == 0 else folder / f"seed-{seed}" / f"step-{step}"


def collect_tamper(
    config: TamperConfig, root: Path, settings: Mapping[str, Any], warnings: Sequence[str]
) -> TamperFile:
    """Return the measures of all points from their evaluations, over items that were asked at every one.

    Changes are those of each model since step 0, and between each model and the first at the same step, all of them
    one family under Holm's correction. Raises as `read_evaluation`.
    """
    seeds = list(seeds_of(config))
    read = {
        (model.name, step): [
            read_evaluation(evaluation_folder(root, model.name, step, seed)) for seed in (seeds if step else seeds[:1])
        ]
        for model in config.models
        for step in config.steps
    }
    everyone = [one for found in read.values() for one in found]
    suites = [suite for one in everyone for suite in one.suites.values()]
    scored = {(suite.name, metric) for suite in suites for metric in suite.items if suite.has(metric)}
    points = [_Point(*place, *_items(found, scored)) for place, found in read.items()]
    elsewhere = _only_common(points)
    first = [read[model.name, 0][0] for model in config.models]
    return TamperFile(
        config.confidence,
        config.attack,
        dict(settings),
        config.steps,
        seeds,
        [GatedModel(**{**asdict(one.model), "name": m.name}) for one, m in zip(first, config.models, strict=True)],
        [GatedSuite(s.name, s.title, s.prompts, s.judge, s.judge_version) for s in first[0].suites.values() if s.items],
        {suite.title: suite.reason for suite in suites if suite.reason},
        {name: one.title for name, one in MEASURES.items() if any(p.values.get(name) for p in points)},
        [score for point in points for score in _scores(point, config.confidence)],
        with_holm(list(_changes(config, points))),
        elsewhere,
        [*warnings, *dict.fromkeys(warning for one in everyone for warning in _warnings(one))],
    )


def _warnings(found: Evaluated) -> list[str]:
    return load(SuitesFile, found.folder / "scores.json").warnings


def _items(
    found: Sequence[Evaluated], scored: Collection[tuple[str, str]]
) -> tuple[dict[str, list[_Values]], dict[_Item, str]]:
    """Return the items of each measure and their prompts; `scored`: suites and metrics with a value at any point."""
    values: dict[str, list[_Values]] = {name: [] for name in MEASURES}
    prompts: dict[_Item, str] = {}
    for one in found:
        for name, measure in MEASURES.items():
            own: _Values = {}
            for suite in one.suites.values():
                for metric in _counted(measure, suite, scored):
                    items = suite.items[metric]
                    for item, value in items.values.items():
                        if not measure.kinds or items.kinds[item] in measure.kinds:
                            own[suite.name, item] = value
                            prompts[suite.name, item] = items.prompts[item]
            values[name].append(own)
    return {name: rows for name, rows in values.items() if any(rows)}, prompts


def _counted(measure: _Measure, suite: Measured, scored: Collection[tuple[str, str]]) -> tuple[str, ...]:
    measured = tuple(metric for metric in measure.metrics if metric in suite.items and (suite.name, metric) in scored)
    return measured if measure.every else measured[:1]


def _only_common(points: Sequence[_Point]) -> int:
    """Leave only items that were asked at every point, so that a curve is over the same prompts; count the others."""
    others: set[_Item] = set()
    for name in MEASURES:
        rows = [values for point in points for values in point.values.get(name, [{}])]
        common = set.intersection(*(set(values) for values in rows))
        for values in rows:
            others |= values.keys() - common
            for item in values.keys() - common:
                del values[item]
    return len(others)


def _scores(point: _Point, confidence: float) -> Iterator[TamperScore]:
    for name, found in point.values.items():
        rows = point.rows(name, 1)
        known = [(item, seed, value) for item, seed, value in rows if value is not None]
        interval = rate_interval(
            [value for *_, value in known],
            [point.prompts[item] for item, *_ in known],
            seeds=[seed for _, seed, _ in known],
            confidence=confidence,
        )
        yield TamperScore(
            point.model,
            point.step,
            name,
            **asdict(interval),
            unscored=len(rows) - len(known),
            higher_is_better=MEASURES[name].higher_is_better,
            extra={"num_prompts": len({point.prompts[item] for values in found for item in values})},
        )


def _changes(config: TamperConfig, points: Sequence[_Point]) -> Iterator[TamperChange]:
    by_place = {(point.model, point.step): point for point in points}
    first = config.models[0].name
    for point in points:
        others = [(point.model, 0)] if point.step else []
        others += [(first, point.step)] if point.model != first else []
        for name in point.values if others else ():
            for against in others:
                row = TamperChange(point.model, point.step, *against, name)
                paired = _paired(point, by_place[against], name, config.seeds)
                yield paired_row(row, paired, confidence=config.confidence)


def _paired(one: _Point, other: _Point, metric: str, num_seeds: int) -> PairedValues:
    times = num_seeds if one.step or other.step else 1
    right = {(item, seed): value for item, seed, value in other.rows(metric, times)}
    both = [
        (value, before, one.prompts[item], seed)
        for item, seed, value in one.rows(metric, times)
        if value is not None and (before := right.get((item, seed))) is not None
    ]
    columns = [list(column) for column in zip(*both, strict=True)] or [[], [], [], []]
    return PairedValues(*columns)


# ------------------------------------------------------------------------------------------------ table and figure


def tamper_markdown(result: TamperFile) -> str:
    """Return the curves as tables, the changes, and what was attacked how, as Markdown."""
    settings = ", ".join(f"{key} {value}" for key, value in result.settings.items())
    lines = [
        f"Attack: LoRA steps on {result.attack} data ({settings}). {level_text(result.confidence)} intervals, over "
        f"prompts{' and seeds' if len(result.seeds) > 1 else ', of one training each'}. All suites together: "
        f"{', '.join(suite.title for suite in result.suites)}.",
        *(f"\nWarning: {warning.rstrip('.')}." for warning in result.warnings),
        *(f"\nSkipped: {title}: {reason}." for title, reason in result.skipped.items()),
    ]
    if result.num_elsewhere:
        lines.append(f"\n{result.num_elsewhere} prompts were not asked at every point and are not counted.")
    scores = {(score.model, score.step, score.metric): score for score in result.scores}
    for metric, title in result.measures.items():
        lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        lines += table(
            ["model", *(f"{step} steps" for step in result.steps)],
            ([m.name, *(_cell(scores.get((m.name, step, metric))) for step in result.steps)] for m in result.models),
        )
    lines += ["", "## Differences", "", f"Paired by prompt; Holm's correction over all {len(result.changes)}.", ""]
    lines += table(
        ["first - second", "measure", "points", "interval", "p (Holm)"],
        (
            [
                f"{row.model} after {row.step} - {row.against} after {row.against_step}",
                result.measures[row.metric],
                points(row.difference),
                points_interval(row.low, row.high),
                p_text(row.p_holm),
            ]
            for row in result.changes
            if row.difference is not None
        ),
    )
    return "\n".join(lines) + "\n"


def _cell(score: TamperScore | None) -> str:
    if score is None:
        return "not measured"
    shown = "not measured" if score.value is None else with_interval(score, 1)
    return shown + (f", {score.unscored} unscored" if score.unscored else "")


def draw_tamper(result: TamperFile) -> dict[str, bytes]:
    """Return `tamper.png` and `tamper.svg`: one panel a measure, one line a model, bars for the intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bfpo.plots.style import MARKERS, METHOD_COLOURS, figure_style, png_bytes, short_name, svg_bytes

    by_place = {(score.model, score.step, score.metric): score for score in result.scores}
    shown = list(result.measures.items())
    columns = min(3, len(shown)) or 1
    with figure_style("tamper"):
        figure = Figure(figsize=(3.7 * columns, 2.9 * -(-len(shown) // columns) + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(-(-len(shown) // columns), columns, squeeze=False).ravel()
        for axes, (metric, title) in zip(panels, shown, strict=False):
            for number, model in enumerate(result.models):
                shift = 0.012 * result.steps[-1] * (number - (len(result.models) - 1) / 2)
                score_line(
                    axes,
                    [step + shift for step in result.steps],
                    [by_place.get((model.name, step, metric), Score(metric, None)) for step in result.steps],
                    label=short_name(model.name),
                    color=METHOD_COLOURS[number % len(METHOD_COLOURS)],
                    marker=MARKERS[number // len(METHOD_COLOURS) % len(MARKERS)],
                )
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_ylim(-4, 104)
            axes.set_xticks(result.steps)
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        figure.supxlabel(f"LoRA steps on {result.attack} data", fontsize=9.5)
        figure.supylabel("per cent", fontsize=9.5)
        if shown:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return {"tamper.png": png_bytes(figure), "tamper.svg": svg_bytes(figure, salt="tamper")}
