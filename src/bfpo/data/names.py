"""Which names were seen, and where each came first, in a table of plain numbers."""

from __future__ import annotations

from array import array
from hashlib import blake2b

__all__ = ["SeenNames"]

_FIRST_SLOTS = 1 << 10


class SeenNames:
    """Names with a number each, kept as 64-bit hashes in an open-addressing table of 24 to 48 bytes a name.

    Two of ten million names share a hash with a probability of 3 in a million; the second then counts as seen.
    """

    def __init__(self) -> None:
        self._make_slots(_FIRST_SLOTS)
        self._num = 0

    def _make_slots(self, num: int) -> None:
        self._keys = array("Q", [0]) * num
        self._places = array("Q", [0]) * num
        self._mask = num - 1

    def place_of(self, name: str) -> int | None:
        """Return the number that `add` was given with the name, `None` where it was never added."""
        key = _key(name)
        slot = self._slot(key)
        return self._places[slot] if self._keys[slot] == key else None

    def add(self, name: str, place: int) -> None:
        """Add a name that was not seen; `place` lies in [0, 2^64)."""
        if 3 * self._num >= 2 * len(self._keys):
            self._grow()
        key = _key(name)
        slot = self._slot(key)
        self._keys[slot], self._places[slot] = key, place
        self._num += 1

    def _slot(self, key: int) -> int:
        """Return the slot that holds the key, or the free one where it belongs."""
        keys, mask = self._keys, self._mask
        slot = key & mask
        while keys[slot] and keys[slot] != key:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        keys, places = self._keys, self._places
        self._make_slots(2 * len(keys))
        for key, place in zip(keys, places, strict=True):
            if key:
                slot = self._slot(key)
                self._keys[slot], self._places[slot] = key, place


def _key(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1
