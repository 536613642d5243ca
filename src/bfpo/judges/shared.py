"""Judges and rankers whose model is loaded by several workers, each of which judges parts of the texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

from bfpo.core.schema import Comparison, Completion, Verdict
from bfpo.execution.settings import ExecutorConfig
from bfpo.execution.workers import Workers, in_process
from bfpo.generation.server import RequestBudget
from bfpo.judges.judges import Judge, Ranker, make_judge, make_ranker
from bfpo.judges.settings import JudgeConfig, RankerConfig, loads_model
from bfpo.policy.devices import use_threads

__all__ = [
    "PER_CALL",
    "SharedJudge",
    "SharedRanker",
    "compared_parts",
    "judged_parts",
    "open_judge",
    "open_ranker",
    "parts_of",
]

PER_CALL = 128  # texts per call of a judge that answers in batches; a killed process loses at most these
Item = TypeVar("Item")
Opinion = TypeVar("Opinion", Verdict, Comparison)


def parts_of(items: Sequence[Item]) -> list[Sequence[Item]]:
    """Return the parts that are asked about together: what is in a batch depends on the items alone."""
    return [items[start : start + PER_CALL] for start in range(0, len(items), PER_CALL)]


@contextmanager
def open_judge(
    spec: JudgeConfig,
    executor: ExecutorConfig,
    budget: RequestBudget | None = None,
    *,
    threads: int | None = None,
    of_requests: bool = False,
) -> Iterator[Judge]:
    """Yield the judge of a spec, as `make_judge` makes it; its model is freed at the end.

    A model that is loaded here is loaded by each worker of the executor, with `threads` of torch in each.
    """
    if not loads_model(spec) or in_process(executor):
        yield make_judge(spec, budget, of_requests=of_requests)
        return
    with Workers(executor, partial(_make_judge, spec, of_requests, threads)) as workers:
        yield SharedJudge(workers)


@contextmanager
def open_ranker(
    spec: RankerConfig, executor: ExecutorConfig, budget: RequestBudget | None = None, *, threads: int | None = None
) -> Iterator[Ranker]:
    """Yield the ranker of a spec, otherwise as `open_judge`."""
    if not loads_model(spec) or in_process(executor):
        yield make_ranker(spec, budget)
        return
    with Workers(executor, partial(_make_ranker, spec, threads)) as workers:
        yield SharedRanker(workers)


class _Shared(Generic[Item, Opinion]):
    """Name and version as the workers know them, and opinions on parts."""

    def __init__(self, workers: Workers[Any], ask: Callable[[Any, Sequence[Item]], list[Opinion]]) -> None:
        self._workers = workers
        self._ask: Callable[[Any, Sequence[Item]], list[Opinion]] = ask
        self.name, self.version, held_out = workers.call(_described)
        if held_out is not None:  # of a trained judge
            self.held_out: Mapping[str, object] = held_out

    def in_parts(self, parts: Iterable[Sequence[Item]]) -> Iterator[tuple[int, list[Opinion]]]:
        """Yield the number of each part and the opinions on it, as they arrive."""
        return self._workers.map(parts, self._ask, title=_part_title)

    def _all(self, items: Sequence[Item]) -> list[Opinion]:
        found = dict(self.in_parts(parts_of(items)))
        return [opinion for number in sorted(found) for opinion in found[number]]


class SharedJudge(_Shared[Completion, Verdict]):
    """A judge whose model is in several workers."""

    def __init__(self, workers: Workers[Any]) -> None:
        super().__init__(workers, _judge)

    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        """Return the verdicts, one per completion, in order."""
        return self._all(completions)


class SharedRanker(_Shared[tuple[Completion, Completion], Comparison]):
    """A ranker whose model is in several workers."""

    def __init__(self, workers: Workers[Any]) -> None:
        super().__init__(workers, _compare)

    def compare(self, pairs: Sequence[tuple[Completion, Completion]]) -> list[Comparison]:
        """Return the comparisons, one per pair of completions, in order."""
        return self._all(pairs)


def judged_parts(judge: Judge, parts: Sequence[Sequence[Completion]]) -> Iterator[tuple[int, Sequence[Verdict]]]:
    """Yield the number of each part and a judge's verdicts on it, as they arrive."""
    if isinstance(judge, SharedJudge):
        return judge.in_parts(parts)
    return ((number, judge.judge(part)) for number, part in enumerate(parts))


def compared_parts(
    ranker: Ranker, parts: Sequence[Sequence[tuple[Completion, Completion]]]
) -> Iterator[tuple[int, Sequence[Comparison]]]:
    """Yield the number of each part and a ranker's comparisons of its pairs, as they arrive."""
    if isinstance(ranker, SharedRanker):
        return ranker.in_parts(parts)
    return ((number, ranker.compare(part)) for number, part in enumerate(parts))


# ------------------------------------------------------------------------------------------------------ in a worker


def _make_judge(spec: JudgeConfig, of_requests: bool, threads: int | None) -> Judge:
    use_threads(threads)
    return make_judge(spec, of_requests=of_requests)


def _make_ranker(spec: RankerConfig, threads: int | None) -> Ranker:
    use_threads(threads)
    return make_ranker(spec)


def _described(judge: Judge | Ranker, _: None) -> tuple[str, str, Mapping[str, object] | None]:
    return judge.name, judge.version, getattr(judge, "held_out", None)


def _judge(judge: Judge, completions: Sequence[Completion]) -> list[Verdict]:
    return judge.judge(completions)


def _compare(ranker: Ranker, pairs: Sequence[tuple[Completion, Completion]]) -> list[Comparison]:
    return ranker.compare(pairs)


def _part_title(part: Sequence[Any]) -> str:
    first = part[0][0] if isinstance(part[0], tuple) else part[0]
    return f"the {len(part)} texts from {first.id!r} on"
