"""Pairs to micro-batches: packed rows with a shared prompt, or padded rows, of a limited number of tokens each.

`PackedLayout` describes where each token of a packed row belongs, `MicroBatch` is the input of a forward pass,
`PairCollator` splits a batch into micro-batches, and `collate_pairs` makes one of them from pairs.

Axes: P pairs; N = 2P completions, the P chosen ones first; T tokens of a row; M completion tokens; K keys of attention.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bfpo.core.errors import DataError, SettingError
from bfpo.data.store import text_lengths
from bfpo.data.streams import PairItem
from bfpo.data.tokenize import TokenPair

__all__ = [
    "CHOSEN",
    "PROMPT",
    "REJECTED",
    "Form",
    "MicroBatch",
    "PackedLayout",
    "PairCollator",
    "collate_pairs",
    "deal",
    "longest_text",
    "on_device",
    "pair_sizes",
    "split_by_tokens",
]

Made = TypeVar("Made")
PROMPT, CHOSEN, REJECTED = range(3)


class Segment(NamedTuple):
    """One pair of a packed row: its start and the tokens of prompt, chosen and rejected completion."""

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

    Queries are in the order of the row: `[prompt|chosen]` of a pair, then its rejected tokens. `keys` (K,) int64
    gathers the keys: `[prompt|chosen]`, then `[prompt|rejected]`. The causal mask of each problem is aligned at its
    last query and last key. `query_starts`, `key_starts` (2P + 1,) int32; `longest_query`, `longest_key` in tokens.
    """

    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int


class TokenRoles(NamedTuple):
    """For each token of the row, (T,) int64 each: its pair, its part (`PROMPT`, `CHOSEN`, `REJECTED`), its position."""

    pair: Tensor
    part: Tensor
    position: Tensor


@dataclass(eq=False)
class PackedLayout:
    """Pairs in one row, `[prompt|chosen|rejected]` one after the other; `lengths` are their tokens.

    The positions of rejected tokens continue from the prompt, and they do not see chosen tokens. Index tensors are made
    once for each device and kept, but not pickled. `windows`: the sliding windows that attention layers have used,
    `None` for a layer that sees everything. `by_segment`: torch's own attention on every device.
    """

    lengths: Sequence[tuple[int, int, int]]
    windows: set[int | None] = field(default_factory=set, repr=False)
    by_segment: bool = False
    _made: dict[tuple[str, torch.device], Any] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"lengths": self.lengths, "windows": set(), "by_segment": self.by_segment, "_made": {}}

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
        num_queries, num_keys = [], []  # of each of the 2P problems
        for segment in self:
            before = np.arange(segment.start, segment.rejected_start)
            after = np.arange(segment.rejected_start, segment.stop)
            keys.append(before)
            num_queries.append(len(before))
            num_keys.append(len(before))
            if len(after):  # an unpaired answer has no second problem
                keys += [before[: segment.num_prompt], after]
                num_queries.append(len(after))
                num_keys.append(segment.num_prompt + len(after))
        return VarlenIndex(
            keys=torch.from_numpy(np.concatenate(keys)).to(device),
            query_starts=torch.tensor(np.cumsum([0, *num_queries]), dtype=torch.int32, device=device),
            key_starts=torch.tensor(np.cumsum([0, *num_keys]), dtype=torch.int32, device=device),
            longest_query=max(num_queries),
            longest_key=max(num_keys),
        )

    def _roles(self, device: torch.device) -> TokenRoles:
        sizes_P3 = torch.tensor(self.lengths)
        pair_T = torch.arange(len(sizes_P3)).repeat_interleave(sizes_P3.sum(dim=1))
        part_T = torch.tensor([PROMPT, CHOSEN, REJECTED]).repeat(len(sizes_P3)).repeat_interleave(sizes_P3.flatten())
        return TokenRoles(pair_T.to(device), part_T.to(device), self.positions().to(device))


Form = Literal["packed", "padded"]
MicroBatch = dict[str, Any]
"""One forward pass over P pairs; N = 2P completions, chosen p at index p, rejected p at index P + p.

`input_ids`: (1, T) packed or (N, T) padded, int64. `position_ids` (1, T) and `layout` (a `PackedLayout`): packed only.
`source`, `targets`, `sequence`: (M,) int64, one entry for each completion token, the end token included: the place in
the flattened `input_ids` whose hidden state predicts it, the token, the completion it belongs to.
`chosen_is_safe`, `rejected_is_safe` (P,) float64; `is_buffer` (P,) bool; `pair_index` (P,) int64, the position in its
stream; `place` (P,) int64, the position among the pairs of the whole batch; `ref_logps` (N,) float64 where known.
"""

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Collate items into one batch of a `Trainer`: all main pairs, then all buffer pairs, cut into micro-batches.

    Returned: `pair_index` (P,) int64 of the whole batch, and `microbatches`, a list of `MicroBatch`. `form`: "packed"
    rows hold `[prompt|chosen|rejected]` of each pair, so a prompt goes through the model once; "padded" ones hold a row
    for each completion. `max_tokens` bounds the tokens of a micro-batch, padding counted; a longer pair gets a
    micro-batch of its own. `max_pairs` bounds its pairs. `None`: no bound.

    Raises `DataError` if only some items hold a buffer pair or reference log-probs, and for a pair with an empty prompt
    or completion.
    """

    pad_token_id: int
    form: Form = "packed"
    max_tokens: int | None = None
    max_pairs: int | None = None

    def __post_init__(self) -> None:
        if self.pad_token_id < 0:
            raise SettingError(f"pad_token_id: got {self.pad_token_id}; a token id of at least 0 is needed")
        if self.form not in ("packed", "padded"):
            raise SettingError(f"form: got {self.form!r}; allowed: 'packed', 'padded'")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise SettingError(f"max_tokens: got {self.max_tokens}; at least 1 token is needed")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise SettingError(f"max_pairs: got {self.max_pairs}; at least 1 pair is needed")

    def __call__(self, items: Sequence[PairItem]) -> dict[str, Any]:
        """Return the batch on the CPU."""
        if not items:
            raise DataError("an empty batch cannot be collated")
        buffer = [item.buffer for item in items if item.buffer is not None]
        if len(buffer) not in (0, len(items)):
            raise DataError(f"{len(buffer)} of {len(items)} items hold a buffer pair; all or none must")
        pairs = [*(item.main for item in items), *buffer]
        indices = [item.main_index for item in items]
        indices += [item.buffer_index for item in items] if buffer else []
        return {
            "pair_index": torch.tensor(indices, dtype=torch.int64),
            "microbatches": self.microbatches(pairs, indices, len(items)),
        }

    def microbatches(self, pairs: Sequence[TokenPair], indices: Sequence[int], num_main: int) -> list[MicroBatch]:
        """Return the micro-batches of pairs, `num_main` main ones first; `indices` are their positions in streams."""
        _check_reference(pairs)
        bounds = {"max_tokens": self.max_tokens, "max_pairs": self.max_pairs}
        groups = split_by_tokens([_lengths(pair) for pair in pairs], form=self.form, **bounds)
        return [self._microbatch(pairs, indices, num_main, group) for group in groups]

    def _microbatch(
        self, pairs: Sequence[TokenPair], indices: Sequence[int], num_main: int, places: Sequence[int]
    ) -> MicroBatch:
        batch = collate_pairs([pairs[place] for place in places], pad_token_id=self.pad_token_id, form=self.form)
        batch["pair_index"] = torch.tensor([indices[place] for place in places], dtype=torch.int64)
        batch["is_buffer"] = torch.tensor([place >= num_main for place in places])
        batch["place"] = torch.tensor(places, dtype=torch.int64)
        return batch


def split_by_tokens(
    lengths: Sequence[tuple[int, int, int]], *, form: Form, max_tokens: int | None, max_pairs: int | None = None
) -> list[list[int]]:
    """Return the indices of the pairs of each micro-batch; `lengths` are tokens of prompt, chosen and rejected.

    The longest pairs come first. Packed rows are filled by first fit; padded ones hold neighbours in length, so that
    they carry little padding. `None`: no bound.
    """
    if max_tokens is None and (max_pairs is None or len(lengths) <= max_pairs):
        return [list(range(len(lengths)))]
    packed = form == "packed"
    sizes: list[int] = pair_sizes(np.array(lengths).reshape(-1, 3), form=form).tolist()
    largest = max_tokens if max_tokens is not None else 2 * len(lengths) * max(sizes)
    order = sorted(range(len(lengths)), key=lambda place: -sizes[place])
    groups: list[list[int]] = []
    room: list[int] = []  # packed: tokens, padded: rows
    for place in order:
        needs = sizes[place] if packed else 1 + (lengths[place][2] > 0)
        fits = range(len(groups)) if packed else range(max(0, len(groups) - 1), len(groups))
        open_ = (k for k in fits if room[k] >= needs and (max_pairs is None or len(groups[k]) < max_pairs))
        k = next(open_, len(groups))
        if k == len(groups):
            groups.append([])
            # The first pair of a padded group is its longest and sets the width, so how many rows it takes.
            room.append(largest if packed else largest // sizes[place])
        groups[k].append(place)
        room[k] -= needs  # below 0 for a pair that is longer by itself
    return [sorted(group) for group in groups]


def pair_sizes(lengths: npt.NDArray[Any], *, form: Form) -> npt.NDArray[Any]:
    """Return the tokens of (P, 3) pairs, (P,): packed, of the whole pair; padded, of each of its two rows."""
    completions = lengths[:, 1:].sum(axis=1) if form == "packed" else lengths[:, 1:].max(axis=1)
    sizes: npt.NDArray[Any] = lengths[:, 0] + completions
    return sizes


def deal(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Return the places of each share: the largest first, each to the share that has the least so far.

    The largest share is at most 4/3 - 1/(3 `num_shares`) times that of the best division (R. L. Graham, "Bounds on
    multiprocessing timing anomalies", 1969). The same sizes give the same shares in every process.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [(0, share) for share in range(num_shares)]
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        load, share = loads[0]
        heapq.heapreplace(loads, (load + sizes[place], share))
        shares[share].append(place)
    return [sorted(share) for share in shares]


def collate_pairs(pairs: Sequence[TokenPair], *, pad_token_id: int = 0, form: Form = "packed") -> MicroBatch:
    """Return P pairs as one `MicroBatch` without the fields about streams.

    Two pairs `(prompt a b, chosen x, rejected y z)` and `(prompt c, chosen u, rejected v)` are, packed and padded,
    ```
    a b x y z c u v        a b x 0
    0 1 2 2 3 0 1 1        c u 0 0
    (positions)            a b y z
                           c v 0 0
    ```

    An unpaired answer, a pair without a rejected token, has no rejected row; its log-prob is 0.

    Raises `DataError` for a pair with an empty prompt or chosen completion, with its id: nothing would predict its
    first token.
    """
    for pair in pairs:
        if not (len(pair.prompt_ids) and len(pair.chosen_ids)):
            raise DataError(
                f"pair {pair.pair_id}: has {' and '.join(_empty_parts(pair))} without a token; a prompt needs at least "
                "one to predict from (such as a beginning-of-sequence token), a completion at least one to predict"
            )
    batch = _packed(pairs) if form == "packed" else _padded(pairs, pad_token_id)
    batch["chosen_is_safe"] = torch.tensor([pair.chosen_is_safe for pair in pairs], dtype=torch.float64)
    batch["rejected_is_safe"] = torch.tensor([pair.rejected_is_safe for pair in pairs], dtype=torch.float64)
    values = [pair.ref_chosen_logps for pair in pairs] + [pair.ref_rejected_logps for pair in pairs]
    if all(value is not None for value in values):
        batch["ref_logps"] = torch.tensor(values, dtype=torch.float64)
    return batch


def on_device(batch: Mapping[str, Any], device: torch.device) -> MicroBatch:
    """Return the micro-batch with its tensors on the device; the layout makes its own tensors there."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def longest_text(pairs: Sequence[TokenPair]) -> int:
    """Return the tokens of the longest prompt with one completion."""
    return int(text_lengths(pairs).max())


def _lengths(pair: TokenPair) -> tuple[int, int, int]:
    return len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)


def _empty_parts(pair: TokenPair) -> list[str]:
    parts = zip(("a prompt", "a chosen completion", "a rejected completion"), _lengths(pair), strict=True)
    return [name for name, length in parts if length == 0]


def _packed(pairs: Sequence[TokenPair]) -> MicroBatch:
    layout = PackedLayout([_lengths(pair) for pair in pairs])
    ids: list[Ids] = []
    sources: list[npt.NDArray[np.signedinteger[Any]]] = []
    targets, sequences = [], []
    for p, (pair, segment) in enumerate(zip(pairs, layout, strict=True)):
        ids += [pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]
        # A token is predicted by the one before it in its text. Before the first rejected token that is the last one of
        # the prompt, not the last chosen one, which precedes it in the row.
        last = segment.start + segment.num_prompt - 1
        sources.append(np.arange(last, segment.rejected_start - 1))
        rejected = np.concatenate([[last], np.arange(segment.rejected_start, segment.stop - 1)])
        sources.append(rejected[: segment.num_rejected])
        targets += [pair.chosen_ids, pair.rejected_ids]
        sequences += [np.full(segment.num_chosen, p), np.full(segment.num_rejected, len(pairs) + p)]
    return {
        "input_ids": _int64(ids)[None],
        "position_ids": layout.positions()[None],
        "layout": layout,
        **_places(sources, targets, sequences),
    }


def _padded(pairs: Sequence[TokenPair], pad_token_id: int) -> MicroBatch:
    rows = [(p, pair.prompt_ids, pair.chosen_ids) for p, pair in enumerate(pairs)]
    rows += [
        (p, pair.prompt_ids, pair.rejected_ids) for p, pair in enumerate(pairs, len(pairs)) if len(pair.rejected_ids)
    ]
    width = max(len(prompt) + len(completion) for _, prompt, completion in rows)
    input_ids = np.full((len(rows), width), pad_token_id, np.int64)
    sources: list[npt.NDArray[np.signedinteger[Any]]] = []
    targets, sequences = [], []
    for n, (sequence, prompt, completion) in enumerate(rows):
        start, stop = len(prompt), len(prompt) + len(completion)
        input_ids[n, :start] = prompt
        input_ids[n, start:stop] = completion
        sources.append(np.arange(n * width + start - 1, n * width + stop - 1))
        targets.append(completion)
        sequences.append(np.full(len(completion), sequence))
    return {"input_ids": torch.from_numpy(input_ids), **_places(sources, targets, sequences)}


def _places(sources: Sequence[Any], targets: Sequence[Any], sequences: Sequence[Any]) -> dict[str, Tensor]:
    return {"source": _int64(sources), "targets": _int64(targets), "sequence": _int64(sequences)}


def _int64(parts: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _check_reference(pairs: Sequence[TokenPair]) -> None:
    lacking = [pair.ref_chosen_logps is None or pair.ref_rejected_logps is None for pair in pairs]
    if any(lacking) and not all(lacking):
        name = pairs[lacking.index(True)].pair_id
        raise DataError(
            f"pair {name}: has no reference log-probs, but others of the batch have; precompute all streams"
        )
