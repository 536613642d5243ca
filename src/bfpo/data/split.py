"""Splits by prompt and samples of pairs, by a hash that no order of rows changes."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence

from bfpo.errors import SettingError
from bfpo.schema import Message, Pair

__all__ = ["limit_pairs", "normalised_prompt", "split_pairs"]


def normalised_prompt(messages: Iterable[Message]) -> str:
    """Return a prompt as text in which case, white space and ways to write a character (NFKC) make no difference."""
    turns = (f"{message.role}: {unicodedata.normalize('NFKC', message.content)}" for message in messages)
    return "\n".join(" ".join(unicodedata.normalize("NFKC", turn.casefold()).split()) for turn in turns)


def split_pairs(pairs: Sequence[Pair], *, held_out: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return `(train, test)`, each in the given order; `held_out` counts prompts, and no prompt is in both.

    The prompts with the smallest hashes of seed and normalised prompt are held out: the order of rows does not matter,
    and a further prompt displaces at most one. Raises `SettingError` where no prompt would be left on a side.
    """
    prompts = {normalised_prompt(pair.prompt) for pair in pairs}
    if not 0 < held_out < len(prompts):
        raise SettingError(
            f"held_out: got {held_out}; allowed: 1 to {len(prompts) - 1}, for the {len(pairs)} pairs have "
            f"{len(prompts)} different prompts"
        )
    test = set(sorted(prompts, key=lambda prompt: _rank(seed, prompt))[:held_out])
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        sides[normalised_prompt(pair.prompt) in test].append(pair)
    return sides


def limit_pairs(pairs: Sequence[Pair], limit: int, *, seed: int) -> list[Pair]:
    """Return `limit` pairs in the given order (all, where there are fewer), drawn by a hash of seed and id.

    Never the first ones: files are often sorted. Raises `SettingError` for `limit < 1`.
    """
    if limit < 1:
        raise SettingError(f"limit: got {limit}; at least 1 pair is needed")
    ranks = sorted(range(len(pairs)), key=lambda index: _rank(seed, pairs[index].id))
    return [pairs[index] for index in sorted(ranks[:limit])]


def _rank(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}|{text}".encode()).digest()
