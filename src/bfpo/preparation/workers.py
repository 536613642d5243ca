"""Processes that read blocks of rows; results come in the order of the blocks, however many processes there are."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context
from types import TracebackType

from bfpo.core.errors import RunError
from bfpo.core.processes import end_with_parent
from bfpo.preparation.rows import Block, BlockReader, RawBlock

__all__ = ["Readers"]

_ALONE = 8  # blocks that are not worth starting processes for
_reader: BlockReader | None = None


class Readers:
    """Reads blocks in `processes` worker processes, or in this one if that is 1; a context manager.

    `make` makes the reader, once in each process: a function that can be sent to another process.
    """

    def __init__(self, make: Callable[[], BlockReader], processes: int) -> None:
        self._make = make
        self._processes = processes
        self._here: BlockReader | None = None
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Readers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, blocks: Iterable[RawBlock]) -> Iterator[Block]:
        """Yield what each block holds, in order; few blocks are in memory at a time.

        Raises `RunError` if a process has died.
        """
        stream = iter(blocks)
        first = list(islice(stream, _ALONE + 1 if self._pool is None else 0))
        if self._processes == 1 or (self._pool is None and len(first) <= _ALONE):
            self._here = self._here or self._make()
            yield from map(self._here, chain(first, stream))
            return
        try:
            yield from self._shared_out(chain(first, stream))
        except BrokenProcessPool as error:
            raise RunError(
                "a process that reads data has died, probably out of memory: set processes to fewer and continue with "
                "--resume (your own program must call this under `if __name__ == '__main__':`, or set processes to 1)"
            ) from error

    def _shared_out(self, blocks: Iterable[RawBlock]) -> Iterator[Block]:
        if self._pool is None:
            context = get_context("spawn")
            self._pool = ProcessPoolExecutor(self._processes, context, initializer=_begin, initargs=(self._make,))
        pending: deque[Future[Block]] = deque()
        for block in blocks:
            pending.append(self._pool.submit(_read, block))
            if len(pending) > 2 * self._processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _begin(make: Callable[[], BlockReader]) -> None:
    global _reader
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # MinHash and tokenizers: the processes share the cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process stops the others
    end_with_parent()
    _reader = make()


def _read(block: RawBlock) -> Block:
    assert _reader is not None
    return _reader(block)
