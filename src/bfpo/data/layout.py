"""Where pairs lie in a packed row, and the index tensors that attention kernels read it by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["CHOSEN", "PROMPT", "REJECTED", "PackedLayout", "Segment", "TokenRoles", "VarlenIndex"]

Made = TypeVar("Made")
PROMPT, CHOSEN, REJECTED = range(3)


class Segment(NamedTuple):
    """One pair of a packed row: its first place and the tokens of prompt, chosen and rejected completion."""

    start: int
    num_prompt: int
    num_chosen: int
    num_rejected: int

    @property
    def rejected_start(self) -> int:
        """The place of the first rejected token."""
        return self.start + self.num_prompt + self.num_chosen

    @property
    def stop(self) -> int:
        """The place after the last token of the pair."""
        return self.rejected_start + self.num_rejected


class VarlenIndex(NamedTuple):
    """The row as 2P attention problems of different length, in the form of variable-length kernels.

    Queries lie in the row's own order: `[prompt|chosen]` of a pair, then its rejected tokens. `keys` (K,) int64 gathers
    the keys: `[prompt|chosen]`, then `[prompt|rejected]`. The causal mask of each problem is aligned at its last query
    and last key. `query_starts`, `key_starts` (2P + 1,) int32; `longest_query`, `longest_key` in tokens.
    """

    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int


class TokenRoles(NamedTuple):
    """Of each token of the row, (T,) int64 each: its pair, its part (`PROMPT`, `CHOSEN`, `REJECTED`), its position."""

    pair: Tensor
    part: Tensor
    position: Tensor


@dataclass(eq=False)
class PackedLayout:
    """Pairs in one row, `[prompt|chosen|rejected]` one after the other; `lengths` are their tokens.

    The positions of rejected tokens go on from the prompt, and they do not see chosen tokens. Index tensors are made
    once for each device and kept; a pickled layout leaves them behind. `windows`: the sliding windows that attention
    layers have asked for, `None` for one that sees everything.
    """

    lengths: Sequence[tuple[int, int, int]]
    windows: set[int | None] = field(default_factory=set, repr=False)
    _made: dict[tuple[str, torch.device], Any] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"lengths": self.lengths, "windows": set(), "_made": {}}

    def __iter__(self) -> Iterator[Segment]:
        start = 0
        for prompt, chosen, rejected in self.lengths:
            yield Segment(start, prompt, chosen, rejected)
            start += prompt + chosen + rejected

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return sum(map(sum, self.lengths))

    @property
    def longest_text(self) -> int:
        """Tokens of the longest prompt with one completion."""
        return max(prompt + max(chosen, rejected) for prompt, chosen, rejected in self.lengths)

    def positions(self) -> Tensor:
        """Return the position of each token in its text, (T,) int64."""
        return torch.from_numpy(
            np.concatenate(
                [
                    np.concatenate([np.arange(prompt + chosen), np.arange(prompt, prompt + rejected)])
                    for prompt, chosen, rejected in self.lengths
                ]
            )
        )

    def varlen(self, device: torch.device) -> VarlenIndex:
        """Return the row as problems of different length, on the device."""
        return self.keep("varlen", device, lambda: self._varlen(device))

    def roles(self, device: torch.device) -> TokenRoles:
        """Return what each token is, on the device."""
        return self.keep("roles", device, lambda: self._roles(device))

    def keep(self, name: str, device: torch.device, make: Callable[[], Made]) -> Made:
        """Return what `make()` gave for this name and device at the first call."""
        key = (name, device)
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def _varlen(self, device: torch.device) -> VarlenIndex:
        keys: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        queries, lengths = [], []
        for segment in self:
            before = np.arange(segment.start, segment.rejected_start)
            after = np.arange(segment.rejected_start, segment.stop)
            keys += [before, before[: segment.num_prompt], after]
            queries += [len(before), len(after)]
            lengths += [len(before), segment.num_prompt + len(after)]
        return VarlenIndex(
            keys=torch.from_numpy(np.concatenate(keys)).to(device),
            query_starts=torch.tensor(np.cumsum([0, *queries]), dtype=torch.int32, device=device),
            key_starts=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device),
            longest_query=max(queries),
            longest_key=max(lengths),
        )

    def _roles(self, device: torch.device) -> TokenRoles:
        sizes = torch.tensor(self.lengths)  # (P, 3)
        pair = torch.arange(len(sizes)).repeat_interleave(sizes.sum(dim=1))
        part = torch.tensor([PROMPT, CHOSEN, REJECTED]).repeat(len(sizes)).repeat_interleave(sizes.flatten())
        return TokenRoles(pair.to(device), part.to(device), self.positions().to(device))
