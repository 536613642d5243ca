"""The judges and rankers of suites: which one judges which suite, their verdicts through the cache, and refusals."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from bfpo.config.evaluate import SuitesJob
from bfpo.core.errors import MissingExtraError, ModelError, ServerError
from bfpo.core.files import user_cache_folder
from bfpo.core.progress import CountProgress
from bfpo.core.schema import Completion, JudgeFit, Verdict
from bfpo.data.chat import whole_answer
from bfpo.data.labels import as_judged
from bfpo.generation.server import RequestBudget
from bfpo.judges.asking import ask_judge, ask_ranker
from bfpo.judges.cache import OpinionCache
from bfpo.judges.fit import judge_fit
from bfpo.judges.judges import Judge
from bfpo.judges.refusals import NOT_READ
from bfpo.judges.settings import JudgeConfig, RefusalSpec
from bfpo.judges.shared import open_judge, open_ranker
from bfpo.suites.catalogue import Suite

__all__ = ["JudgedSuites", "Preference", "judge_of", "judge_suites", "rank_suites", "with_refusal"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JudgedSuites:
    """Verdicts by (suite, model) in order, judges by suite, why a suite was skipped, how judges fit the answers.

    `versions`: suite -> versions of its judges, which name what verdicts depend on.
    """

    verdicts: dict[tuple[str, str], list[Verdict]]
    judges: dict[str, str]
    skipped: dict[str, str]
    fits: list[JudgeFit] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Preference:
    """The probability that an answer beats the baseline's (`None`: unscored), and its length minus the baseline's."""

    better: float | None
    longer_by: int


def judge_of(config: SuitesJob, suite: Suite) -> JudgeConfig | None:
    """Return the judge of a suite: the user's by suite or role, else the suite's own; `None`: only refusals count."""
    if suite.judge is None or suite.judge.role == "ranker":
        return None
    given = config.suites.judges
    if (found := given.get(suite.name) or given.get(suite.judge.role)) is not None:
        return found
    return None if suite.judge.default is None else JudgeConfig.model_validate(suite.judge.default)


def judge_suites(
    config: SuitesJob, suites: Sequence[Suite], answers: Mapping[str, Mapping[str, Sequence[Completion]]]
) -> JudgedSuites:
    """Judge `answers` (model -> suite -> completions) through the cache; each judge is loaded once.

    Of an answer that continues a message of the assistant, judges of safety read the whole message. Refusals are judged
    too if a suite's judge does not report them, in what the model wrote itself. A suite whose default judge cannot be
    loaded is skipped with the reason; for a judge that the user names the error is raised.
    """
    refusal_config = config.suites.judges.get("refusal") or RefusalSpec()
    budget = RequestBudget(config.suites.max_requests)
    done = JudgedSuites({}, {}, {})
    groups: dict[str, tuple[JudgeConfig, list[Suite]]] = {}
    for suite in suites:
        if (chosen := judge_of(config, suite)) is not None:
            groups.setdefault(chosen.model_dump_json(), (chosen, []))[1].append(suite)
    with OpinionCache(config.suites.label_cache or user_cache_folder("label")) as cache:
        for judge_config, judged in groups.values():
            with ExitStack() as stack:
                opened = open_judge(judge_config, config.executor, budget, threads=config.threads)
                try:
                    judge = stack.enter_context(opened)
                except (ModelError, MissingExtraError, ServerError) as error:
                    if _is_given(config, judged):
                        raise
                    reason = f"its judge {judge_config.title} cannot be loaded: {error}"
                    done.skipped.update({suite.name: reason for suite in judged})
                    continue
                _judge_suites(judge, judged, answers, cache, done)
        with open_judge(refusal_config, config.executor, budget, threads=config.threads) as refusals:
            asked = [suite for suite in suites if suite.name not in done.skipped]
            done.versions.update({suite.name: done.versions.get(suite.name, "") + refusals.version for suite in asked})
            readings = _ask(refusals, asked, answers, cache)
        _log_not_read(list(chain.from_iterable(readings.values())))
        for key, verdicts in readings.items():
            done.judges.setdefault(key[0], refusals.name)
            done.verdicts[key] = [
                with_refusal(verdict, refusal)
                for verdict, refusal in zip(done.verdicts.get(key, verdicts), verdicts, strict=True)
            ]
    return done


def _judge_suites(
    judge: Judge,
    suites: Sequence[Suite],
    answers: Mapping[str, Mapping[str, Sequence[Completion]]],
    cache: OpinionCache,
    done: JudgedSuites,
) -> None:
    """Add a judge's verdicts on its suites, and how it fits each model's answers."""
    done.judges.update({suite.name: judge.name for suite in suites})
    done.versions.update({suite.name: f"{judge.version}, " for suite in suites})
    found = _ask(judge, suites, answers, cache, read=_whole_as_judged)
    done.verdicts.update(found)
    for model, by_suite in answers.items():
        texts = [_whole_as_judged(completion) for suite in suites for completion in by_suite[suite.name]]
        verdicts = [verdict for suite in suites for verdict in found[suite.name, model]]
        done.fits.extend(judge_fit(judge, texts, verdicts, model=model))


def _is_given(config: SuitesJob, suites: Sequence[Suite]) -> bool:
    names = {name for suite in suites for name in (suite.name, suite.judge.role if suite.judge else "")}
    return bool(names & config.suites.judges.keys())


def _whole_as_judged(completion: Completion) -> Completion:
    return as_judged(whole_answer(completion))


def _ask(
    judge: Judge,
    suites: Sequence[Suite],
    answers: Mapping[str, Mapping[str, Sequence[Completion]]],
    cache: OpinionCache,
    *,
    read: Callable[[Completion], Completion] = as_judged,
) -> dict[tuple[str, str], list[Verdict]]:
    places = [(suite.name, model) for suite in suites for model in answers]
    texts = [read(completion) for suite, model in places for completion in answers[model][suite]]
    with CountProgress(f"judged by {judge.name}", len(texts), _log) as progress:
        votes = iter(ask_judge(judge, texts, cache, advance=progress.advance))
    return {(suite, model): [next(votes)[0] for _ in answers[model][suite]] for suite, model in places}


def _log_not_read(readings: Sequence[Verdict]) -> None:
    if not_read := sum(reading.refused is None and reading.reason == NOT_READ for reading in readings):
        _log.warning(
            "%d of %d answers are not in English: no refusal is counted for them; set another judge of the role "
            "refusal, or its phrases",
            not_read,
            len(readings),
        )


def with_refusal(verdict: Verdict, refusal: Verdict) -> Verdict:
    """Return the verdict, with the refusal judge's opinion on refusals if it has none of its own.

    A verdict without a reason says if the answer was not read for refusals.
    """
    if verdict.refused is not None:
        return verdict
    reason = verdict.reason or (NOT_READ if refusal.reason == NOT_READ else "")
    return replace(verdict, refused=refusal.refused, partly_refused=refusal.partly_refused, reason=reason)


def rank_suites(
    config: SuitesJob, suites: Sequence[Suite], answers: Mapping[str, Mapping[str, Sequence[Completion]]]
) -> tuple[str, str, dict[tuple[str, str], dict[str, Preference]]]:
    """Return the ranker's name, its version and, by (suite, model), the preference for each answer over the baseline's.

    Needs a ranker in the config. Raises as `make_ranker`, and `ServerError` if a server gives no answers.
    """
    spec, baseline = config.suites.ranker, config.suites.baseline
    assert spec is not None
    assert baseline is not None
    budget = RequestBudget(config.suites.max_requests)
    found: dict[tuple[str, str], dict[str, Preference]] = {}
    with (
        open_ranker(spec, config.executor, budget, threads=config.threads) as ranker,
        OpinionCache(config.suites.label_cache or user_cache_folder("label")) as cache,
    ):
        for suite in suites:
            others = {completion.id: as_judged(completion) for completion in answers[baseline][suite.name]}
            for model in answers:
                if model == baseline:
                    continue
                own = answers[model][suite.name]
                pairs: list[Any] = [(as_judged(c), others[c.id]) for c in own if c.id in others]
                with CountProgress(f"compared by {ranker.name}", len(pairs), _log) as progress:
                    opinions = ask_ranker(ranker, pairs, cache, advance=progress.advance)
                found[suite.name, model] = {
                    own.id: Preference(opinion.first_is_better, len(own.text) - len(other.text))
                    for (own, other), opinion in zip(pairs, opinions, strict=True)
                }
        return ranker.name, ranker.version, found
