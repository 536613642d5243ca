"""`bfpo compare`: the methods as chains of stages, the settings to try for each, and the result as tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bfpo.config import CompareConfig, InterpolateConfig
from bfpo.core.console import level_text
from bfpo.core.errors import ConfigError, SettingError
from bfpo.core.markdown import table
from bfpo.core.schema import Score
from bfpo.experiments.points import Chain, Step, blend_name
from bfpo.experiments.steps import CEILING, START, asking, sft_step, train_step
from bfpo.objective.methods import METHODS, make_method
from bfpo.scores.categories import category_table, spread_over
from bfpo.scores.comparisons import compare_pairs, indistinguishable_from
from bfpo.scores.records import (
    ComparedMethod,
    ComparisonFamily,
    ComparisonFile,
    MethodDifference,
    ModelComparison,
    TriedSetting,
)
from bfpo.scores.scores import METRICS, Judged, p_text, score_rows
from bfpo.stats import pareto_front

__all__ = [
    "FURTHER",
    "MAIN",
    "NUM_TRIALS",
    "RIVALS",
    "SHOWN",
    "Rival",
    "Trial",
    "chains_of",
    "make_result",
    "models_of",
    "prompts_file",
    "result_markdown",
    "rivals_of",
    "scores_folder",
    "value_text",
]

Trial = Mapping[str, Any]
Part = str
NUM_TRIALS = 4

_GRID: tuple[Trial, ...] = tuple({"beta": beta, "learning_rate": rate} for rate in (1e-3, 2e-3) for beta in (0.1, 0.05))
_BLENDS: tuple[Trial, ...] = tuple(
    {"beta": beta, "learning_rate": 1e-3, "weight": weight}
    for beta, weight in ((0.1, 0.5), (0.1, 0.75), (0.1, 0.25), (0.05, 0.5))
)


def _with(name: str, *values: float) -> tuple[Trial, ...]:
    return tuple({"beta": beta, "learning_rate": 1e-3, name: value} for value in values for beta in (0.1, 0.05))


@dataclass(frozen=True, slots=True)
class Rival:
    """A compared method: `kind` is how it is trained, `trials` the settings to try, those of `--quick` first.

    `trainings`: the number of trainings of one model, each with the same number of steps. `method` is the loss of a
    rival of the kind "loss" whose name is not that of one.
    """

    name: str
    title: str
    kind: str = "loss"
    trials: tuple[Trial, ...] = field(default=_GRID)
    trainings: int = 1
    method: str = ""


def _method(name: str, **more: Any) -> Rival:
    return Rival(name, METHODS[name].title, **more)


RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        *map(_method, ("bfpo", "dpo_h", "dpo_s", "dpo_mix", "ipo", "dpo_safe_first")),
        _method("safedpo", trials=_with("safedpo_delta", 10.0, 2.0)),
        _method("bso", trials=_with("bso_shift", 30.0, 10.0)),
        _method("linear_sum", trials=_with("safety_share", 0.5, 0.75)),
        _method("modpo", kind="modpo", trials=_with("safety_share", 0.5, 0.25), trainings=2),
        Rival("sacpo", "SACPO", "sacpo", trainings=2),
        Rival("p_sacpo", "P-SACPO", "p_sacpo", _BLENDS, 2),
        Rival("soup", "soup", "soup", _BLENDS, 2),
    )
}


FURTHER: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        _method("bso_phi", trials=_with("bso_shift", 10.0, 2.0)),
        *map(_method, ("kto", "kldo", "hypo")),
        _method("b_dpo", trials=_with("b_dpo_scale", 1.0, 2.0)),
        _method("cat_dpo", trials=_with("cat_rate", 0.1, 0.02)),
    )
}
"""Methods with trials of their own that a comparison without `methods` does not train."""


def rivals_of(config: CompareConfig) -> dict[str, Rival]:
    """Return the methods that a comparison trains, by name: those of the table, or those of `methods`.

    Raises `ConfigError` for an entry that names no method, for settings that its method does not have or that are out
    of bounds, for another number of trials than the others have, and for two entries that are equal or of one label.
    """
    if config.methods is None:
        return RIVALS
    rivals: dict[str, Rival] = {}
    for place, entry in enumerate(config.methods):
        try:
            rival = _entry({"method": entry} if isinstance(entry, str) else dict(entry))
        except SettingError as error:
            raise ConfigError(f"methods[{place}]: {error}") from error
        if any(other.title == rival.title for other in rivals.values()):
            raise ConfigError(f"methods[{place}]: got {rival.title!r} twice; give each entry a label of its own")
        if any((other.method, other.trials) == (rival.method, rival.trials) for other in rivals.values()):
            raise ConfigError(
                f"methods[{place}]: {rival.title!r} has the method and the trials of an entry before it; change or "
                "remove one"
            )
        names = (rival.name, *(f"{rival.name}-{number}" for number in range(2, len(config.methods) + 1)))
        rival = replace(rival, name=next(name for name in names if name not in rivals))
        rivals[rival.name] = rival
    return rivals


def _entry(entry: dict[str, Any]) -> Rival:
    """Return the rival of an entry: `method`, `label`, `trials`, and settings of the method for every trial."""
    method, label, trials = (entry.pop(key, None) for key in ("method", "label", "trials"))
    others = {name: _method(name) for name, each in METHODS.items() if not each.shifted}
    known = RIVALS | {name: FURTHER.get(name, rival) for name, rival in others.items() if name not in RIVALS}
    if not isinstance(method, str) or method not in known:
        raise SettingError(f"method: got {method!r}; allowed: {', '.join(known)}")
    for key in ("beta", "learning_rate"):
        if key in entry:
            raise SettingError(f"{key}: is chosen among the trials; list them in `trials` to fix it")
    rival = known[method]
    if entry and rival.kind not in ("loss", "modpo"):
        raise SettingError(f"{', '.join(entry)}: {method} has no settings of its own besides those of `trials`")
    given = rival.trials if trials is None else trials
    if trials is None and any(key in trial for trial in rival.trials for key in entry):
        given = _GRID  # the method's own setting is fixed here, so beta and the learning rate are tried
    if not isinstance(given, (list, tuple)) or not all(isinstance(trial, Mapping) for trial in given):
        raise SettingError(f"trials: got {given!r}; needed: a list of {NUM_TRIALS} mappings")
    every = tuple({**trial, **entry} for trial in given)
    different = {tuple(sorted((key, str(value)) for key, value in trial.items())) for trial in every}
    if len(every) != NUM_TRIALS or len(different) != NUM_TRIALS:
        raise SettingError(f"trials: got {len(different)} different ones; needed: {NUM_TRIALS}, as for every method")
    for trial in every:
        _check_trial(rival, trial)
    name = "-".join([method, *(f"{key}={value_text(value)}" for key, value in entry.items())])
    words = [rival.title, *(f"{key} {value_text(value)}" for key, value in entry.items())]
    name, title = (f"{method}-own" if trials is not None and not entry else name), label or ", ".join(words)
    if not isinstance(title, str):
        raise SettingError(f"label: got {title!r}; needed: text")
    return Rival(name, title, rival.kind, every, rival.trainings, method)


def _check_trial(rival: Rival, trial: Trial) -> None:
    """Raise `SettingError` unless a trial has beta, a learning rate and settings that the method takes."""
    own = {key: value for key, value in trial.items() if key != "learning_rate"}
    rate = trial.get("learning_rate")
    if not isinstance(rate, float) or not rate > 0 or "beta" not in trial:
        raise SettingError(f"trials: got {dict(trial)}; needed in each: beta and a learning_rate above 0")
    if rival.kind in ("loss", "modpo"):
        make_method(rival.name, **own)
    elif rival.kind in ("soup", "p_sacpo"):
        weight = own.pop("weight", None)
        if not isinstance(weight, float) or not 0 <= weight <= 1 or own.keys() != {"beta"}:
            raise SettingError(f"trials: got {dict(trial)}; needed: beta, learning_rate and weight, from 0 to 1")
    elif own.keys() != {"beta"}:
        raise SettingError(f"trials: got {dict(trial)}; needed: beta and learning_rate")


def value_text(value: Any) -> str:
    """Return a setting's value as in names and tables."""
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(slots=True)
class _Seed:
    """The chains of one seed; a training that several methods need is run once."""

    config: CompareConfig
    root: Path
    seed: int
    chains: dict[str, Chain] = field(default_factory=dict)

    @property
    def runs(self) -> Path:
        return self.root / f"seed-{self.seed}"

    def sft(self, name: str) -> tuple[str, Path]:
        step = sft_step(self.config, self.root, name, self.seed)
        self.chains.setdefault(name, Chain(name, self.seed, (step,)))
        return name, step.out / "model"

    def train(self, method: str, trial: Trial, start: tuple[str, Path], **models: tuple[str, Path]) -> tuple[str, Path]:
        name = "-".join([method, *(f"{key}={value_text(value)}" for key, value in trial.items())])
        name = name if start[0] == START else f"{name}-after-{start[0]}"
        settings = {**trial, **{key: str(path) for key, (_, path) in models.items()}}
        step = train_step(self.config, self.root, method, settings, start[1], self.runs / name, self.seed)
        needs = (start[0], *(other for other, _ in models.values()))
        self.chains.setdefault(name, Chain(name, self.seed, (step,), needs))
        return name, step.out / "model"

    def blend(self, name: str, first: tuple[str, Path], second: tuple[str, Path], weight: float) -> tuple[str, Path]:
        config = InterpolateConfig(first=str(first[1]), second=str(second[1]), weights=[weight])
        step = Step("interpolate", config, self.runs / name)
        self.chains.setdefault(name, Chain(name, self.seed, (step,), (first[0], second[0])))
        return name, step.out / "models" / blend_name(weight)

    def model(self, rival: Rival, trial: Trial) -> tuple[str, Path]:
        """Return the chain and the folder of a rival's model, and add the chains that it needs."""
        start = self.sft(START)
        if rival.kind == "loss":
            return self.train(rival.method or rival.name, trial, start)
        common = {key: trial[key] for key in ("beta", "learning_rate")}
        if rival.kind == "modpo":
            return self.train("modpo", trial, start, margin_model=self.train("dpo_s", common, start))
        helpful = self.train("dpo_h", common, start)
        second = self.train("dpo_s", common, start if rival.kind == "soup" else helpful)
        if rival.kind == "sacpo":
            return second
        name = f"{rival.name}-" + "-".join(f"{key}={value:g}" for key, value in trial.items())
        return self.blend(name, helpful, second, trial["weight"])

    def ask(self, name: str, model: tuple[str, Path], part: Part) -> None:
        title = f"{name} on {part}"
        runs = self.runs / "asked" / part / name
        pairs = start = None
        if part == "test" and name not in (START, CEILING):
            pairs, start = self.root / "data" / f"seed-{self.seed}" / "held_out.jsonl", self.sft(START)[1]
        steps = asking(self.config, prompts_file(self.root, part), model[1], runs, self.seed, start, pairs)
        self.chains.setdefault(title, Chain(title, self.seed, tuple(steps), (model[0],)))


def prompts_file(root: Path, part: Part) -> Path:
    """Return the prompts of a part of the held-out topics."""
    return root / "data" / f"{part}.jsonl"


def scores_folder(root: Path, name: str, seed: int, part: Part) -> Path:
    """Return the folder with the answers and verdicts of a model on a part, in `answers/` and `scores/`."""
    return root / f"seed-{seed}" / "asked" / part / name


def models_of(rival: Rival, trials: Iterable[int]) -> list[str]:
    """Return the names of a rival's models at these trials."""
    return [f"{rival.name}-trial{number}" for number in trials]


def chains_of(
    config: CompareConfig, root: Path, seed: int, wanted: Mapping[str, Iterable[int]], part: Part
) -> list[Chain]:
    """Return the chains of one seed that train and evaluate each rival at the numbers of its trials in `wanted`.

    Start and ceiling are evaluated too.
    """
    plan, rivals = _Seed(config, root, seed), rivals_of(config)
    for name in (START, CEILING):
        plan.ask(name, plan.sft(name), part)
    for name, numbers in wanted.items():
        rival = rivals[name]
        numbers = list(numbers)
        for number, title in zip(numbers, models_of(rival, numbers), strict=True):
            plan.ask(title, plan.model(rival, rival.trials[number]), part)
    return list(plan.chains.values())


SHOWN = (
    "helpful_and_safe", "helpfulness", "harmless_harmful", "over_refusal_benign", "over_refusal_borderline",
    "well_formed",
)  # fmt: skip
OBJECTIVES = ("helpfulness", "harmless_harmful")
MAIN = "bfpo"


def make_result(
    config: Mapping[str, Any],
    judged: Mapping[str, Sequence[Judged]],
    accuracy: Mapping[str, Sequence[Score]],
    tried: Mapping[str, Sequence[float]],
    best: Mapping[str, int],
    *,
    rivals: Mapping[str, Rival] = RIVALS,
    confidence: float = 0.95,
) -> ComparisonFile:
    """Return the comparison: scores with intervals, paired differences, trials, settings.

    `accuracy`: on held-out pairs, by BFPO's target for every method. Intervals are clustered by prompt and, with
    several seeds, by seed. Every two methods are compared in `SHOWN[0]` on the same prompts and seeds, one family under
    Holm's correction, so that the best method may be chosen after seeing the results.
    """
    names = [name for name in judged if name in rivals]
    rows = compare_pairs(judged, itertools.combinations(names, 2), SHOWN[:1], confidence=confidence)
    methods = [_measured(name, rivals.get(name), given, confidence) for name, given in judged.items()]
    for method in methods:
        method.accuracy = list(accuracy.get(method.name, ()))
        if method.name in rivals:
            trials = rivals[method.name].trials
            method.setting = dict(trials[best[method.name]])
            values = tried.get(method.name, ())
            method.trials = [TriedSetting(dict(one), value) for one, value in zip(trials, values, strict=False)]
    first = _ranked(methods)[0].name
    for method in methods:
        method.bfpo_minus_this = _difference(MAIN, method.name, rows)
        method.best_minus_this = _difference(first, method.name, rows)
    points = {
        method.title: {key: value for key in OBJECTIVES if (value := method.scores[key].value) is not None}
        for method in methods
        if method.trainings
    }
    complete = {title: values for title, values in points.items() if len(values) == len(OBJECTIVES)}
    return ComparisonFile(
        config=dict(config),
        confidence=confidence,
        methods=methods,
        objectives=list(OBJECTIVES),
        pareto_front=pareto_front(complete, OBJECTIVES),
        best=first,
        comparisons=ComparisonFamily(
            family=f"every two of {len(names)} methods in {SHOWN[0]}",
            num=len(rows),
            rows=rows,
            not_told_from_best=_best_first(indistinguishable_from(first, rows, confidence), methods),
            not_told_from_bfpo=_best_first(indistinguishable_from(MAIN, rows, confidence), methods)
            if MAIN in names
            else None,
        ),
    )


def _measured(name: str, rival: Rival | None, rows: Sequence[Judged], confidence: float) -> ComparedMethod:
    """Return the scores of a method, or of the start or the ceiling, which is no rival and has no training."""
    seeds = sorted({row.seed for row in rows})
    by_seed = [score_rows([row for row in rows if row.seed == seed]) for seed in seeds]
    scores = score_rows(rows, confidence=confidence)
    return ComparedMethod(
        name,
        title=name if rival is None else rival.title,
        trainings=0 if rival is None else rival.trainings,
        scores={score.metric: score for score in scores if score.metric in SHOWN},
        seed_values={metric: [next(s.value for s in one if s.metric == metric) for one in by_seed] for metric in SHOWN},
    )


def _difference(one: str, other: str, rows: Sequence[ModelComparison]) -> MethodDifference | None:
    """Return one - other with its interval and p-values; `None` if the two are not compared."""
    for row in rows:
        if {row.first, row.second} == {one, other}:
            low, value, high = row.low, row.difference, row.high
            if row.first != one:
                low, value, high = (None if x is None else 0.0 - x for x in (high, value, low))
            return MethodDifference(value, low, high, row.num, row.p_value, row.p_holm)
    return None


def _ranked(methods: Sequence[ComparedMethod]) -> list[ComparedMethod]:
    """Return the methods, without start and ceiling, best first."""
    own = [method for method in methods if method.trainings]
    return sorted(own, key=lambda method: -(method.scores[SHOWN[0]].value or 0.0))


def _best_first(names: Sequence[str], methods: Sequence[ComparedMethod]) -> list[str]:
    return [method.name for method in _ranked(methods) if method.name in names]


def result_markdown(result: ComparisonFile) -> str:
    """Return the comparison as Markdown: scores and differences, every seed, settings tried, and what is equal."""
    methods = result.methods
    order = _ranked(methods) + [method for method in methods if not method.trainings]
    titles = {method.name: method.title for method in methods}
    best, main = titles[result.best], titles.get(MAIN)
    heads = [
        "method",
        *(METRICS[metric].title for metric in SHOWN),
        *([] if main is None else [f"{main} minus it"]),
        f"{_first_words(result)} ({best}) minus it",
    ]
    lines = [
        _introduction(result),
        "",
        *table(
            heads,
            (
                [
                    method.title,
                    *(_cell(method.scores[key]) for key in SHOWN),
                    *([] if main is None else [_cell_tested(method.bfpo_minus_this)]),
                    _cell_tested(method.best_minus_this),
                ]
                for method in order
            ),
        ),
        "",
        *_distinguishable(result, titles),
        "",
        f"Pareto-optimal in {' and '.join(METRICS[key].title for key in result.objectives)}: "
        f"{', '.join(result.pareto_front)} (as measured, not tested).",
        "",
        "## Every seed, and ranking",
        "",
        *_by_seed(order),
        "",
        *_spread(order),
        "## Settings tried and chosen",
        "",
        "Helpful and safe on validation prompts at the first seed, per cent; the chosen setting is bold.",
        "",
        *table(
            ["method", "trainings", "setting: score"],
            ([m.title, m.trainings, _trials(m)] for m in methods if m.trials),
        ),
        "",
        *_equal_for_all(result.config),
    ]
    return "\n".join(lines) + "\n"


def _introduction(result: ComparisonFile) -> str:
    scores = result.methods[0].scores
    kinds = {"harmful": "harmless_harmful", "benign": "over_refusal_benign", "borderline": "over_refusal_borderline"}
    counts = {kind: scores[metric].extra["num_prompts"] for kind, metric in kinds.items()}
    num, seeds = scores[SHOWN[0]].extra["num_prompts"], result.config["seeds"]
    by_kind = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return (
        f"Per cent on {num} test prompts ({by_kind}), number of seeds {seeds}, {scores[SHOWN[0]].num} answers per "
        f"method, {level_text(result.confidence)} intervals over prompts and seeds. Sorted by helpful and "
        "safe; the last columns are paired differences in it, in points, with the p-value after Holm's correction."
    )


def _first_words(result: ComparisonFile) -> str:
    """Return what to call the method with the highest score: the best only if it is told apart from all others."""
    return "highest" if result.comparisons.not_told_from_best else "best"


def _distinguishable(result: ComparisonFile, titles: Mapping[str, str]) -> list[str]:
    found, level = result.comparisons, 1 - result.confidence
    lines = [
        f"Two methods are distinguishable if the sign-flip test, paired by prompt, gives p <= {level:.2g} after "
        f"Holm's correction over all {found.num} comparisons ({found.family}), and the interval, which includes the "
        "variation between seeds, excludes 0. The test generalizes to other prompts, but not to other trainings."
    ]
    shown = {result.best: found.not_told_from_best, MAIN: found.not_told_from_bfpo}
    for name, others in shown.items():
        if name in titles:
            alike = ", ".join(titles[other] for other in others or ()) or "none"
            lines += ["", f"**Not distinguishable from {titles[name]}:** {alike}."]
    return lines


def _by_seed(order: Sequence[ComparedMethod]) -> list[str]:
    metric = SHOWN[0]
    return [
        "Helpful and safe by seed, per cent; and the share of held-out pairs that the implicit reward ranks by the "
        "sign of BFPO's target (for every method), which is the objective of BFPO but not of the others.",
        "",
        *table(
            ["method", "by seed", "largest minus smallest", "pairs ranked"],
            (_seed_cells(method, metric) for method in order),
        ),
    ]


def _spread(order: Sequence[ComparedMethod]) -> list[str]:
    """Return the spread over seeds of every metric and, where prompts have categories, the worst one."""
    lines: list[str] = []
    if any(len(method.seed_values.get(SHOWN[0], ())) > 1 for method in order):
        spreads = {m.title: [spread_over(m.seed_values.get(metric, ())) for metric in SHOWN] for m in order}
        lines += [
            "## Spread over seeds",
            "",
            "Largest minus smallest value of the seeds, in points.",
            "",
            *table(
                ["method", *(METRICS[metric].title for metric in SHOWN)],
                (
                    [title, *("" if one is None else f"{100 * one:.1f}" for one in values)]
                    for title, values in spreads.items()
                ),
            ),
            "",
        ]
    named = (
        ([method.title, METRICS[key].title], method.scores[key])
        for key in SHOWN
        for method in order
        if key in method.scores
    )
    worst = category_table(named, ["method", "metric"])
    return [*lines, *(["## Worst category", *worst, ""] if worst else [])]


def _seed_cells(method: ComparedMethod, metric: str) -> list[str]:
    values = [value for value in method.seed_values[metric] if value is not None]
    return [
        method.title,
        ", ".join(f"{100 * value:.1f}" for value in values),
        f"{100 * (max(values) - min(values)):.1f}" if values else "",
        next((_cell(score) for score in method.accuracy if score.metric == "accuracy"), ""),
    ]


def _equal_for_all(config: Mapping[str, Any]) -> list[str]:
    return [
        "## Equal for all methods",
        "",
        *(f"- {section}: {_facts(config[section])}" for section in ("world", "model", "sft", "align")),
        f"- sampling temperature: {config['temperature']:g}; first seed: {config['seed']}",
    ]


def _trials(method: ComparedMethod) -> str:
    parts = []
    for trial in method.trials:
        text = f"{_facts(trial.setting)}: {100 * trial.validation:.1f}"
        parts.append(f"**{text}**" if trial.setting == method.setting else text)
    return "; ".join(parts)


def _facts(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value_text(value)}" for key, value in values.items())


def _cell(score: Score | MethodDifference | None) -> str:
    if score is None or score.value is None:
        return ""
    value = f"{100 * score.value:.1f}"
    if score.low is None or score.high is None:
        return value
    return f"{value} ({100 * score.low:.1f} to {100 * score.high:.1f})"


def _cell_tested(difference: MethodDifference | None) -> str:
    if difference is None or difference.p_holm is None:
        return _cell(difference)
    return f"{_cell(difference)}, p {p_text(difference.p_holm)}"
