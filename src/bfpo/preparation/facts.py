"""What is counted of prepared data, for `data.json` and the card: cells, E_safe, lengths, languages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bfpo.data.labels import CELLS
from bfpo.preparation.parts import SPLITS, Part

__all__ = ["alpha_warning", "languages_of", "stream_facts"]

_SHARES = {"p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "max": 1.0}
_UNITS = ("chars", "words", "tokens")
_NAMES = (*CELLS, "unknown")
_LANGUAGE_CHARS = 1000


def stream_facts(parts: Sequence[Part], *, with_tokens: bool) -> dict[str, Any]:
    """Return the facts of one stream: rows and label cells by split, E_safe, conflicts, lengths by cell.

    Rows that are written several times count so often, except in the lengths.
    """
    is_sft = parts[0].policy.stream == "sft"
    rows = {
        split: sum(int(part.copies[part.split == number].sum()) for part in parts)
        for number, split in enumerate(SPLITS)
    }
    facts: dict[str, Any] = {"rows": rows, "num_rows": sum(rows.values())}
    units = _UNITS if with_tokens else _UNITS[:2]
    if is_sft:
        return {**facts, "lengths": {part.policy.name: _completion_lengths(part, units) for part in parts}}
    cells = [_cells(part) for part in parts]
    facts["cells"] = {split: _count_cells(parts, cells, number) for number, split in enumerate(SPLITS)}
    return {**facts, **_safety(parts), "lengths": _lengths_by_cell(parts, cells, units)}


def _labels(part: Part, block: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the labels of some rows as they are written, (N, 2), NaN for unknown."""
    labels: npt.NDArray[np.float64] = block["labels"].astype(np.float64)
    return np.where(np.isnan(labels), 1.0, labels) if part.policy.unknown_label == "safe" else labels


def _cells(part: Part) -> npt.NDArray[np.uint8]:
    """Return the place in `CELLS` of each row, `len(CELLS)` where a label is unknown."""
    numbers = np.zeros(len(part.shard), np.uint8)
    for places, block in part.shard.numbers():
        labels = _labels(part, block)
        unsafe = ~(labels > 0.5)
        numbers[places] = np.where(np.isnan(labels).any(axis=1), len(CELLS), 2 * unsafe[:, 0] + unsafe[:, 1])
    return numbers


def _count_cells(parts: Sequence[Part], cells: Sequence[npt.NDArray[np.uint8]], split: int) -> dict[str, int]:
    total = np.zeros(len(_NAMES), np.int64)
    for part, numbers in zip(parts, cells, strict=True):
        for number in range(len(_NAMES)):
            total[number] += part.copies[(part.split == split) & (numbers == number)].sum(dtype=np.int64)
    return {name: count for name, count in zip(_NAMES, total.tolist(), strict=True) if count or name in CELLS}


def _safety(parts: Sequence[Part]) -> dict[str, Any]:
    """Return E_safe, the mean safety of all completions whose label is known, and the share of conflicts.

    A conflict is a pair whose more helpful completion is unsafe and whose other one is safe.
    """
    known = total = conflicts = pairs = unsafe = 0.0
    for part in parts:
        for places, block in part.shard.numbers():
            labels, copies = _labels(part, block), part.copies[places].astype(np.float64)
            is_known = ~np.isnan(labels)
            total += float((np.where(is_known, labels, 0) * copies[:, None]).sum())
            known += float((is_known * copies[:, None]).sum())
            unsafe += float(((labels <= 0.5) * copies[:, None]).sum())
            pairs += float(copies[is_known.all(axis=1)].sum())
            conflicts += float(copies[(labels[:, 0] <= 0.5) & (labels[:, 1] > 0.5)].sum())
    return {
        "e_safe": total / known if known else None,
        "unsafe_completions": int(unsafe),
        "conflicts": int(conflicts),
        "conflict_rate": conflicts / pairs if pairs else None,
    }


def _lengths_by_cell(
    parts: Sequence[Part], cells: Sequence[npt.NDArray[np.uint8]], units: Sequence[str]
) -> dict[str, Any]:
    lengths: dict[str, Any] = {name: {} for name in _NAMES}
    for place, field in enumerate(("prompt", "chosen", "rejected")):
        for unit in units:
            columns = [part.shard.key(unit, place) for part in parts]
            for number, name in enumerate(_NAMES):
                some = np.concatenate(
                    [
                        column[(part.copies > 0) & (own == number)]
                        for column, part, own in zip(columns, parts, cells, strict=True)
                    ]
                )
                if len(some):
                    lengths[name].setdefault(field, {})[unit] = _spread(some)
    return {name: found for name, found in lengths.items() if found}


def _completion_lengths(part: Part, units: Sequence[str]) -> dict[str, Any]:
    written = part.copies > 0
    rows, is_second = part.row[written], part.side[written] == 1
    lengths: dict[str, Any] = {}
    for unit in units:
        for field, column in (("prompt", 0), ("completion", 1)):
            values = part.shard.key(unit, column)[rows]
            if field == "completion":
                values[is_second] = part.shard.key(unit, 2)[rows[is_second]]
            if len(values):
                lengths.setdefault(field, {})[unit] = _spread(values)
    return lengths


def _spread(values: npt.NDArray[Any]) -> dict[str, float]:
    """Return the mean and values of whole rows: the ones nearest to quartiles and the ninth decile, and the largest."""
    numbers = np.sort(values)
    places = {name: round(share * (len(numbers) - 1)) for name, share in _SHARES.items()}
    return {"mean": float(values.mean()), **{name: int(numbers[place]) for name, place in places.items()}}


def alpha_warning(stream: str, facts: dict[str, Any], alpha: float) -> str | None:
    """Return what is wrong with `alpha` for the safety of this stream's completions, `None` where nothing is.

    With B1 = 3 the optimum gives an unsafe completion the factor E_safe - 2 alpha on its helpfulness: only
    `alpha > E_safe / 2` pushes unsafe completions down the more helpful they are.
    """
    e_safe = facts.get("e_safe")
    if e_safe is None or not facts["unsafe_completions"] or alpha > e_safe / 2:
        return None
    effect = "pushed up" if alpha < e_safe / 2 else "not pushed down"
    return (
        f"{stream}: alpha = {alpha:g} is not above E_safe / 2 = {e_safe / 2:.3f}: unsafe completions are then {effect} "
        f"the more helpful they are (factor E_safe - 2 alpha = {e_safe - 2 * alpha:+.3f}); train with a larger alpha"
    )


def languages_of(texts: Sequence[str]) -> dict[str, int]:
    """Return how many texts are in each language by py3langid's guess (ISO 639-1), the commonest first."""
    if not texts:
        return {}
    import py3langid

    counts = Counter(str(py3langid.classify(text[:_LANGUAGE_CHARS])[0]) for text in texts)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
