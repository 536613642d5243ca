"""The sentences at the top of a report: only what the numbers carry, and what a reader must hold against them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bfpo.evaluation.report_data import MethodResult, ReportData
from bfpo.schema import Score

__all__ = ["Headline", "headline", "percent", "points", "with_interval"]

METRIC = "helpful_and_safe"
_AXES = ("helpfulness", "harmless_harmful")


@dataclass(frozen=True, slots=True)
class Headline:
    """One claim, whether it is a win, and what follows or limits it."""

    sentence: str
    wins: bool
    details: list[str]


def percent(value: float, decimals: int = 0) -> str:
    """Return a share in [0, 1] as per cent; 0 and 100 only where nothing is rounded away."""
    step = 10.0**-decimals
    rounded = round(100 * value, decimals)
    if rounded == 0 and value > 0:
        return f"<{step:.{decimals}f}%"
    if rounded == 100 and value < 1:
        return f">{100 - step:.{decimals}f}%"
    return f"{rounded:.{decimals}f}%"


def points(value: float) -> str:
    """Return a difference of shares in percentage points, with its sign (a true minus)."""
    rounded = round(100 * value, 1)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else ''}{abs(rounded):.1f}"


def with_interval(score: Score, decimals: int = 0) -> str:
    """Return the value with its interval in words, such as `64% (59% to 69%)`."""
    assert score.value is not None
    if score.low is None or score.high is None:
        return f"{percent(score.value, decimals)} (no interval)"
    low, high = percent(score.low, decimals), percent(score.high, decimals)
    return f"{percent(score.value, decimals)} ({low} to {high})"


def headline(data: ReportData) -> Headline:
    """Return the claim that the numbers support.

    The main method wins only where every baseline was measured and the interval of every paired difference in the
    share of helpful and safe answers lies above zero.
    """
    main = data.main
    if main is None:
        return Headline(_overview(data), False, [*_open_gates(data), *data.notes])
    score = main.score(METRIC)
    if score is None and any(main.value(metric) is not None for metric in _AXES):
        return Headline(_overview(data), False, [*_open_gates(data), *data.notes])
    if score is None:
        text = f"{main.title} was not measured, so nothing can be said about it."
        return Headline(text, False, [*_limits(data), *data.notes])
    sentence, wins = _claim(data, main, score)
    return Headline(sentence, wins, [*_facts(data, main), *_limits(data), *data.notes])


def _overview(data: ReportData) -> str:
    """Say who has the highest value of each axis, where no claim about one method can be made."""
    parts = []
    for metric, title in zip(_AXES, (data.x_title, data.y_title), strict=True):
        compared = [method for method in data.methods if method.role != "ceiling"]
        known = [(value, method.title) for method in compared if (value := method.value(metric)) is not None]
        if known:
            value = max(known)[0]
            best = [name for other, name in known if other == value]
            parts.append(f"{title[:1].upper()}{title[1:]}: {_listed(best)}, {percent(value, 1)}")
    if not parts:
        return "No answers were scored in these runs, so nothing can be said about helpfulness or harm."
    if len(data.methods) == 1:
        return f"One model was measured. {'. '.join(parts)}."
    return f"Highest of {len(data.methods)} models, whether or not the intervals tell them apart. {'. '.join(parts)}."


def _claim(data: ReportData, main: MethodResult, score: Score) -> tuple[str, bool]:
    measured = [(method, value) for method in data.baselines if (value := method.value(METRIC)) is not None]
    share = f"{with_interval(score)} of held-out prompts"
    if not measured:
        return f"{main.title} answers {share} helpfully and safely; no baseline was measured.", False
    best, value = max(measured, key=lambda item: item[1])
    assert score.value is not None
    if value >= score.value:
        lead = _lead(data, best)
        doubt = ", a difference within the margin of error" if lead is not None and lead[1] > 0 else ""
        return (
            f"{main.title} is not ahead here: it answers {share} helpfully and safely, {best.title} "
            f"{percent(value)}{doubt}.",
            False,
        )
    leads = [_lead(data, method) for method, _ in measured]
    if len(measured) == len(data.baselines) and all(lead is not None and lead[0] > 0 for lead in leads):
        every = "every baseline" if len(measured) > 1 else f"its baseline {best.title}"
        rival = f" for the best of them, {best.title}" if len(measured) > 1 else ""
        return (
            f"{main.title} is helpful and safe more often than {every}: on {share}, against {percent(value)}{rival}.",
            True,
        )
    close = [method.title for (method, _), lead in zip(measured, leads, strict=True) if lead is None or lead[0] <= 0]
    doubt = (
        f"its lead over {_listed(close)} is within the margin of error" if close else "not every baseline was measured"
    )
    return (
        f"{main.title} answers {share} helpfully and safely, the highest share measured, but {doubt}.",
        False,
    )


def _lead(data: ReportData, baseline: MethodResult) -> tuple[float, float] | None:
    found = data.comparison(baseline.name, METRIC)
    if found is None or found.low is None or found.high is None:
        return None
    return found.low, found.high


def _facts(data: ReportData, main: MethodResult) -> Iterator[str]:
    start = next((method for method in data.methods if method.role == "start"), None)
    start_value = start.value(METRIC) if start is not None else None
    if start is not None and start_value is not None:
        yield f"Every method starts from the same model, which is helpful and safe on {percent(start_value)}."
    harmless = main.score("harmless_harmful")
    if harmless is not None:
        yield f"On harmful prompts {main.title} does no harm in {with_interval(harmless)} of its answers."
    formed = main.score("well_formed")
    if formed is None or formed.value is None:
        yield f"Whether the text of {main.title} is well-formed was not measured."
    elif formed.value < data.well_formed_threshold:
        yield (
            f"Only {with_interval(formed, 1)} of the text of {main.title} is well-formed, below the "
            f"{percent(data.well_formed_threshold)} that this comparison asks for: broken text counts as harmless."
        )
    else:
        yield f"{with_interval(formed, 1)} of its text is well-formed."


def _open_gates(data: ReportData) -> Iterator[str]:
    for gate in data.gates:
        if gate.passed is False:
            yield f"A gate failed (“{gate.title}”), so these figures say as much about the model as about the methods."
        elif gate.passed is None:
            yield f"A gate was not measured (“{gate.title}”)."


def _limits(data: ReportData) -> Iterator[str]:
    yield from _open_gates(data)
    missing = [method.title for method in data.baselines if method.value(METRIC) is None]
    if missing:
        yield f"Not measured: {_listed(missing)}."
    if len(data.seeds) == 1:
        yield "One seed: the intervals speak about other prompts, not about another training."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
