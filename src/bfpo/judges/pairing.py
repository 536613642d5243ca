"""Several judged completions of each prompt -> preference pairs, with counts of every step (the funnel)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, get_args

from bfpo.core.errors import SettingError
from bfpo.core.schema import Comparison, Completion, Message, Pair, Verdict
from bfpo.data.labels import CELLS, cell_of
from bfpo.data.thinking import message_extra

__all__ = ["Pairing", "candidate_duels", "choose_pairs", "label_of"]

Strategy = Literal["informative", "balanced", "random"]

# Most informative first: helpfulness and safety disagree, they agree, both unsafe, both safe.
_MOST_INFORMATIVE = ("unsafe-safe", "safe-unsafe", "unsafe-unsafe", "safe-safe")


@dataclass(frozen=True, slots=True)
class Pairing:
    """The chosen pairs and the funnel's counts.

    `funnel` counts, in this order: `prompts`, `completions`, `well_formed` (also where the judge does not measure it),
    `unscored`, `unsafe`, `incoherent` (if any), `usable` (scored, well-formed, not incoherent), `candidates` (two
    distinct usable completions of a prompt), `unranked` and `ties` among them, `pairs`, `prompts_with_pairs`. `cells`
    counts the pairs by label cell, `candidate_cells` the ranked candidates from which they were chosen.
    """

    pairs: list[Pair]
    funnel: dict[str, int]
    cells: dict[str, int] = field(default_factory=dict)
    candidate_cells: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A possible pair; `gap` in (0, 0.5] is the ranker's confidence in the order, `ids` are in the file's order."""

    pair: Pair
    cell: str
    gap: float
    ids: tuple[str, str]


def candidate_duels(
    completions: Sequence[Completion], verdicts: Sequence[Verdict], incoherent: Collection[str] = ()
) -> list[tuple[Completion, Completion]]:
    """Return every two distinct usable completions of one prompt, in order, for a ranker to compare.

    Usable: scored, not malformed according to its judge, and not among the ids `incoherent`. Texts that differ only in
    white space are the same.
    """
    return [duel for _, group in _groups(completions, verdicts) for duel in _duels(group, incoherent)]


def choose_pairs(
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    comparisons: Sequence[Comparison],
    *,
    strategy: Strategy = "informative",
    pairs_per_prompt: int | None = None,
    soft_labels: bool = False,
    source: str = "redteam",
    seed: int = 0,
    incoherent: Collection[str] = (),
) -> Pairing:
    """Return pairs of completions of each prompt; chosen is the more helpful one, regardless of safety.

    `informative` takes the most confident pair of every label cell of a prompt before a second one of any, cells where
    helpfulness and safety disagree first; `balanced` takes the cell with the fewest pairs so far; `random` any. Each
    prompt gives at most `pairs_per_prompt` (`None`: one of each of its cells). `soft_labels` uses a verdict's `p_safe`,
    if any, as the label. Unscored and `incoherent` completions (ids), ties and unscored comparisons give no pair.

    Raises `SettingError` for an unknown strategy, `pairs_per_prompt` below 1, completions that share an id, or verdicts
    that are not one per completion in the same order.
    """
    if strategy not in get_args(Strategy):
        raise SettingError(f"strategy: got {strategy!r}; allowed: {', '.join(get_args(Strategy))}")
    if pairs_per_prompt is not None and pairs_per_prompt < 1:
        raise SettingError(f"pairs_per_prompt: got {pairs_per_prompt}; allowed: >= 1, or null for one of each cell")
    place = {completion.id: number for number, completion in enumerate(completions)}
    if len(place) != len(completions):
        raise SettingError(f"completions: {len(completions) - len(place)} of {len(completions)} repeat an id")
    order = {(one.first_id, one.second_id): one for one in comparisons}
    funnel = _count_completions(completions, verdicts, incoherent)
    cells, candidate_cells = dict.fromkeys(CELLS, 0), dict.fromkeys(CELLS, 0)
    taken: list[_Candidate] = []
    for prompt, group in _in_seeded_order(list(_groups(completions, verdicts)), seed):
        duels = list(_duels(group, incoherent))
        labels = {c.id: label for c, v in group if (label := label_of(v, soft=soft_labels)) is not None}
        found = list(_candidates(duels, labels, order, source, funnel))
        for candidate in found:
            candidate_cells[candidate.cell] += 1
        chosen = _choose(found, strategy, pairs_per_prompt, cells, random.Random(f"{seed} {prompt}"))
        funnel["prompts_with_pairs"] += bool(chosen)
        for candidate in chosen:
            cells[candidate.cell] += 1
        taken += chosen
    taken.sort(key=lambda candidate: tuple(place[name] for name in candidate.ids))
    funnel["pairs"] = len(taken)
    return Pairing([candidate.pair for candidate in taken], funnel, cells, candidate_cells)


_Judged = tuple[Completion, Verdict]


def _groups(
    completions: Sequence[Completion], verdicts: Sequence[Verdict]
) -> Iterator[tuple[tuple[Message, ...], list[_Judged]]]:
    """Yield each prompt with its judged completions, in order of first occurrence."""
    if [completion.id for completion in completions] != [verdict.completion_id for verdict in verdicts]:
        raise SettingError("verdicts: they are not one per completion, in the same order")
    groups: dict[tuple[Message, ...], list[_Judged]] = {}
    for judged in zip(completions, verdicts, strict=True):
        groups.setdefault(judged[0].prompt, []).append(judged)
    yield from groups.items()


def _usable(verdict: Verdict) -> bool:
    return verdict.label != "unscored" and verdict.well_formed is not False


def _duels(group: Sequence[_Judged], incoherent: Collection[str]) -> Iterator[tuple[Completion, Completion]]:
    distinct: dict[str, Completion] = {}
    for completion, verdict in group:
        if _usable(verdict) and completion.id not in incoherent and completion.text.strip():
            distinct.setdefault(" ".join(completion.text.split()), completion)
    yield from combinations(distinct.values(), 2)


def _count_completions(
    completions: Sequence[Completion], verdicts: Sequence[Verdict], incoherent: Collection[str]
) -> dict[str, int]:
    return {
        "prompts": len({completion.prompt for completion in completions}),
        "completions": len(completions),
        "well_formed": sum(verdict.well_formed is not False for verdict in verdicts),
        "unscored": sum(verdict.label == "unscored" for verdict in verdicts),
        "unsafe": sum(verdict.label == "unsafe" for verdict in verdicts),
        **({"incoherent": len(incoherent)} if incoherent else {}),
        "usable": sum(_usable(verdict) and verdict.completion_id not in incoherent for verdict in verdicts),
        **dict.fromkeys(("candidates", "unranked", "ties", "pairs", "prompts_with_pairs"), 0),
    }


def label_of(verdict: Verdict, *, soft: bool) -> float | None:
    """Return the safety label of a verdict; `None`, never safe, for an unscored one."""
    if verdict.label == "unscored":
        return None
    if soft and verdict.p_safe is not None:
        return verdict.p_safe
    return float(verdict.label == "safe")


def _candidates(
    duels: Sequence[tuple[Completion, Completion]],
    labels: Mapping[str, float],
    order: Mapping[tuple[str, str], Comparison],
    source: str,
    funnel: dict[str, int],
) -> Iterator[_Candidate]:
    for first, second in duels:
        funnel["candidates"] += 1
        better = _first_is_better(order, first.id, second.id)
        if better is None:
            funnel["unranked"] += 1
        elif better == 0.5:
            funnel["ties"] += 1
        else:
            chosen, rejected = (first, second) if better > 0.5 else (second, first)
            pair = Pair(
                f"{chosen.id}|{rejected.id}",
                chosen.prompt,
                chosen.text,
                rejected.text,
                labels[chosen.id],
                labels[rejected.id],
                source,
                tools=chosen.tools,
                chosen_extra=message_extra(chosen),
                rejected_extra=message_extra(rejected),
                chosen_finished=chosen.finished,
                rejected_finished=rejected.finished,
            )
            cell = cell_of(labels[chosen.id], labels[rejected.id])
            yield _Candidate(pair, cell, abs(better - 0.5), (first.id, second.id))


def _first_is_better(order: Mapping[tuple[str, str], Comparison], first: str, second: str) -> float | None:
    if (first, second) in order:
        return order[first, second].first_is_better
    turned = order.get((second, first))
    return None if turned is None or turned.first_is_better is None else 1 - turned.first_is_better


def _in_seeded_order(
    groups: list[tuple[tuple[Message, ...], list[_Judged]]], seed: int
) -> Iterator[tuple[str, list[_Judged]]]:
    """Yield the prompts in an order that does not depend on the file; the balance of the cells depends on it."""
    named = [(hashlib.sha256(f"{seed} {prompt!r}".encode()).hexdigest(), group) for prompt, group in groups]
    yield from sorted(named, key=lambda item: item[0])


def _choose(
    found: Sequence[_Candidate],
    strategy: Strategy,
    limit: int | None,
    cells: Mapping[str, int],
    rng: random.Random,
) -> list[_Candidate]:
    shuffled = rng.sample(list(found), len(found))
    if limit is None:
        limit = len({candidate.cell for candidate in found})
    if strategy == "random":
        return shuffled[:limit]
    ranked = sorted(shuffled, key=lambda candidate: -candidate.gap)  # stable: equal gaps stay shuffled
    by_cell = {cell: [candidate for candidate in ranked if candidate.cell == cell] for cell in _MOST_INFORMATIVE}
    taken: list[_Candidate] = []
    while len(taken) < limit and any(by_cell.values()):
        here = {cell: sum(candidate.cell == cell for candidate in taken) for cell in by_cell}
        free = [cell for cell in _MOST_INFORMATIVE if by_cell[cell]]
        earlier = {} if strategy == "informative" else cells
        cell = min(free, key=lambda name: earlier.get(name, 0) + here[name])
        taken.append(by_cell[cell].pop(0))
    return taken
