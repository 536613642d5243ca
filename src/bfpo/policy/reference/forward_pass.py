"""The reference pass before training: rows in the cache are read, the others are computed once and stored."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from bfpo.core.errors import ModelError
from bfpo.core.progress import CountProgress
from bfpo.core.provenance import describe_versions
from bfpo.data.store import LazyPairs, token_lengths, with_reference
from bfpo.policy.logps import unwrap_causal_lm
from bfpo.policy.reference.cache import ReferenceCache, model_key, row_key
from bfpo.policy.reference.sources import own_logps

if TYPE_CHECKING:
    from bfpo.data.tokenize import TokenPair

__all__ = ["MAX_TOKENS", "ReferencePass", "ReferenceReport", "precompute", "token_batches"]

logger = logging.getLogger(__name__)

Collate = Callable[[Sequence["TokenPair"]], Mapping[str, Any]]
PairLogps = tuple[float, float]

ROWS_PER_SHARD = 1024  # what a killed pass loses at most, for each process
MAX_TOKENS = 8192  # of a batch, by default


@dataclass(frozen=True, slots=True)
class ReferenceReport:
    """What a reference pass found and did.

    `num_pairs` were requested, `num_rows` of them differ in their tokens; `num_reused` rows came from the cache,
    `num_computed` from the model in `seconds`, and `num_stored` of these are in the cache now. `cache` is the folder of
    this model's rows and `model_key` its name; both are `None` without a cache.
    """

    num_pairs: int
    num_rows: int
    num_reused: int
    num_computed: int
    num_stored: int
    seconds: float
    cache: str | None
    model_key: str | None

    def as_row(self) -> dict[str, Any]:
        """Return a flat dict, to be printed or written."""
        return asdict(self)


class ReferencePass:
    """Looks up the reference log-probs of several lists of pairs; `run` computes what is missing and attaches them.

    `model` as it is now, with its adapter off, is the reference. `cache` is the root folder of the cache, or `None`.
    Pairs of the same tokens, in one list or several, are one row. `mixed_precision` names the computation, as
    accelerate does; the caller runs `run` under that autocast. `read_only`: for `preview` alone, which leaves a damaged
    cache as it is. With several processes the first one reads and writes the cache, so only its folder counts, and
    every process must call what the others call.
    """

    def __init__(
        self,
        model: nn.Module,
        pair_lists: Sequence[Sequence[TokenPair]],
        *,
        cache: str | Path | None = None,
        mixed_precision: str = "no",
        process_index: int = 0,
        num_processes: int = 1,
        read_only: bool = False,
    ) -> None:
        self._model = model
        self._read_only = read_only
        self._pair_lists = pair_lists
        self._process = (process_index, num_processes)
        self._is_first = process_index == 0
        self._rows, self._row_of = _distinct_rows(pair_lists)
        self._keys = self._rows.keys
        self._key: str | None = None
        self._cache = self._open(cache, mixed_precision) if cache is not None and self._is_first else None
        values = np.full((len(self._keys), 2), np.nan) if self._cache is None else self._cache.find(self._keys)
        self._logps: npt.NDArray[np.float64] = self._from_first(values)
        self._num_reused = len(self._rows) - self.num_missing()
        self._num_stored = 0

    def _open(self, cache: str | Path, mixed_precision: str) -> ReferenceCache | None:
        try:
            self._key = model_key(self._model, mixed_precision=mixed_precision)
        except ModelError as error:
            logger.info("reference: computed without the cache: %s", error)
            return None
        facts = {**_describe_model(self._model), "mixed_precision": mixed_precision, "versions": describe_versions()}
        return ReferenceCache(cache, self._key, facts, read_only=self._read_only)

    def _from_first(self, value: Any) -> Any:
        if self._process[1] == 1:
            return value
        return broadcast_object_list([value])[0]

    def num_missing(self, lists: Iterable[int] | None = None) -> int:
        """Return how many rows must be computed for these of the lists, all of them by default."""
        chosen = self._row_of if lists is None else [self._row_of[i] for i in lists]
        rows = np.unique(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
        return int(np.isnan(self._logps[rows, 0]).sum())

    def run(
        self,
        *,
        collate: Collate,
        max_tokens: int = MAX_TOKENS,
        rows_per_shard: int = ROWS_PER_SHARD,
        together: bool = False,
    ) -> tuple[list[Sequence[TokenPair]], ReferenceReport]:
        """Return the lists with `ref_chosen_logps` and `ref_rejected_logps` set, and what was done.

        A shard is written every `rows_per_shard` rows, and when the pass is stopped or fails, so that the next one
        continues from there. A cache that cannot be written gives a warning, and the pass continues. `together`: the
        model is sharded, so every process takes as many batches as the others. Raises as `precompute` does.
        """
        num_missing = self.num_missing()
        if self._is_first:
            found = f", {self._num_reused} of them in {self._cache.folder}" if self._cache else ""
            logger.info("reference: %d rows%s, %d to compute", len(self._rows), found, num_missing)
        started = time.monotonic()
        if num_missing:
            self._compute(collate, max_tokens, rows_per_shard, together=together)
        seconds = time.monotonic() - started
        if self._is_first and num_missing:
            logger.info("reference: %d rows computed in %.0f s", num_missing, seconds)
        done = [
            with_reference(pairs, *self._logps[rows].T)
            for pairs, rows in zip(self._pair_lists, self._row_of, strict=True)
        ]
        return done, self._report(num_missing, seconds)

    def preview(self) -> ReferenceReport:
        """Return the report that `run` would give; nothing is computed."""
        return self._report(self.num_missing(), 0.0)

    def _report(self, num_computed: int, seconds: float) -> ReferenceReport:
        return ReferenceReport(
            num_pairs=sum(map(len, self._pair_lists)),
            num_rows=len(self._rows),
            num_reused=self._num_reused,
            num_computed=num_computed,
            num_stored=self._num_stored,
            seconds=round(seconds, 3),
            cache=str(self._cache.folder) if self._cache else None,
            model_key=self._key,
        )

    def _compute(self, collate: Collate, max_tokens: int, rows_per_shard: int, *, together: bool) -> None:
        missing = np.flatnonzero(np.isnan(self._logps[:, 0])).tolist()
        rank, num_processes = self._process
        batches = token_batches(self._rows, missing, max_tokens=max_tokens, num_processes=num_processes)
        with CountProgress("reference", len(missing), logger, shown=self._is_first) as progress:
            for group in _rounds(batches, rows_per_shard, num_processes):
                found: dict[int, PairLogps] = {}
                own = group[rank::num_processes]
                # Sharded weights are gathered by all processes at once: one without a batch repeats the cheapest.
                idle = math.ceil(len(group) / num_processes) - len(own) if together else 0
                try:
                    asked = [*own, *[group[-1][-1:]] * idle]
                    for place, part in enumerate(precompute(self._model, self._rows, asked, collate=collate)):
                        if place < len(own):
                            found.update(part)
                            progress.advance(len(part) * num_processes)
                    if num_processes > 1:
                        found = dict(gather_object(list(found.items())))
                finally:  # keep computed rows even on failure
                    self._keep(found)

    def _keep(self, found: Mapping[int, PairLogps]) -> None:
        rows = list(found)
        if not rows:
            return
        self._logps[rows] = list(found.values())
        if self._cache is None:
            return
        try:
            self._cache.write([self._keys[row] for row in rows], self._logps[rows])
            self._num_stored += len(rows)
        except OSError as error:
            logger.warning("reference cache: %d rows cannot be stored in %s (%s)", len(rows), self._cache.folder, error)


def _describe_model(model: nn.Module) -> dict[str, Any]:
    """Return a description of a shard's model for people."""
    base: Any = unwrap_causal_lm(model)
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in base.parameters()})
    return {
        "model": getattr(getattr(base, "config", None), "_name_or_path", "") or None,
        "class": type(base).__name__,
        "dtype": ", ".join(dtypes),
    }


# The rows of a pass


def _distinct_rows(pair_lists: Sequence[Sequence[TokenPair]]) -> tuple[_Rows, list[npt.NDArray[np.int64]]]:
    """Return the rows that differ in their tokens, and for each list the row of each of its pairs."""
    rows: dict[bytes, int] = {}
    places: list[npt.NDArray[np.int64]] = []
    row_of: list[npt.NDArray[np.int64]] = []
    for number, pairs in enumerate(pair_lists):
        here, first = np.empty(len(pairs), np.int64), []
        for position, pair in enumerate(pairs):
            key = row_key(pair)
            if key not in rows:
                rows[key] = len(rows)
                first.append(position)
            here[position] = rows[key]
        row_of.append(here)
        places.append(np.stack([np.full(len(first), number), np.array(first, np.int64)], axis=1))
    return _Rows(pair_lists, list(rows), np.concatenate(places)), row_of


class _Rows(LazyPairs):
    """The distinct rows of several lists by their place there, so that pairs on disk stay on disk."""

    def __init__(self, pair_lists: Sequence[Sequence[TokenPair]], keys: list[bytes], places: npt.NDArray[np.int64]):
        self._pair_lists = pair_lists
        self.keys = keys
        self._places = places  # (rows, 2): the list, the position in it

    def __len__(self) -> int:
        return len(self.keys)

    def _pair(self, place: int) -> TokenPair:
        number, position = map(int, self._places[place])
        return self._pair_lists[number][position]


# Batches, and the log-probs of each


def token_batches(
    pairs: Sequence[TokenPair], indices: Iterable[int], *, max_tokens: int, num_processes: int = 1
) -> list[list[int]]:
    """Return the indices in batches of at most `max_tokens` tokens (prompt + chosen + rejected), but at least one pair.

    Longest first: a batch has little padding, and one that does not fit into memory fails at the start. Without the
    first batches the others stay as they are, so a pass that continues gives the same numbers. There are at least as
    many batches as processes if there are enough pairs.
    """
    num_tokens_of = token_lengths(pairs).sum(axis=1)
    order = sorted(indices, key=lambda i: int(num_tokens_of[i]), reverse=True)
    most_pairs = math.ceil(len(order) / num_processes)
    batches: list[list[int]] = []
    room = 0
    for i in order:
        num_tokens = int(num_tokens_of[i])
        if not batches or num_tokens > room or len(batches[-1]) >= most_pairs:
            batches.append([])
            room = max_tokens
        batches[-1].append(i)
        room -= num_tokens
    return batches


def _rounds(batches: Sequence[list[int]], rows_per_shard: int, num_processes: int) -> Iterator[list[list[int]]]:
    """Yield the batches in groups that make a shard; each but the last has as many for every process."""
    group: list[list[int]] = []
    for batch in batches:
        group.append(batch)
        if len(group) % num_processes == 0 and sum(map(len, group)) >= rows_per_shard * num_processes:
            yield group
            group = []
    if group:
        yield group


def precompute(
    model: nn.Module, pairs: Sequence[TokenPair], batches: Iterable[Sequence[int]], *, collate: Collate
) -> Iterator[dict[int, PairLogps]]:
    """Yield the model's own summed log-probs, any adapter off, batch by batch: index -> (chosen, rejected), in nats.

    `batches` holds indices into `pairs`, as `token_batches` makes them. `collate` turns P pairs into the input of
    `sequence_logps`, on the model's device; its rows are the P chosen completions, then the rejected ones.

    Raises `ModelError` for a log-prob that is not finite, with the pair's id.
    """
    for indices in batches:
        some = [pairs[i] for i in indices]
        logps = own_logps(model, collate(some)).tolist()
        chosen, rejected = logps[: len(some)], logps[len(some) :]
        for pair, *values in zip(some, chosen, rejected, strict=True):
            _check_finite(pair, *values)
        yield dict(zip(indices, zip(chosen, rejected, strict=True), strict=True))


def _check_finite(pair: TokenPair, chosen: float, rejected: float) -> None:
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not math.isfinite(value):
            raise ModelError(
                f"pair {pair.pair_id}: the reference's log-prob of its {name} completion is {value}; check the model's "
                "weights, or compute in float32"
            )
