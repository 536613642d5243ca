"""The table of suites as in the paper: discriminative, generative and helpfulness suites with their means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bfpo.core.schema import Score
from bfpo.report.data import Basis, MethodResult, ReportData, Suite, SuiteComparison
from bfpo.scores.scores import COHERENCE
from bfpo.stats import Interval, mean_interval

__all__ = [
    "GROUPS",
    "MEAN_OF_SUITES",
    "NOT_REFUSED",
    "SuiteColumn",
    "averaged",
    "basis_of",
    "coherence_of",
    "groups_alike",
    "judged_alike",
    "leaders",
    "less_coherent",
    "only_win_rates",
    "ranked_together",
    "refused_harmful",
    "suite_columns",
    "suite_mean",
    "told_apart",
    "turned",
    "who_judged",
    "with_suite_means",
]

MEAN_OF_SUITES = "mean of the suites"
NOT_REFUSED = "harmless prompts not refused"

GROUPS = {
    "discriminative": "Discriminative: accuracy",
    "generative": "Generative: harmless share",
    "coherent": "Coherence: share of coherent answers",
    "harmless_coherent": "Harmless share among coherent answers",
    "refused_coherent": "Refused harmful prompts among coherent answers",
    "finished": "Answers that ended before the token limit",
    "helpfulness": "Helpfulness",
    "over-refusal": "Over-refusal (lower is better)",
    "refusal": "Refusal",
    "other": "Other measures of the answers",
    "inspect": "Tasks of inspect-ai, each by its own metric",
}
_NOT_REFUSED = "over-refusal"  # used as helpfulness (prompts not refused) if no suite measures that

_HELPFUL = ("winrate", "helpful", "ifeval", "score")
# Reported with every harmless rate, and the main metric only of a suite that has no other.
_ASIDE = ("well_formed", "finished", "refused", "partly_refused", "refusal_rate", "unscored", *COHERENCE)
_COHERENCE = (*COHERENCE, "refused_coherent", "finished")  # columns where the text was read


@dataclass(frozen=True, slots=True)
class SuiteColumn:
    """One column: the suite and its main metric."""

    suite: Suite
    metric: str
    group: str
    higher_is_better: bool = True


def suite_columns(data: ReportData) -> list[SuiteColumn]:
    """Return a column for each scored suite except accuracy on pairs, and those of its coherence, in the groups' order.

    The main metric of a suite is the first that it lists, except well-formedness and the like if it has any other.
    """
    columns = []
    for suite in data.suites:
        found = [score for method in data.methods for score in method.suite_scores.get(suite.name, [])]
        aside = () if suite.kind == "inspect" else _ASIDE
        chosen = next((score for score in found if not score.metric.startswith(aside)), next(iter(found), None))
        if suite.status == "scored" and suite.kind != "accuracy" and chosen is not None:
            columns.append(SuiteColumn(suite, chosen.metric, _group(suite, chosen), chosen.higher_is_better))
            read = {score.metric for score in found if score.value is not None and score.metric != chosen.metric}
            if "coherent" in read and suite.kind != "inspect":
                columns += [SuiteColumn(suite, name, name) for name in _COHERENCE if name in read]
    return sorted(columns, key=lambda column: list(GROUPS).index(column.group))


def _group(suite: Suite, score: Score) -> str:
    if suite.kind == "inspect":
        return "inspect"
    if "refusal" in score.metric:
        return "over-refusal"
    if suite.kind == "discriminative":
        return "discriminative"
    if score.metric.startswith(_ASIDE):
        return "refusal" if score.metric.startswith("refus") else "other"
    return "helpfulness" if any(word in score.metric for word in _HELPFUL) else "generative"


def averaged(columns: Sequence[SuiteColumn], group: str) -> list[SuiteColumn]:
    """Return the columns that are in the mean of a group.

    Tasks of inspect-ai have no mean, since their metrics differ; that of lm-eval is over metrics that are better when
    higher, without CrowS-Pairs, whose ideal is 0.5.
    """
    found = [column for column in columns if column.group == group and group != "inspect"]
    return [column for column in found if column.higher_is_better or group != "discriminative"]


def suite_mean(method: MethodResult, columns: Sequence[SuiteColumn], group: str) -> Interval:
    """Return the mean of the `averaged` suites of a group with its interval, by `mean_interval`; `num` counts them.

    `value` is `None` if one of them was not measured or is not a share in [0, 1]. Suites with the same prompts, such as
    those with two judges, count as dependent.
    """
    wanted = averaged(columns, group)
    found = [next((s for s in method.suite_scores.get(c.suite.name, []) if s.metric == c.metric), None) for c in wanted]
    known = [score for score in found if score is not None and score.value is not None and 0 <= score.value <= 1]
    if not known or len(known) < len(wanted):
        return Interval(None, None, None, len(wanted))
    names = [column.suite.name for column in wanted]
    asked = [method.basis[name].prompts if name in method.basis else f"suite {name}" for name in names]
    return mean_interval([Interval(s.value, s.low, s.high, s.num) for s in known], asked)


def axis_groups(columns: Sequence[SuiteColumn]) -> dict[str, str]:
    """Return axis of the headline figure -> group of suites whose mean is shown if no suite measures both axes.

    Without a suite of helpfulness it is the share of harmless prompts that are not refused, if a suite measures it.
    """
    groups = {column.group for column in columns}
    across = _NOT_REFUSED if "helpfulness" not in groups and _NOT_REFUSED in groups else "helpfulness"
    return {"helpfulness": across, "harmless_harmful": "generative"}


def with_suite_means(data: ReportData) -> ReportData:
    """Return the data with the means of the suites as the axes of the headline figure, if it has no other values.

    A model whose row is from one suite gets no means of other suites.
    """
    columns = suite_columns(data)
    axes = axis_groups(columns)
    if (
        not columns
        or any(method.home is not None for method in data.methods)
        or any(method.score(metric) for method in data.methods for metric in axes)
    ):
        return data
    methods = []
    for method in data.methods:
        means = {metric: _on_axis(suite_mean(method, columns, group), group) for metric, group in axes.items()}
        found = [
            Score(metric, mean.value, mean.low, mean.high, mean.num)
            for metric, mean in means.items()
            if mean.value is not None
        ]
        methods.append(replace(method, scores=[*method.scores, *found]))
    across = NOT_REFUSED if axes["helpfulness"] == _NOT_REFUSED else "helpfulness"
    return replace(
        data, methods=methods, x_title=f"{across}, {MEAN_OF_SUITES}", y_title=f"harmless share, {MEAN_OF_SUITES}"
    )


def _on_axis(mean: Interval, group: str) -> Interval:
    """Return the mean so that higher is better."""
    if group != _NOT_REFUSED or mean.value is None:
        return mean
    low, high = (None if bound is None else 1 - bound for bound in (mean.high, mean.low))
    return Interval(1 - mean.value, low, high, mean.num)


def basis_of(data: ReportData, method: MethodResult, metric: str) -> list[Basis]:
    """Return the judges and prompts behind a score of the table or headline figure; empty if unknown."""
    if method.home is not None:
        return [method.basis[method.home]] if method.home in method.basis else []
    columns = suite_columns(data)
    group = axis_groups(columns).get(metric)
    names = [column.suite.name for column in columns if column.group == group]
    return [method.basis[name] for name in names if name in method.basis]


def judged_alike(data: ReportData, first: MethodResult, second: MethodResult, metric: str) -> bool:
    """Return whether both scores are by the same judges on the same prompts, or both unknown."""
    return _key(data, first, metric) == _key(data, second, metric)


def groups_alike(data: ReportData, metric: str) -> list[list[MethodResult]]:
    """Return the methods with the metric, except the ceiling, in groups that may be ranked."""
    groups: dict[tuple[object, ...], list[MethodResult]] = {}
    for method in data.methods:
        if method.role != "ceiling" and method.value(metric) is not None:
            groups.setdefault(_key(data, method, metric), []).append(method)
    return list(groups.values())


def ranked_together(data: ReportData, metrics: Iterable[str]) -> bool:
    """Return whether all methods of the page may be ranked by each of the metrics."""
    return all(len(groups_alike(data, metric)) < 2 for metric in metrics)


def told_apart(data: ReportData, first: MethodResult, second: MethodResult, metric: str) -> bool:
    """Return whether two models differ in a metric, by their paired difference if it is known, else by their intervals.

    A score without an interval differs from none.
    """
    names = {first.name, second.name}
    if data.main is not None and data.main.name in names:
        (other,) = names - {data.main.name}
        paired = data.comparison(other, metric)
        if paired is not None and paired.low is not None and paired.high is not None:
            return not paired.low <= 0 <= paired.high
    one, other_score = first.score(metric), second.score(metric)
    if one is None or other_score is None:
        return False
    bounds = (one.low, one.high, other_score.low, other_score.high)
    if any(bound is None for bound in bounds):
        return False
    return one.low > other_score.high or other_score.low > one.high  # type: ignore[operator]


def leaders(
    data: ReportData, methods: Sequence[MethodResult], metric: str, *, higher_is_better: bool = True
) -> list[MethodResult]:
    """Return the models that share the first rank: the one with the best value, and those not told apart from it."""
    sign = 1 if higher_is_better else -1
    known = [(sign * value, method) for method in methods if (value := method.value(metric)) is not None]
    if not known:
        return []
    ranked = [method for _, method in sorted(known, key=lambda item: -item[0])]
    return [ranked[0], *(method for method in ranked[1:] if not told_apart(data, ranked[0], method, metric))]


def coherence_of(data: ReportData, method: MethodResult) -> Interval | None:
    """Return the share of a model's answers that are coherent, or its mean over suites; `None` if it was not read."""
    score = method.score("coherent")
    if score is not None:
        return Interval(score.value, score.low, score.high, score.num)
    mean = suite_mean(method, suite_columns(data), "coherent")
    return None if mean.value is None else mean


def refused_harmful(data: ReportData) -> list[tuple[MethodResult, Interval]]:
    """Return the share of harmful prompts that each model refuses, the start model first, as the mean of the suites.

    Empty where no suite reads it, and if the models were asked different prompts or read by different judges.
    """
    columns = [
        SuiteColumn(suite, "refused_harmful", "refusal")
        for suite in data.suites
        if any(s.metric == "refused_harmful" for m in data.methods for s in m.suite_scores.get(suite.name, ()))
    ]
    means = [(method, suite_mean(method, columns, "refusal")) for method in data.methods]
    found = [(method, mean) for method, mean in means if mean.value is not None]
    read = [[method.basis.get(column.suite.name) for column in columns] for method, _ in found]
    asked = [[one and (tuple(one.judges), one.prompts) for one in bases] for bases in read]
    alike = all(one == asked[0] for one in asked)
    return sorted(found, key=lambda item: item[0].role != "start") if alike else []


def less_coherent(data: ReportData, method: MethodResult, others: Sequence[MethodResult]) -> MethodResult | None:
    """Return the most coherent of the others if the method's interval lies below that one's, else `None`."""
    own = coherence_of(data, method)
    known = [(found, other) for other in others if (found := coherence_of(data, other)) is not None]
    if own is None or own.high is None or not known:
        return None
    most, other = max(known, key=lambda item: item[0].value or 0.0)
    return other if most.low is not None and most.low > own.high else None


def only_win_rates(data: ReportData, metric: str) -> bool:
    """Return whether an axis of the headline figure is a mean of win rates against a baseline, and nothing else."""
    columns = suite_columns(data)
    group = axis_groups(columns).get(metric)
    wanted = [column for column in columns if column.group == group]
    own = any(method.home is not None for method in data.methods)
    return bool(wanted) and not own and all("winrate" in column.metric for column in wanted)


def who_judged(basis: Sequence[Basis]) -> str:
    """Return the judges and the number of prompts in words, such as `oracle on 540 prompts`."""
    judges = ", ".join(dict.fromkeys(judge or "a judge without a name" for one in basis for judge in one.judges))
    if not basis:
        return "unknown judges"
    return f"{judges} on {sum(one.num for one in basis):,} prompts"


def _key(data: ReportData, method: MethodResult, metric: str) -> tuple[object, ...]:
    return tuple(sorted((tuple(one.judges), one.prompts) for one in basis_of(data, method, metric)))


def turned(row: SuiteComparison, first: str) -> SuiteComparison:
    """Return a comparison of `first` with another model with `first` first."""
    if row.first == first or row.difference is None:
        return row
    low, high = (None if bound is None else -bound for bound in (row.high, row.low))
    return replace(row, first=first, second=row.first, difference=-row.difference, low=low, high=high)
