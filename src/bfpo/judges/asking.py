"""Asking judges and rankers through the cache: each text once, every answer stored as it arrives."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

from bfpo.core.errors import SettingError
from bfpo.core.progress import CountProgress
from bfpo.core.schema import Comparison, Completion, JudgeFit, Verdict
from bfpo.execution.settings import ExecutorConfig, LocalExecutor
from bfpo.generation.server import RequestBudget
from bfpo.judges.cache import OpinionCache, comparison_key, verdict_key
from bfpo.judges.fit import judge_fit
from bfpo.judges.judges import Judge, OneByOneJudge, OneByOneRanker, Ranker
from bfpo.judges.settings import JudgeConfig
from bfpo.judges.shared import compared_parts, judged_parts, open_judge, parts_of

__all__ = ["Tally", "Votes", "ask_judge", "ask_judges", "ask_ranker", "judge_answers", "no_answer", "num_votes"]

Item = TypeVar("Item")
Opinion = TypeVar("Opinion", Verdict, Comparison)
Votes = dict[str, list[list[Verdict]]]
"""Judge name -> for each completion, the judge's votes."""
_log = logging.getLogger(__name__)
_HERE = LocalExecutor(workers=1)


@dataclass(slots=True)
class Tally:
    """Numbers of different texts (or pairs): found in the cache, asked now, and of these without an answer."""

    kept: int = 0
    asked: int = 0
    unanswered: int = 0


def num_votes(judge: Judge, votes: int) -> int:
    """Return the number of votes to ask of a judge: one if its verdicts never vary."""
    return votes if isinstance(judge, OneByOneJudge) and judge.is_sampled else 1


def no_answer(completion: Completion) -> str:
    """Return why a completion holds no answer to judge, empty if it holds one; an empty text that ended is one."""
    if completion.blocked:
        return f"no answer, blocked: {completion.blocked}"
    if completion.text.strip() or (completion.finished and not completion.reasoning):
        return ""
    if not completion.reasoning:
        return "no answer: the text is empty and does not end"
    return "no answer behind the thoughts" if completion.finished else "no answer: the thoughts do not end"


def judge_answers(judge: Judge, completions: Sequence[Completion]) -> list[Verdict]:
    """Return a judge's verdicts, one per completion, in order; one without an answer is unscored, not asked about."""
    parts = parts_of([completion for completion in completions if not no_answer(completion)])
    found = dict(judged_parts(judge, parts))
    asked = (verdict for number in range(len(parts)) for verdict in found[number])
    return [_without_answer(completion, judge) or next(asked) for completion in completions]


def _without_answer(completion: Completion, judge: Judge) -> Verdict | None:
    reason = no_answer(completion)
    return Verdict(completion.id, judge.name, "unscored", reason=reason) if reason else None


def ask_judge(
    judge: Judge,
    completions: Sequence[Completion],
    cache: OpinionCache,
    *,
    votes: int = 1,
    tally: Tally | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[list[Verdict]]:
    """Return the votes on each completion, in order; equal texts are asked about once.

    `tally` counts the texts found in the cache and asked; `advance` gets the number of completions that are done. A
    missing answer (a fault of server or network) is unscored and not cached. A completion that holds no answer
    (`no_answer`) is unscored and not asked about. Raises the errors of the judge; earlier answers stay in the cache.
    """
    answered = [completion for completion in completions if not no_answer(completion)]
    advance((len(completions) - len(answered)) * num_votes(judge, votes))
    by_vote = []
    for vote in range(num_votes(judge, votes)):
        keys = [verdict_key(completion, judge.version, vote) for completion in answered]
        asked = _Asking(cache, cache.find_verdicts(dict.fromkeys(keys), judge.name), keys, tally or Tally(), advance)
        todo = asked.todo(answered)
        if isinstance(judge, OneByOneJudge):
            judge.judge_each(list(todo.values()), asked.reporter(list(todo)), vote=vote)
        else:
            asked.in_parts(todo, partial(judged_parts, judge))
        found = iter(asked.in_order())
        by_vote.append([_without_answer(c, judge) or replace(next(found), completion_id=c.id) for c in completions])
    return [list(given) for given in zip(*by_vote, strict=True)]


def ask_judges(
    judges: Sequence[JudgeConfig],
    completions: Sequence[Completion],
    cache: OpinionCache,
    budget: RequestBudget,
    *,
    votes: int = 1,
    tallies: dict[str, Tally],
    executor: ExecutorConfig = _HERE,
    threads: int | None = None,
) -> tuple[Votes, list[JudgeFit]]:
    """Return the votes of judges asked in turn, and how each fits the texts; each is freed before the next is loaded.

    `tallies` gets a tally by the name of each judge; `executor` and `threads` as in `open_judge`. Raises `SettingError`
    for two of the same name, and as `ask_judge`.
    """
    found: Votes = {}
    fits: list[JudgeFit] = []
    for spec in judges:
        with open_judge(spec, executor, budget, threads=threads) as judge:
            if judge.name in found:
                raise SettingError(f"judges: two have the name {judge.name!r}; give one of them another `name`")
            tallies[judge.name] = Tally()
            total = len(completions) * num_votes(judge, votes)
            with CountProgress(f"judged by {judge.name}", total, _log) as progress:
                found[judge.name] = ask_judge(
                    judge, completions, cache, votes=votes, tally=tallies[judge.name], advance=progress.advance
                )
            fits += judge_fit(judge, completions, [given[0] for given in found[judge.name]])
    return found, fits


def ask_ranker(
    ranker: Ranker,
    pairs: Sequence[tuple[Completion, Completion]],
    cache: OpinionCache,
    *,
    tally: Tally | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Comparison]:
    """Return the comparison of each pair, in order; otherwise as `ask_judge`."""
    answered = [pair for pair in pairs if not any(map(no_answer, pair))]
    advance(len(pairs) - len(answered))
    keys = [comparison_key(first, second, ranker.version) for first, second in answered]
    asked = _Asking(cache, cache.find_comparisons(dict.fromkeys(keys), ranker.name), keys, tally or Tally(), advance)
    todo = asked.todo(answered)
    if isinstance(ranker, OneByOneRanker):
        ranker.compare_each(list(todo.values()), asked.reporter(list(todo)))
    else:
        asked.in_parts(todo, partial(compared_parts, ranker))
    found = iter(asked.in_order())
    return [
        Comparison(first.id, second.id, ranker.name, None, reason=reason)
        if (reason := no_answer(first) or no_answer(second))
        else replace(next(found), first_id=first.id, second_id=second.id)
        for first, second in pairs
    ]


class _Asking(Generic[Opinion]):
    """The opinions of one judge (or ranker) in one vote, by key, as they arrive."""

    def __init__(
        self,
        cache: OpinionCache,
        found: Mapping[str, Opinion],
        keys: Sequence[str],
        tally: Tally,
        advance: Callable[[int], None],
    ) -> None:
        self._cache, self._keys, self._tally, self._advance = cache, keys, tally, advance
        self._found: dict[str, Opinion] = dict(found)
        self._num_same = Counter(keys)
        tally.kept += len(found)
        advance(sum(self._num_same[key] for key in found))

    def todo(self, items: Sequence[Item]) -> dict[str, Item]:
        """Return the items to ask about by key, the first of equal ones."""
        todo: dict[str, Item] = {}
        for key, item in zip(self._keys, items, strict=True):
            if key not in self._found:
                todo.setdefault(key, item)
        return todo

    def reporter(self, keys: Sequence[str]) -> Callable[[int, Opinion, bool], None]:
        """Return the callback for opinions that arrive one by one."""

        def report(place: int, opinion: Opinion, lasting: bool) -> None:
            if lasting:
                self._cache.keep({keys[place]: opinion})
            self._take(keys[place], opinion, lasting)

        return report

    def in_parts(
        self,
        todo: Mapping[str, Item],
        ask: Callable[[Sequence[Sequence[Item]]], Iterator[tuple[int, Sequence[Opinion]]]],
    ) -> None:
        """Ask in parts and store each part's opinions as they arrive."""
        keys = parts_of(list(todo))
        for number, found in ask(parts_of(list(todo.values()))):
            opinions = dict(zip(keys[number], found, strict=True))
            self._cache.keep(opinions)
            for key, opinion in opinions.items():
                self._take(key, opinion, lasting=True)

    def _take(self, key: str, opinion: Opinion, lasting: bool) -> None:
        self._found[key] = opinion
        self._tally.asked += 1
        self._tally.unanswered += not lasting
        self._advance(self._num_same[key])

    def in_order(self) -> list[Opinion]:
        """Return the opinions, one per item."""
        return [self._found[key] for key in self._keys]
