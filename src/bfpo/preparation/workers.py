"""Workers that read blocks of rows; results come in the order of the blocks, however many workers there are."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from types import TracebackType

from bfpo.execution.settings import ExecutorConfig
from bfpo.execution.workers import Workers, in_process
from bfpo.preparation.rows import Block, BlockReader, RawBlock

__all__ = ["Readers"]

_ALONE = 8  # blocks that are not worth starting workers for


class Readers:
    """Reads blocks in the workers of an executor, or in this process if that is one; a context manager.

    `make` makes the reader, once in each worker: a function that can be sent to another process.
    """

    def __init__(self, make: Callable[[], BlockReader], executor: ExecutorConfig) -> None:
        self._make, self._executor = make, executor
        self._collects = gc.isenabled()
        self._here: BlockReader | None = None
        self._workers: Workers[BlockReader] | None = None

    def __enter__(self) -> Readers:
        gc.disable()  # rows hold no cycles, and the collector would walk over all of them repeatedly
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._collects:
            gc.enable()
        if self._workers is not None:
            self._workers.__exit__(kind, error, trace)

    def map(self, blocks: Iterable[RawBlock]) -> Iterator[Block]:
        """Yield what each block holds, in order; few blocks are in memory at a time."""
        stream = iter(blocks)
        first = list(islice(stream, _ALONE + 1 if self._workers is None else 0))
        if in_process(self._executor, "core") or (self._workers is None and len(first) <= _ALONE):
            self._here = self._here or self._make()
            yield from map(self._here, chain(first, stream))
            return
        if self._workers is None:
            self._workers = Workers(self._executor, self._make, one_per="core", threads=1)
        yield from self._workers.in_order(chain(first, stream), _read, title=lambda block: "a block of rows")


def _read(reader: BlockReader, block: RawBlock) -> Block:
    return reader(block)
