"""Asking judges and rankers through the cache: each text once, every answer stored as it arrives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from bfpo.core.schema import Comparison, Completion, Verdict
from bfpo.judges.cache import OpinionCache, comparison_key, verdict_key
from bfpo.judges.judges import Judge, OneByOneJudge, OneByOneRanker, Ranker

__all__ = ["Tally", "ask_judge", "ask_ranker", "num_votes"]

_PER_CALL = 128  # texts per call of a judge that answers in batches; a killed process loses at most these
Item = TypeVar("Item")
Opinion = TypeVar("Opinion", Verdict, Comparison)


@dataclass(slots=True)
class Tally:
    """Numbers of different texts (or pairs): found in the cache, asked now, and of these without an answer."""

    kept: int = 0
    asked: int = 0
    unanswered: int = 0


def num_votes(judge: Judge, votes: int) -> int:
    """Return the number of votes to ask of a judge: one if its verdicts never vary."""
    return votes if isinstance(judge, OneByOneJudge) and judge.is_sampled else 1


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
    missing answer (a fault of server or network) is unscored and not cached. Raises the errors of the judge; earlier
    answers stay in the cache.
    """
    by_vote = []
    for vote in range(num_votes(judge, votes)):
        keys = [verdict_key(completion, judge.version, vote) for completion in completions]
        asked = _Asking(cache, cache.find_verdicts(dict.fromkeys(keys), judge.name), keys, tally or Tally(), advance)
        todo = asked.todo(completions)
        if isinstance(judge, OneByOneJudge):
            judge.judge_each(list(todo.values()), asked.reporter(list(todo)), vote=vote)
        else:
            asked.in_parts(todo, judge.judge)
        by_vote.append(
            [replace(found, completion_id=c.id) for found, c in zip(asked.in_order(), completions, strict=True)]
        )
    return [list(given) for given in zip(*by_vote, strict=True)]


def ask_ranker(
    ranker: Ranker,
    pairs: Sequence[tuple[Completion, Completion]],
    cache: OpinionCache,
    *,
    tally: Tally | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Comparison]:
    """Return the comparison of each pair, in order; otherwise as `ask_judge`."""
    keys = [comparison_key(first, second, ranker.version) for first, second in pairs]
    asked = _Asking(cache, cache.find_comparisons(dict.fromkeys(keys), ranker.name), keys, tally or Tally(), advance)
    todo = asked.todo(pairs)
    if isinstance(ranker, OneByOneRanker):
        ranker.compare_each(list(todo.values()), asked.reporter(list(todo)))
    else:
        asked.in_parts(todo, ranker.compare)
    return [
        replace(found, first_id=first.id, second_id=second.id)
        for found, (first, second) in zip(asked.in_order(), pairs, strict=True)
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

    def in_parts(self, todo: Mapping[str, Item], ask: Callable[[Sequence[Item]], Sequence[Opinion]]) -> None:
        """Ask in parts and store each part's opinions."""
        keys, items = list(todo), list(todo.values())
        for start in range(0, len(items), _PER_CALL):
            part = slice(start, start + _PER_CALL)
            opinions = dict(zip(keys[part], ask(items[part]), strict=True))
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
