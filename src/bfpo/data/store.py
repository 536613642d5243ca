"""Token ids on disk: one Arrow file of pairs, written incrementally and read memory-mapped.

Functions below give lengths, labels and reference log-probs for pairs on disk or in a list.
"""

from __future__ import annotations

import copy
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from bfpo.core.errors import DataError, RunError
from bfpo.core.files import open_whole
from bfpo.data.tokenize import TokenPair

__all__ = [
    "LazyPairs",
    "TokenStore",
    "reference_logps",
    "safety_labels",
    "text_lengths",
    "token_lengths",
    "with_reference",
    "write_tokens",
]

Floats = npt.NDArray[np.float64]

_IDS, _LABELS = ("prompt_ids", "chosen_ids", "rejected_ids"), ("chosen_is_safe", "rejected_is_safe")
_FACTS, _PROMPTS = b"bfpo", b"bfpo-prompts"
_PAIRS_PER_BLOCK = 4096


@cache
def _schema() -> Any:
    """Return the columns of the file. pyarrow is imported where a file is: pairs in memory do not need it."""
    import pyarrow

    return pyarrow.schema(
        [
            ("pair_id", pyarrow.string()),
            *((name, pyarrow.list_(pyarrow.int32())) for name in _IDS),
            *((name, pyarrow.float64()) for name in _LABELS),
        ]
    )


def write_tokens(
    path: str | Path,
    pairs: Iterable[TokenPair],
    facts: Mapping[str, Any] | None = None,
    prompts: npt.NDArray[np.uint64] | None = None,
) -> TokenStore:
    """Write pairs incrementally, whole or not at all, and return the store; 4,096 pairs are in memory at a time.

    `facts` (JSON values) is read after the last pair, so it may be filled during the iteration; `TokenStore.facts`
    holds it, and `TokenStore.prompts` the hashes `prompts`, (H,). Reference log-probs are not written. Raises
    `RunError` if the file cannot be written, and whatever `pairs` raises.
    """
    import pyarrow

    path = Path(path)
    stream = iter(pairs)
    try:
        with open_whole(path) as file, pyarrow.ipc.new_file(file, _schema()) as writer:
            while block := list(islice(stream, _PAIRS_PER_BLOCK)):
                writer.write_batch(_block_of(block))
            # Facts known only at the end go with an empty last block: the schema was written at the start.
            last = {_FACTS: json.dumps(dict(facts or {})).encode()}
            last |= {} if prompts is None else {_PROMPTS: prompts.astype("<u8").tobytes()}
            writer.write_batch(_block_of([]), custom_metadata=last)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error}); check permissions and free space") from error
    return TokenStore(path)


def _block_of(pairs: Sequence[TokenPair]) -> Any:
    """Return a record batch; list columns are made from joined arrays, without a Python object per token."""
    import pyarrow

    columns: list[Any] = [pyarrow.array([pair.pair_id for pair in pairs], pyarrow.string())]
    for name in _IDS:
        ids = [getattr(pair, name) for pair in pairs]
        offsets = np.zeros(len(ids) + 1, np.int32)
        np.cumsum([len(one) for one in ids], out=offsets[1:])
        values = np.concatenate([*ids, np.zeros(0, np.int32)])
        columns.append(pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values, pyarrow.int32())))
    columns += [
        pyarrow.array(np.array([getattr(pair, name) for pair in pairs], np.float64), pyarrow.float64())
        for name in _LABELS
    ]
    return pyarrow.record_batch(columns, schema=_schema())


class LazyPairs(Sequence[TokenPair]):
    """Pairs that are made on access, by `_pair` of the place in [0, len)."""

    @abstractmethod
    def _pair(self, place: int) -> TokenPair: ...

    @overload
    def __getitem__(self, index: int) -> TokenPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenPair]: ...
    def __getitem__(self, index: int | slice) -> TokenPair | list[TokenPair]:
        if isinstance(index, slice):
            return [self._pair(place) for place in range(*index.indices(len(self)))]
        place = int(index)
        place += len(self) if place < 0 else 0
        if not 0 <= place < len(self):
            raise IndexError(f"index: got {index}; the store holds {len(self)} pairs")
        return self._pair(place)

    def __iter__(self) -> Iterator[TokenPair]:
        return map(self._pair, range(len(self)))


class TokenStore(LazyPairs):
    """The pairs of a file of `write_tokens`, each made on access; its ids are views of the mapped file.

    The vectors below take 28 bytes per pair, from first access; the pages of the file are managed by the system. A
    pickled copy opens the same file. Raises `DataError` for any other file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._reference: tuple[Floats, Floats] | None = None
        self._open()

    def _open(self) -> None:
        import pyarrow

        try:
            # The map stays open as long as views of it are alive.
            with pyarrow.ipc.open_file(pyarrow.memory_map(str(self.path))) as file:
                schema = file.schema
                blocks = [file.get_batch_with_custom_metadata(i) for i in range(file.num_record_batches)]
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError.at(self.path, None, f"cannot be read as a file of tokens: {error}") from error
        metadata = blocks[-1].custom_metadata if blocks else None
        if not schema.equals(_schema()) or metadata is None or _FACTS not in metadata:
            raise DataError.at(self.path, None, f"is not a file of tokens; its columns: {', '.join(schema.names)}")
        self.facts: dict[str, Any] = json.loads(metadata[_FACTS])
        hashes = metadata.get(_PROMPTS)
        self.prompts: npt.NDArray[np.uint64] | None = None if hashes is None else np.frombuffer(hashes, "<u8")
        self._blocks = [_Block.of(block.batch) for block in blocks[:-1]]
        self._ends = np.cumsum([len(block) for block in self._blocks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _pair(self, place: int) -> TokenPair:
        number = int(np.searchsorted(self._ends, place, side="right"))
        block = self._blocks[number]
        row = place - int(self._ends[number]) + len(block)
        prompt, chosen, rejected = (
            ids[bounds[row] : bounds[row + 1]] for ids, bounds in zip(block.ids, block.bounds, strict=True)
        )
        name = block.id_bytes[block.id_bounds[row] : block.id_bounds[row + 1]].tobytes().decode()
        reference = (None, None) if self._reference is None else (float(column[place]) for column in self._reference)
        labels = (float(column[row]) for column in block.labels)
        return TokenPair(name, prompt, chosen, rejected, *labels, *reference)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of prompt, chosen and rejected of each pair, (P, 3)."""
        lengths = np.empty((len(self), len(_IDS)), np.int32)
        for block, end in zip(self._blocks, self._ends, strict=True):
            lengths[end - len(block) : end] = np.stack([np.diff(bounds) for bounds in block.bounds], axis=1)
        return lengths

    @cached_property
    def labels(self) -> tuple[Floats, Floats]:
        """The safety labels of the chosen and the rejected completions, (P,) each."""
        chosen, rejected = (np.concatenate([*(block.labels[k] for block in self._blocks), []]) for k in (0, 1))
        return chosen, rejected

    @property
    def reference(self) -> tuple[Floats, Floats] | None:
        """The reference's summed log-probs of chosen and rejected, (P,) each in nats; `None` until given."""
        return self._reference

    def with_reference(self, chosen: npt.ArrayLike, rejected: npt.ArrayLike) -> TokenStore:
        """Return a view of the same file whose pairs have these reference log-probs, (P,) each in nats.

        Held as float64, 16 bytes per pair. Raises `DataError` for another number of them.
        """
        columns = np.array(chosen, np.float64), np.array(rejected, np.float64)
        for column in columns:
            if column.shape != (len(self),):
                raise DataError(f"reference log-probs: got shape {column.shape} for {len(self)} pairs")
        view = copy.copy(self)
        view._reference = columns
        return view

    def __copy__(self) -> TokenStore:
        view = TokenStore.__new__(TokenStore)
        view.__dict__.update(self.__dict__)
        return view

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_reference": self._reference, "num_pairs": len(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self._reference = state["path"], state["_reference"]
        self._open()
        if len(self) != state["num_pairs"]:
            raise DataError.at(
                self.path, None, f"holds {len(self)} pairs, but held {state['num_pairs']} when it was first opened"
            )


@dataclass(frozen=True, slots=True)
class _Block:
    """The columns of some pairs as views of the mapped file; `bounds` and `id_bounds` have one item more than pairs."""

    id_bytes: npt.NDArray[np.uint8]
    id_bounds: npt.NDArray[np.int32]
    ids: tuple[npt.NDArray[np.int32], ...]
    bounds: tuple[npt.NDArray[np.int32], ...]
    labels: tuple[Floats, ...]

    @classmethod
    def of(cls, batch: Any) -> _Block:
        names, *columns = batch.columns
        lists, labels = columns[: len(_IDS)], columns[len(_IDS) :]
        _, id_bounds, id_bytes = names.buffers()
        return cls(
            id_bytes=np.frombuffer(id_bytes or b"", np.uint8),
            id_bounds=np.frombuffer(id_bounds, np.int32)[: len(names) + 1],
            ids=tuple(column.values.to_numpy() for column in lists),
            bounds=tuple(column.offsets.to_numpy() for column in lists),
            labels=tuple(column.to_numpy() for column in labels),
        )

    def __len__(self) -> int:
        return len(self.labels[0])


# ----------------------------------------------------------------------------------- pairs in memory or on disk


def token_lengths(pairs: Sequence[TokenPair]) -> npt.NDArray[np.int32]:
    """Return the tokens of prompt, chosen and rejected of each pair, (P, 3)."""
    if isinstance(pairs, TokenStore):
        return pairs.lengths
    lengths = [(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    return np.array(lengths, np.int32).reshape(-1, 3)


def text_lengths(pairs: Sequence[TokenPair]) -> npt.NDArray[np.int32]:
    """Return the tokens of the prompt with the longer completion of each pair, (P,)."""
    lengths = token_lengths(pairs)
    longest: npt.NDArray[np.int32] = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    return longest


def safety_labels(pairs: Sequence[TokenPair]) -> tuple[Floats, Floats]:
    """Return the safety labels of the chosen and of the rejected completions, (P,) each."""
    if isinstance(pairs, TokenStore):
        return pairs.labels
    chosen, rejected = ([pair.chosen_is_safe for pair in pairs], [pair.rejected_is_safe for pair in pairs])
    return np.array(chosen, np.float64), np.array(rejected, np.float64)


def reference_logps(pairs: Sequence[TokenPair]) -> tuple[Floats, Floats] | None:
    """Return the reference's summed log-probs of chosen and rejected, (P,) each in nats; `None` if any is missing."""
    if isinstance(pairs, TokenStore):
        return pairs.reference
    chosen, rejected = [pair.ref_chosen_logps for pair in pairs], [pair.ref_rejected_logps for pair in pairs]
    if None in chosen or None in rejected:
        return None
    return np.array(chosen, np.float64), np.array(rejected, np.float64)


def with_reference(pairs: Sequence[TokenPair], chosen: npt.ArrayLike, rejected: npt.ArrayLike) -> Sequence[TokenPair]:
    """Return the pairs with these reference log-probs, (P,) each in nats: copies of a list, a view of a store.

    Raises `DataError` for another number of them.
    """
    if isinstance(pairs, TokenStore):
        return pairs.with_reference(chosen, rejected)
    columns = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    for column in columns:
        if column.shape != (len(pairs),):
            raise DataError(f"reference log-probs: got shape {column.shape} for {len(pairs)} pairs")
    return [
        replace(pair, ref_chosen_logps=first, ref_rejected_logps=second)
        for pair, first, second in zip(pairs, *(column.tolist() for column in columns), strict=True)
    ]
