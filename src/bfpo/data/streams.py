"""Two streams as one data set: item i is main pair i with the buffer pair of its position in the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bfpo.core.errors import DataError, SettingError
from bfpo.data.tokenize import TokenPair

__all__ = ["PairItem", "TwoStreamDataset", "buffer_order"]


@dataclass(frozen=True, slots=True)
class PairItem:
    """A main pair and, where there is a buffer, a buffer pair, each with its position in its stream."""

    main: TokenPair
    main_index: int
    buffer: TokenPair | None = None
    buffer_index: int = -1


def buffer_order(*, num_main: int, num_buffer: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return which buffer pair goes with each main pair of an epoch, `(num_main,)`.

    Position `epoch * num_main + i` of the run counts through shuffled cycles of the buffer, so every buffer pair is
    used once per cycle, also across epochs, and an exhausted buffer restarts, shuffled again.
    """
    start, stop = epoch * num_main, (epoch + 1) * num_main
    cycles = range(start // num_buffer, (stop - 1) // num_buffer + 1)
    order = np.concatenate([np.random.default_rng((seed, cycle)).permutation(num_buffer) for cycle in cycles])
    first = start - cycles.start * num_buffer
    return order[first : first + num_main].astype(np.int64)


class TwoStreamDataset(Dataset[PairItem]):
    """Main pairs with an optional buffer; the epoch is the only state.

    The buffer pair of an item depends on `(seed, epoch, index)` alone, so the trainer's sampler provides shuffling,
    sharding and exact resume. `set_epoch` must be called before an epoch's first item, by a trainer callback at the
    beginning of the epoch: accelerate forwards the epoch to a data set only while the sampler is not wrapped for
    several processes or for skipping batches on resume. The epoch is in shared memory, so that loader processes that
    outlive an epoch see it too.

    Raises `DataError` for a stream without pairs, `SettingError` for a negative seed or epoch.
    """

    def __init__(self, main: Sequence[TokenPair], buffer: Sequence[TokenPair] | None = None, *, seed: int = 0) -> None:
        if len(main) == 0:
            raise DataError("the main stream holds no pair; at least one is needed")
        if buffer is not None and len(buffer) == 0:
            raise DataError("the buffer holds no pair; leave it out or give it at least one")
        if seed < 0:
            raise SettingError(f"seed: got {seed}; a whole number of at least 0 is needed")
        self._main = main
        self._buffer = buffer
        self._seed = seed
        self._epoch: Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    @property
    def epoch(self) -> int:
        """The epoch, from 0, whose buffer pairs items hold."""
        return int(self._epoch)

    @property
    def has_buffer(self) -> bool:
        """Whether items hold a buffer pair."""
        return self._buffer is not None

    def set_epoch(self, epoch: int) -> None:
        """Move to an epoch, counted from 0 from the start of the run. Raises `SettingError` for a negative one."""
        if epoch < 0:
            raise SettingError(f"epoch: got {epoch}; epochs count from 0")
        self._epoch.fill_(int(epoch))

    def __len__(self) -> int:
        return len(self._main)

    def __getitem__(self, index: int) -> PairItem:
        index = int(index)
        if not 0 <= index < len(self._main):
            raise IndexError(f"index: got {index}; the main stream holds {len(self._main)} pairs")
        if self._buffer is None:
            return PairItem(self._main[index], index)
        position = int(self.buffer_index()[index])
        return PairItem(self._main[index], index, self._buffer[position], position)

    def buffer_index(self) -> npt.NDArray[np.int64]:
        """Return the buffer pair of each main pair in this epoch, `(num_main,)`; empty without a buffer."""
        if self._buffer is None:
            return np.empty(0, np.int64)
        epoch = self.epoch
        if self._order is None or self._order[0] != epoch:
            order = buffer_order(num_main=len(self._main), num_buffer=len(self._buffer), seed=self._seed, epoch=epoch)
            self._order = (epoch, order)
        return self._order[1]
