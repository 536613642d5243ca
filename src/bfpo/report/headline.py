"""The sentences at the top of a report: the claims that the numbers support, and their limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bfpo.core.schema import Score
from bfpo.report.costs import costs_of
from bfpo.report.data import MethodResult, ReportData, SuiteComparison
from bfpo.report.experiments import experiment_headline, experiment_lines
from bfpo.report.tables import (
    MEAN_OF_SUITES,
    basis_of,
    coherence_of,
    groups_alike,
    judged_alike,
    leaders,
    less_coherent,
    only_win_rates,
    ranked_together,
    refused_harmful,
    suite_columns,
    turned,
    who_judged,
)
from bfpo.report.wording import listed, percent, points, points_interval, with_interval
from bfpo.scores.scores import metric_title
from bfpo.stats import Interval
from bfpo.stats.pareto import pareto_front
from bfpo.suites.scores import SUITE_METRICS

__all__ = ["Headline", "front_of", "headline", "suite_lines"]

METRIC = "helpful_and_safe"
AXES = ("helpfulness", "harmless_harmful")
_SHOWN = 4  # suites that a sentence names
_LONGEST = 200  # characters of a claim; a longer one leaves the numbers to what follows (not of two models by axes)


@dataclass(frozen=True, slots=True)
class Headline:
    """One claim, whether it is a win, and further sentences and limits."""

    sentence: str
    wins: bool
    details: list[str]


def headline(data: ReportData) -> Headline:
    """Return the claim that the numbers support.

    The main method wins only if every baseline was measured and the interval of every paired difference in the share
    of helpful and safe answers is above zero. Only models judged by the same judge on the same prompts are compared;
    the others are named and not ranked.
    """
    main = data.main
    if data.stages and not data.scored and not data.experiments:
        first, *rest = data.stages
        return Headline(first.sentence, False, [*first.lines, *(one.sentence for one in rest), *data.notes])
    if not data.methods and data.experiments:
        return Headline(experiment_headline(data.experiments[0]), False, [*_experiments(data), *data.notes])
    coherence = list(_coherence(data))
    if main is None:
        sentence, numbers = _overview(data)
        return Headline(sentence, False, [*numbers, *coherence, *_groups(data), *_open_gates(data), *data.notes])
    details = [*coherence, *suite_lines(data), *data.notes]
    score = main.score(METRIC)
    if score is None and any(main.value(metric) is not None for metric in AXES):
        sentence, numbers = _overview(data)
        return Headline(sentence, False, [*numbers, *_groups(data), *_open_gates(data), *details])
    if score is None:
        return Headline(_only_pairs(main), False, [*_limits(data), *details])
    sentence, wins = _claim(data, main, score)
    refused = [f"{one}." for one in _refused(data)]
    return Headline(sentence, wins, [*_facts(data, main), *refused, *_limits(data), *details])


def _only_pairs(main: MethodResult) -> str:
    """Return the sentence about a model without judged answers."""
    accuracy = main.score("accuracy")
    if accuracy is None:
        return f"{main.title} was not measured."
    share = f"{with_interval(accuracy)} of the evaluated pairs"
    return f"{main.title} orders {share} by their labels; none of its answers was judged."


def _measured(method: MethodResult) -> str:
    """Return a model's share of helpful and safe answers, else its accuracy on pairs."""
    share, accuracy = method.score(METRIC), method.score("accuracy")
    if share is not None:
        return f"{method.title} answers {with_interval(share)} of prompts helpfully and safely"
    if accuracy is not None:
        return f"{method.title} orders {with_interval(accuracy)} of the evaluated pairs by their labels"
    return f"{method.title} was not measured"


def _overview(data: ReportData) -> tuple[str, list[str]]:
    """Return the models with the highest value of each axis, if no claim about one method can be made.

    A long claim about three models or more only names them, one about tasks of capability gives their mean change;
    sentences with all numbers come second.
    """
    if not ranked_together(data, AXES):
        return "These models cannot be ranked: they were not all judged by the same judge on the same prompts.", []
    highest = list(_highest(data, data.methods))
    parts = [whole for _, whole in highest]
    parts += _refused(data) if parts else []
    if not parts and any(method.score(METRIC) or method.score("accuracy") for method in data.methods):
        return f"{listed([_measured(method) for method in data.methods])}.", []
    if not parts:
        parts = list(_suites(data))
        if costs := list(_costs(data)):
            return f"{'. '.join(costs)}.", [f"{part}." for part in parts]
    if not parts:
        return "No answers were scored in these runs.", []
    num = len(data.methods)
    head = "One model was measured." if num == 1 else f"{num} models were measured."
    whole = f"{head} {'. '.join(parts)}."
    if len(whole) <= _LONGEST or (num < 3 and highest):
        return whole, []
    return " ".join([head, *(f"{brief}." for brief, _ in highest)]), [f"{part}." for part in parts]


def _coherence(data: ReportData) -> Iterator[str]:
    """Yield the share of coherent answers of each model, and that broken text counts as harmless where they differ."""
    found = [(method, share) for method in data.methods if (share := coherence_of(data, method)) is not None]
    if not found:
        return
    values = [_named(method, share) for method, share in found]
    worse = [method.title for method, _ in found if less_coherent(data, method, [other for other, _ in found])]
    doubt = f"; broken text counts as harmless and as not refused, which favours {listed(worse)}" if worse else ""
    yield f"Coherent answers: {listed(values)}{doubt}."


def _named(method: MethodResult, found: Score | Interval) -> str:
    """Return a model with its value, and the interval if it has one."""
    score = Score("", found.value, found.low, found.high, found.num)
    assert score.value is not None
    known = score.low is not None and score.high is not None
    return f"{method.title} {with_interval(score, 1) if known else percent(score.value, 1)}"


def _refused(data: ReportData) -> Iterator[str]:
    """Yield the share of harmful prompts that each model refuses, the start model first, if a suite reads it."""
    if found := refused_harmful(data):
        values = [_named(method, mean) for method, mean in found]
        yield f"Harmful prompts refused{f', {MEAN_OF_SUITES}' if found[0][1].num > 1 else ''}: {listed(values)}"


def _suites(data: ReportData) -> Iterator[str]:
    """Yield the values of each suite, for suites that measure neither axis."""
    for column in suite_columns(data):
        if column.metric == column.group:  # coherence, which has a sentence of its own
            continue
        values = [
            f"{method.title} {with_interval(score)}"
            for method in data.methods
            for score in method.suite_scores.get(column.suite.name, [])
            if score.metric == column.metric and score.value is not None
        ]
        if values:
            title = column.suite.title or column.suite.name
            yield f"{title}, {metric_title(column.metric, SUITE_METRICS)}: {listed(values)}"


def _costs(data: ReportData) -> Iterator[str]:
    """Yield each model's mean change on tasks of capability, against the start model."""
    for cost in costs_of(data):
        if (mean := cost.mean) is not None and mean.value is not None:
            change = f"{points(mean.value)} points ({points_interval(mean.low, mean.high)})"
            yield f"Capability, {cost.method.title} minus {cost.start.title}, mean of {mean.num} tasks: {change}"


def _highest(data: ReportData, methods: Sequence[MethodResult]) -> Iterator[tuple[str, str]]:
    """Yield what is said of each axis: of the models alone, and with their values."""
    for metric, title in zip(AXES, (data.x_title, data.y_title), strict=True):
        compared = [method for method in methods if method.role != "ceiling"]
        known = {method.name: value for method in compared if (value := method.value(metric)) is not None}
        if not known:
            continue
        broken = [method for method in compared if less_coherent(data, method, compared) is not None]
        first = leaders(data, [method for method in compared if method not in broken], metric)
        named = f"{title[:1].upper()}{title[1:]}"
        unfit = not first or any(known.get(one.name, -1.0) > known[first[0].name] for one in broken)
        shown = [method for method in compared if method.name in known] if unfit else first
        titles = listed([method.title for method in shown])
        values = listed([_named(m, score) for m in shown if (score := m.score(metric)) is not None])
        if unfit:
            yield f"{named}: not ranked", f"{named}: {values}, not ranked, since they differ in coherence"
        elif only_win_rates(data, metric) and max(known.values()) < 0.5:
            none = f"{named}: no model wins against the baseline more often than not"
            yield none, f"{none} ({values})"
        elif len(known) == 1:
            yield (f"{named}: {values}",) * 2
        elif len(first) == 1:
            yield f"{named}: {titles} highest", f"{named}: highest {values}"
        else:
            yield f"{named}: {titles} not told apart", f"{named}: not told apart by their intervals: {values}"


def _experiments(data: ReportData) -> Iterator[str]:
    for place, experiment in enumerate(data.experiments):
        if place:
            yield experiment_headline(experiment)
        yield from experiment_lines(experiment, data.well_formed_threshold)


def _groups(data: ReportData) -> Iterator[str]:
    """Yield the groups of models that can be ranked, and the highest in each, if not all can."""
    if ranked_together(data, AXES):
        return
    metric = next(metric for metric in AXES if len(groups_alike(data, metric)) > 1)
    for group in groups_alike(data, metric):
        names, judged = listed([method.title for method in group]), who_judged(basis_of(data, group[0], metric))
        if len(group) == 1:
            yield f"{names}: {judged}."
        else:
            yield f"{names} can be ranked ({judged}). {'. '.join(whole for _, whole in _highest(data, group))}."


def _claim(data: ReportData, main: MethodResult, score: Score) -> tuple[str, bool]:
    measured = [(method, value) for method in data.baselines if (value := method.value(METRIC)) is not None]
    unlike = [method for method in _not_alike(data, main) if method.role == "baseline"]
    alike = [(method, value) for method, value in measured if method not in unlike]
    share = f"{with_interval(score)} of {'held-out ' if data.gates else ''}prompts"
    if not alike:
        lack = "was judged by the same judge on the same prompts" if unlike else "was measured"
        return (
            f"{main.title} answers {share} helpfully and safely{f'; no baseline {lack}' if data.baselines else ''}.",
            False,
        )
    best, value = max(alike, key=lambda item: item[1])
    assert score.value is not None
    if value >= score.value:
        lead = _lead(data, best)
        doubt = ", a difference within the margin of error" if lead is not None and lead[1] > 0 else ""
        return (
            f"{main.title} is not ahead here: it answers {share} helpfully and safely, {best.title} "
            f"{percent(value)}{doubt}.",
            False,
        )
    whole = less_coherent(data, main, [method for method, _ in alike])
    if whole is not None:
        return (
            f"{main.title} answers {share} helpfully and safely, {best.title} {percent(value)}, but fewer of its "
            f"answers are coherent than those of {whole.title}, so that no lead is claimed.",
            False,
        )
    leads = [_lead(data, method) for method, _ in alike]
    complete = len(measured) == len(data.baselines)
    if complete and all(lead is not None and lead[0] > 0 for lead in leads):
        every = "every baseline" if len(alike) > 1 else f"its baseline {best.title}"
        limit = " judged alike" if unlike and len(alike) > 1 else ""
        rival = f" for the highest of them, {best.title}" if len(alike) > 1 else ""
        return (
            f"{main.title} is helpful and safe more often than {every}{limit}: on {share}, against "
            f"{percent(value)}{rival}.",
            True,
        )
    close = [method.title for (method, _), lead in zip(alike, leads, strict=True) if lead is None or lead[0] <= 0]
    doubt = (
        f"its lead over {listed(close)} is within the margin of error, so that they share the rank"
        if close
        else "not every baseline was measured"
    )
    among = "of those judged alike" if unlike else "measured"
    return (
        f"{main.title} answers {share} helpfully and safely, ahead {among}, but {doubt}.",
        False,
    )


def _not_alike(data: ReportData, main: MethodResult) -> list[MethodResult]:
    """Return the measured methods that were judged by another judge or on other prompts than the main one."""
    others = [method for method in data.methods if method is not main and method.value(METRIC) is not None]
    return [method for method in others if not judged_alike(data, main, method, METRIC)]


def _lead(data: ReportData, baseline: MethodResult) -> tuple[float, float] | None:
    found = data.comparison(baseline.name, METRIC)
    if found is None or found.low is None or found.high is None:
        return None
    return found.low, found.high


def _facts(data: ReportData, main: MethodResult) -> Iterator[str]:
    start = next((method for method in data.methods if method.role == "start"), None)
    start_value = start.value(METRIC) if start is not None else None
    if start is not None and start_value is not None and judged_alike(data, main, start, METRIC):
        of = (
            "Every method starts from the same model, which" if data.gates else f"{start.title}, where training starts,"
        )
        yield f"{of} is helpful and safe on {percent(start_value)}."
    harmless = main.score("harmless_harmful")
    if harmless is not None:
        yield f"On harmful prompts {main.title} is harmless in {with_interval(harmless)} of its answers."
    formed = main.score("well_formed")
    if formed is None or formed.value is None:
        return
    if formed.value < data.well_formed_threshold:
        yield (
            f"Only {with_interval(formed, 1)} of the text of {main.title} is well-formed, below the required "
            f"{percent(data.well_formed_threshold)}: broken text counts as harmless."
        )
    else:
        yield f"{with_interval(formed, 1)} of its text is well-formed."


def _open_gates(data: ReportData) -> Iterator[str]:
    for gate in data.gates:
        if gate.passed is False:
            yield f"A gate failed (“{gate.title}”), so differences may come from the model instead of the methods."
        elif gate.passed is None:
            yield f"A gate was not measured (“{gate.title}”)."


def _limits(data: ReportData) -> Iterator[str]:
    yield from _open_gates(data)
    unlike = _not_alike(data, data.main) if data.main is not None else []
    if unlike and data.main is not None:
        ours = who_judged(basis_of(data, data.main, METRIC))
        theirs = "; ".join(f"{method.title} ({who_judged(basis_of(data, method, METRIC))})" for method in unlike)
        yield (f"Not compared with {data.main.title} ({ours}), because of another judge or other prompts: {theirs}.")
    missing = [method.title for method in data.baselines if method.value(METRIC) is None]
    if missing:
        yield f"Not measured: {listed(missing)}."
    if data.seeds and not data.several_trainings:
        one = "One seed" if len(data.seeds) == 1 else "One training of each model"
        yield f"{one}: the intervals do not include the variation between trainings."


def suite_lines(data: ReportData) -> Iterator[str]:
    """Yield, for the page's model and each other one, the suites with a significant difference.

    That is Holm's p, over all comparisons of the run, below 1 - confidence.
    """
    main = data.main
    for other in data.methods if main is not None else ():
        assert main is not None
        rows = [
            turned(row, main.name)
            for row in data.suite_comparisons
            if {row.first, row.second} == {main.name, other.name}
        ]
        tested = [row for row in rows if row.p_holm is not None and row.difference is not None]
        if other is main or not tested:
            continue
        level = 1 - data.confidence
        differ = [row for row in tested if row.p_holm is not None and row.p_holm < level]
        if not differ:
            yield (
                f"No significant difference between {main.title} and {other.title} on the suites "
                f"({len(tested)} comparisons, Holm's correction)."
            )
            continue
        differ.sort(key=lambda row: row.p_holm or 0.0)
        named = "; ".join(_difference(data, row) for row in differ[:_SHOWN])
        more = f"; {len(differ) - _SHOWN} more below" if len(differ) > _SHOWN else ""
        yield (
            f"{main.title} minus {other.title}, significant differences ({len(differ)} of {len(tested)} measures of "
            f"suites, Holm's correction), in points: {named}{more}."
        )


def _difference(data: ReportData, row: SuiteComparison) -> str:
    assert row.difference is not None
    title = next((suite.title for suite in data.suites if suite.name == row.suite and suite.title), row.suite)
    bounds = "" if row.low is None or row.high is None else f" ({points(row.low)} to {points(row.high)})"
    return f"{title}, {metric_title(row.metric, SUITE_METRICS)} {points(row.difference)}{bounds}"


def front_of(data: ReportData) -> list[str]:
    """Return the names of the methods on the Pareto front of the headline figure, by helpfulness, lowest first.

    The ceiling, trained on ideal answers, is left out. Estimates are compared without their intervals. Empty unless
    all were judged by the same judge on the same prompts.
    """
    if not ranked_together(data, AXES):
        return []
    points = {method.name: {axis: method.value(axis) for axis in AXES} for method in data.methods}
    known = {
        name: {axis: value for axis, value in values.items() if value is not None}
        for name, values in points.items()
        if data.method(name).role != "ceiling" and None not in values.values()
    }
    return pareto_front(known, AXES) if known else []
