"""Splits by prompt and samples of rows, by hashes: the order of rows does not matter."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from bfpo.core.errors import SettingError
from bfpo.core.schema import Completion, Message, Pair, Prompt
from bfpo.data.settings import SplitConfig

__all__ = ["RowPicker", "draw", "draw_prompts", "normalised_prompt", "part_of", "prompt_hashes", "smallest"]

Item = TypeVar("Item")
Mask = npt.NDArray[np.bool_]
_RANK_BYTES = 16  # of the hash's 32: enough for about 2^64 rows without a collision


def normalised_prompt(messages: Iterable[Message]) -> str:
    """Return a prompt as text, normalised for case, white space and Unicode form (NFKC)."""
    return "\n".join([" ".join(_folded(f"{turn.role}: ", turn.content).split()) for turn in messages])


def _folded(role: str, text: str) -> str:
    if text.isascii():  # where the Unicode form changes nothing
        return f"{role}{text}".lower()
    return unicodedata.normalize("NFKC", f"{role}{unicodedata.normalize('NFKC', text)}".casefold())


def draw(items: Sequence[Item], limit: int | None, seed: int | str) -> list[Item]:
    """Return a seeded sample of `limit` items in their order; all if there are no more or `limit` is `None`."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[place] for place in sorted(random.Random(seed).sample(range(len(items)), limit))]


def draw_prompts(prompts: Sequence[Prompt], limit: int | None, seed: int) -> list[Prompt]:
    """Return `limit` prompts in their order, chosen as `smallest` does."""
    return [prompts[place] for place in smallest([normalised_prompt(one.messages) for one in prompts], limit, seed)]


def smallest(texts: Sequence[str], limit: int | None, seed: int) -> list[int]:
    """Return the places of the `limit` texts with the smallest hashes, ascending: a text more displaces at most one."""
    ranks = [_rank(f"draw {seed}", text) for text in texts]  # not those of a split: its parts are drawn from alike
    return sorted(sorted(range(len(texts)), key=ranks.__getitem__)[:limit])


def prompt_hashes(messages: Sequence[Message]) -> bytes:
    """Return two hashes of 8 bytes: of the user's first turn, and of all the user's turns, both normalised.

    System prompts and answers do not count. The first decides the part of a split by shares: a conversation is in the
    part of its beginning.
    """
    turns = _said(messages)
    first = _rank("", normalised_prompt(turns[:1]))[:8]
    return first + (first if len(turns) == 1 else _rank("", normalised_prompt(turns))[:8])


def _said(messages: Sequence[Message]) -> Sequence[Message]:
    return [turn for turn in messages if turn.role == "user"] or messages


def part_of(prompts: Sequence[Prompt], split: SplitConfig | None) -> list[Prompt]:
    """Return the prompts of one part of a split; all without one. Raises `SettingError` if there are none."""
    picker = RowPicker(split=split)
    for prompt in prompts:
        picker.add(prompt)
    return list(compress(prompts, picker.picked()))


class RowPicker:
    """Picks the rows of one part of a split by prompt, and `limit` of those, keeping 16 bytes per row.

    By `held_out`, the prompts with the smallest hashes of the split's seed and the normalised prompt are held out: the
    order of rows does not matter, and an added prompt displaces at most one. By `parts`, the hash of the seed and the
    user's first turn, as a number in [0, 1), is in one of the intervals of the parts in order of name: no other row
    matters. The split comes before the limit, which draws rows by a
    hash of `seed` and id, never the first ones: files are often sorted. With `first` it takes the first ones all the
    same, for a stream that is not read further than is needed.
    """

    def __init__(
        self, *, split: SplitConfig | None = None, limit: int | None = None, seed: int = 0, first: bool = False
    ) -> None:
        self._split, self._limit, self._seed, self._first = split, limit, seed, first
        self._prompt_ranks, self._id_ranks = bytearray(), bytearray()
        self._num_rows = self._num_in_part = 0

    def add(self, row: Pair | Completion | Prompt) -> None:
        """Add a row."""
        self._num_rows += 1
        if self._split is not None:
            prompt = row.messages if isinstance(row, Prompt) else row.prompt
            deciding = _said(prompt)[:1] if self._split.parts else prompt
            rank = _rank(self._split.seed, normalised_prompt(deciding))
            self._prompt_ranks += rank
            self._num_in_part += bool(self._first and self._split.parts and _part_mask(rank, self._split)[0])
        if self._limit is not None and not self._first:
            self._id_ranks += _rank(self._seed, row.id)

    @property
    def is_full(self) -> bool:
        """Whether no row to come can be picked: `first` and a limit, and no `held_out`, which needs all prompts."""
        if not self._first or self._limit is None:
            return False
        if self._split is None:
            return self._num_rows >= self._limit
        return bool(self._split.parts) and self._num_in_part >= self._limit

    def picked(self) -> Mask:
        """Return which of the rows are picked, `(num_rows,)`, in the order they came in.

        Raises `SettingError` if no prompt would be left on a side of the split, and for `limit < 1`.
        """
        picked: Mask = np.ones(self._num_rows, np.bool_)
        if self._split is not None and self._split.parts:
            picked = _in_part(self._prompt_ranks, self._split)
        elif self._split is not None and self._split.held_out is not None:
            held_out = _held_out(_as_ranks(self._prompt_ranks), self._split.held_out)
            picked = held_out if self._split.part == "test" else ~held_out
        if self._limit is not None:
            if self._limit < 1:
                raise SettingError(f"limit: got {self._limit}; at least 1 pair is needed")
            rows = np.flatnonzero(picked)
            order: npt.NDArray[np.integer[Any]] = np.arange(len(rows))
            if not self._first:
                order = np.argsort(_as_ranks(self._id_ranks)[rows], kind="stable")
            picked[rows[order[self._limit :]]] = False
        return picked


def _held_out(ranks: npt.NDArray[np.bytes_], num: int) -> Mask:
    prompts = np.unique(ranks)
    if not 0 < num < len(prompts):
        raise SettingError(
            f"held_out: got {num}; allowed: 1 to {len(prompts) - 1}, as the {len(ranks)} pairs have "
            f"{len(prompts)} different prompts"
        )
    held_out: Mask = ranks <= prompts[num - 1]
    return held_out


def _part_mask(ranks: bytes | bytearray, split: SplitConfig) -> Mask:
    names = sorted(split.parts)
    numbers = np.frombuffer(ranks, ">u8")[::2] / 2.0**64
    bounds = np.cumsum([split.parts[name] for name in names])
    picked: Mask = np.searchsorted(bounds[:-1], numbers, side="right") == names.index(split.part)
    return picked


def _in_part(ranks: bytearray, split: SplitConfig) -> Mask:
    picked = _part_mask(ranks, split)
    if not picked.any():
        raise SettingError(f"split.part: none of {len(picked)} rows is in {split.part!r}; give it a larger share")
    return picked


def _as_ranks(ranks: bytearray) -> npt.NDArray[np.bytes_]:
    return np.frombuffer(ranks, f"S{_RANK_BYTES}")


def _rank(seed: int | str, text: str) -> bytes:
    return hashlib.sha256(f"{seed}|{text}".encode()).digest()[:_RANK_BYTES]
