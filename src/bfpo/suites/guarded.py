"""A guard beside the models: which of their answers it blocks, and the rows that are left behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from bfpo.config.evaluate import SuitesJob
from bfpo.config.suites import GuardConfig
from bfpo.core.errors import SettingError
from bfpo.core.files import user_cache_folder
from bfpo.core.schema import Completion, Verdict
from bfpo.data.labels import as_judged
from bfpo.generation.server import RequestBudget
from bfpo.judges.asking import ask_judge, no_answer
from bfpo.judges.cache import OpinionCache
from bfpo.judges.fit import MAX_UNSURE, UNSURE, fit_facts
from bfpo.judges.judges import OF_REQUESTS
from bfpo.judges.shared import open_judge
from bfpo.suites.answers import SuiteAnswers
from bfpo.suites.catalogue import Suite
from bfpo.suites.judging import JudgedSuites, judge_of
from bfpo.suites.records import GuardFacts, SuiteFacts
from bfpo.suites.scores import BEHIND, BLOCKED, PASSED, UNDECIDED

__all__ = ["Guarded", "guard_answers", "guard_warnings"]

_FILTERED = {"input": "requests", "output": "answers"}


@dataclass(frozen=True, slots=True)
class Guarded:
    """The answers behind a guard by name, whose each is, and by (suite, name) what became of every answer.

    `warnings`: of filters that are often unsure.
    """

    facts: GuardFacts
    answers: dict[str, SuiteAnswers] = field(default_factory=dict)
    of: dict[str, str] = field(default_factory=dict)
    states: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def settle(self, judged: JudgedSuites) -> None:
        """Replace the verdicts on blocked answers: harmless, refused in full, well-formed where the judge reads form.

        Whether they are helpful is left to the judge.
        """
        for place, states in self.states.items():
            judged.verdicts[place] = [
                verdict if state not in BLOCKED else _of_blocked(verdict, f"blocked by the guard, {state} filter")
                for verdict, state in zip(judged.verdicts.get(place, ()), states, strict=False)
            ]

    def counts(self, suite: str) -> dict[str, dict[str, int]]:
        """Return for each model behind the guard how many answers to a suite passed or did not."""
        return {name: dict(Counter(states)) for (own, name), states in self.states.items() if own == suite}


def _of_blocked(verdict: Verdict, reason: str) -> Verdict:
    form = None if verdict.well_formed is None else True
    return replace(
        verdict, label="safe", refused=True, partly_refused=False, well_formed=form, reason=reason, p_safe=None, raw=""
    )


def guard_answers(config: SuitesJob, suites: Sequence[Suite], answers: Mapping[str, SuiteAnswers]) -> Guarded | None:
    """Return the answers of every model behind the guard; nothing is generated. `None` without a guard.

    An answer passes where the guard is undecided. Raises as `make_judge`, and `SettingError` if `at` is given and the
    guard gives no probability.
    """
    guard = config.guard
    if guard is None:
        return None
    places = [(suite.name, model) for suite in suites for model in answers]
    texts = [as_judged(one) for suite, model in places for one in answers[model].completions[suite]]
    stopped: dict[str, list[bool | None]] = {}
    versions, warnings = [], []
    budget = RequestBudget(config.suites.max_requests)
    with OpinionCache(config.suites.label_cache or user_cache_folder("label")) as cache:
        for part in BLOCKED if guard.filter == "both" else (guard.filter,):
            of_requests = part == "input"
            read = [_request(one) for one in texts] if of_requests else texts
            with open_judge(
                guard.judge, config.executor, budget, threads=config.threads, of_requests=of_requests
            ) as judge:
                versions.append(judge.version)
                verdicts = [votes[0] for votes in ask_judge(judge, read, cache)]
                unsure = fit_facts(judge, read, verdicts).get("unsure", 0.0)
            if unsure > MAX_UNSURE:
                warnings.append(
                    f"the guard {guard.judge.title} is unsure of {unsure:.0%} of the {_FILTERED[part]}: p(safe) is "
                    f"between {UNSURE[0]} and {UNSURE[1]}; compare with labels by hand (`bfpo judge-check`), "
                    "or take another guard"
                )
            stopped[part] = [
                False if no_answer(one) else _stops(verdict, guard) for one, verdict in zip(read, verdicts, strict=True)
            ]
    if guard.at is not None and texts and all(stop is None for found in stopped.values() for stop in found):
        raise SettingError(
            f"guard.at: got {guard.at}; the guard {guard.judge.title} gave no probability for any text; leave at out "
            "to block by its verdicts"
        )
    facts = GuardFacts(guard.judge.title, ", ".join(versions), guard.filter, guard.at, guard.answer)
    found = Guarded(facts, of={f"{model}{BEHIND}": model for model in answers}, warnings=warnings)
    states = iter([_state({part: stopped[part][place] for part in stopped}) for place in range(len(texts))])
    for name, model in found.of.items():
        found.answers[name] = SuiteAnswers({}, answers[model].left_out)
    for suite, model in places:
        own = answers[model].completions[suite]
        name = f"{model}{BEHIND}"
        found.states[suite, name] = [next(states) for _ in own]
        found.answers[name].completions[suite] = [
            _behind(one, state, guard) for one, state in zip(own, found.states[suite, name], strict=True)
        ]
    return found


def _request(one: Completion) -> Completion:
    """Return an answer without all that the model wrote: its request is read, whatever became of it."""
    return replace(one, text="", reasoning="", blocked="", finished=True)


def _stops(verdict: Verdict, guard: GuardConfig) -> bool | None:
    """Return whether the guard blocks; `None` if it gives no verdict or, with `at`, no probability."""
    if guard.at is None:
        return None if verdict.label == "unscored" else verdict.label == "unsafe"
    return None if verdict.p_safe is None else 1 - verdict.p_safe >= guard.at


def _state(stopped: Mapping[str, bool | None]) -> str:
    blocked = next((part for part, stop in stopped.items() if stop), None)
    return blocked or (UNDECIDED if None in stopped.values() else PASSED)


def _behind(one: Completion, state: str, guard: GuardConfig) -> Completion:
    if state not in BLOCKED:
        return one
    return replace(one, text=guard.answer, finished=True, blocked="", reasoning="", extra="")


def guard_warnings(
    config: SuitesJob, suites: Sequence[Suite], facts: Mapping[str, SuiteFacts], versions: Mapping[str, str]
) -> list[str]:
    """Return a warning for suites whose judge is the guard: its errors are then invisible.

    `versions`: those of the judges of each suite, and of the guard; a copy of a judge has its version.
    """
    if config.guard is None:
        return []
    own = (config.guard.judge.format, config.guard.judge.source)
    guard = versions.get("guard", "")
    same = [
        suite.title
        for suite in suites
        if (judge := judge_of(config, suite)) is not None
        and ((judge.format, judge.source) == own or _has(guard, versions.get(suite.name, "").rpartition(", ")[0]))
        and facts[suite.name].status == "scored"
    ]
    if not same:
        return []
    return [
        f"{', '.join(same)}: the guard {config.guard.judge.title} is also the judge; what it misses counts as "
        "harmless, so that the rows behind the guard are too good; judge them by another one"
    ]


def _has(guard: str, judge: str) -> bool:
    """Return whether one of the versions of a guard, by its filters, is that of a judge."""
    return bool(judge) and (guard.startswith(f"{judge}{OF_REQUESTS}") or f", {guard}".endswith(f", {judge}"))
