"""Decoding in slots: the slot of a finished answer goes to the next prompt, so that no row-step is wasted.

All rows end at one column of preallocated keys and values, as rows padded on the left do. To the model, a step is
therefore one of plain left-padded decoding, also with sliding windows, and nothing is copied from step to step. What
all prompts begin with, such as the system message of a chat template, is computed once. Axes: N rows, W columns, V
vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from bfpo.policy.batches import BATCH_TOKENS
from bfpo.policy.devices import free_bytes
from bfpo.policy.head import at_least_float32
from bfpo.policy.logps import unwrap_causal_lm

__all__ = ["Slots", "Work", "cache_name", "num_slots", "refilled", "shared_beginning", "why_not_refilled"]

_log = logging.getLogger(__name__)

_FEWEST_SAVED = 256  # tokens; to compute a shared beginning once is a pass, and its test on a model seven
_MOST_PADDING = {"cpu": 64}  # tokens of padding that cost what another pass does; elsewhere a pass costs far more
_SLACK = 64  # columns beyond the longest row: rows are moved back to the first column once in so many steps
_SLOTS = {"cpu": 32}  # a CPU is busy with these; more only take memory
_SLOTS_ELSEWHERE = 128
_SHARE_OF_MEMORY = 0.5  # of what is free
_BYTES_PER_LOGIT = 40  # float32 and float64 copies while a token is drawn
_RELATIVE_ERROR = {torch.float64: 1e-6, torch.float32: 1e-3}  # of logits, to their spread; rounding is below
_OF_HALF = 0.15
Item = TypeVar("Item")


@dataclass(slots=True)
class Work:
    """What was computed: tokens of prompts without padding, rows times steps, and the tokens that came of them."""

    prompt_tokens: int = 0
    padded_prompt_tokens: int = 0
    row_steps: int = 0
    passes: int = 0


@dataclass(slots=True)
class _Span:
    """The slots and the columns that a forward pass reads; it writes from `stop` on."""

    rows: slice
    start: int
    stop: int


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, columns, size of a head), of which `span` is read."""

    def __init__(self, span: _Span, num: int, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._span, self._shape = span, (num, capacity)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room; zeros, since masked columns must be finite."""
        num, capacity = self._shape
        self.keys, self.values = (
            one.new_zeros((num, one.shape[1], capacity, one.shape[3])) for one in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new columns and return all that the rows may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        rows, stop = self._span.rows, self._span.stop + key_states.shape[2]
        self.keys[rows, :, self._span.stop : stop] = key_states
        self.values[rows, :, self._span.stop : stop] = value_states
        return self.keys[rows, :, self._span.start : stop], self.values[rows, :, self._span.start : stop]

    def get_seq_length(self, *_: Any) -> int:
        """Return the number of columns before the new ones."""
        return self._span.stop - self._span.start

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return the columns that are looked at, and 0; early releases of transformers 5 give the new positions."""
        return self.get_seq_length() + (query_length if isinstance(query_length, int) else query_length.shape[0]), 0

    def get_max_length(self) -> int:
        """Return that there is no maximum: rows are moved before the columns run out."""
        return -1

    get_max_cache_shape = get_max_length


def cache_name(known: Container[str]) -> str:
    """Return how a forward pass with the arguments `known` calls keys and values, which transformers 5.24 renamed."""
    renamed = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if renamed and "past_key_values" not in known else "past_key_values"


class Slots:
    """The rows in work of a causal LM, at most `num`, each of at most `width` tokens; their logits are (N, V).

    Every prompt begins with the tokens `shared` and has at least one more.
    """

    def __init__(
        self, causal_lm: Any, num: int, width: int, work: Work | None = None, *, shared: tuple[int, ...] = ()
    ) -> None:
        self._model, self._capacity, self.work = causal_lm, width + _SLACK, work or Work()
        self._span = _Span(slice(0, 0), 0, 0)
        layers = causal_lm.config.get_text_config().num_hidden_layers
        self._layers = [_Layer(self._span, num, self._capacity) for _ in range(layers)]
        self._cache = Cache(layers=list(self._layers))
        self._lengths: list[int] = []  # tokens of each row in the cache
        self._stop = 0  # the column after the last one that is filled
        self.shared, self.most_padding = shared, _MOST_PADDING.get(causal_lm.device.type, BATCH_TOKENS)
        self._shared_states: list[Tensor] = []  # keys and values of `shared`, (1, heads, tokens, size of a head)
        known = inspect.signature(type(causal_lm).forward).parameters
        self._has_positions = "position_ids" in known
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._given_cache = {cache_name(known): self._cache}

    @torch.no_grad()
    def add(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Put prompts behind the rows and return the logits after them; equal ones are computed once."""
        if self.shared and not self._shared_states:
            self._compute_shared()
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        width, old, new, shared = max(map(len, places)), len(self._lengths), len(places), len(self.shared)
        if self._stop < width:
            self._move(width)
        device, own = self._model.device, width - shared  # columns of what the prompts have of their own
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt[shared:]) for prompt in places], device=device)
        empty = torch.tensor([[width - len(prompt)] for prompt in places], device=device)
        columns = torch.arange(own, device=device)
        mask = torch.cat([columns.new_ones(new, shared, dtype=torch.bool), columns >= empty], 1)
        self.work.prompt_tokens += sum(map(len, places)) - new * shared
        self.work.padded_prompt_tokens += ids.numel()
        begin, rows = self._stop - width, slice(old, old + new)
        for tensor, states in zip(self._tensors(), self._shared_states, strict=False):
            tensor[rows, :, begin : begin + shared] = states
        positions = (shared + columns - empty).clamp(min=0)
        logits = self._run(ids, mask, positions, _Span(rows, begin, begin + shared))
        # Shorter prompts have a gap between the shared keys and values and their own; they are written again behind it.
        # Keys hold the positions of their tokens, not those of their columns.
        index = torch.arange(old, old + new, device=device)[:, None]
        behind = begin + empty + torch.arange(shared, device=device)
        for tensor, states in zip(self._tensors(), self._shared_states, strict=False):
            tensor.transpose(1, 2)[index, behind] = states.transpose(1, 2)
        if new < len(prompts):
            index = torch.tensor([places[prompt] for prompt in prompts], device=device)
            for tensor in self._tensors():
                filled = tensor[:, :, begin : self._stop]
                filled[old : old + len(prompts)] = filled[rows][index]
            logits = logits[index]
        self._lengths += [len(prompt) for prompt in prompts]
        return logits

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row and return the logits after it."""
        longest = max(self._lengths)
        if self._stop == self._capacity:
            self._move(longest)
        lengths = torch.tensor(self._lengths, device=self._model.device)[:, None]
        start, num = self._stop - longest, len(tokens)
        mask = torch.arange(longest + 1, device=lengths.device) >= longest - lengths
        ids = torch.tensor(tokens, device=lengths.device)[:, None]
        logits = self._run(ids, mask, lengths, _Span(slice(0, num), start, self._stop))
        self._lengths = [length + 1 for length in self._lengths]
        self._stop += 1
        self.work.row_steps += num
        return logits

    def keep(self, kept: Sequence[int]) -> list[int]:
        """Drop the other rows; return the rows in their new order: the last ones take the places of dropped ones."""
        staying = set(kept)
        movers = [row for row in kept if row >= len(kept)]
        order = [row if row in staying else movers.pop() for row in range(len(kept))]
        moved = [place for place, row in enumerate(order) if place != row]
        if moved:
            start = self._stop - max(self._lengths)
            for tensor in self._tensors():
                columns = tensor[:, :, start : self._stop]
                columns[moved] = columns[[order[place] for place in moved]]
        self._lengths = [self._lengths[row] for row in order]
        return order

    def _compute_shared(self) -> None:
        """Compute the keys and values of `shared`, in the first row, which is not in use yet."""
        ids = torch.tensor([self.shared], device=self._model.device)
        self._run(
            ids, torch.ones_like(ids), torch.arange(ids.numel(), device=ids.device)[None], _Span(slice(0, 1), 0, 0)
        )
        self._shared_states = [tensor[:1, :, : ids.numel()].clone() for tensor in self._tensors()]
        self.work.prompt_tokens += ids.numel()
        self.work.padded_prompt_tokens += ids.numel()

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor, span: _Span) -> Tensor:
        self._span.rows, self._span.start, self._span.stop = span.rows, span.start, span.stop
        more = {"position_ids": positions} if self._has_positions else {}
        self.work.passes += 1
        output = self._model(
            input_ids=ids,
            attention_mask=mask.long(),
            use_cache=True,
            **more,
            **self._given_cache,
            **self._last_only,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _tensors(self) -> Iterator[Tensor]:
        """Yield keys and values of the layers; a layer that shares those of another has none."""
        for layer in self._layers:
            if layer.keys is not None and layer.values is not None:
                yield layer.keys
                yield layer.values

    def _move(self, stop: int) -> None:
        """Let all rows end before the column `stop`."""
        used, num = max(self._lengths, default=0), len(self._lengths)
        if num:
            for tensor in self._tensors():
                tensor[:num, :, stop - used : stop] = tensor[:num, :, self._stop - used : self._stop].clone()
        self._stop = stop


@dataclass(slots=True)
class _Row(Generic[Item]):
    item: Item
    ids: list[int]


def refilled(
    slots: Slots,
    prompts: Sequence[tuple[Item, tuple[int, ...]]],
    pick: Callable[[Tensor, Sequence[tuple[Item, int]]], list[int]],
    *,
    num: int,
    ends: frozenset[int],
    max_new_tokens: int,
) -> Iterator[list[tuple[Item, list[int], bool]]]:
    """Yield finished answers, by items: their tokens without the end token, and whether there was one.

    Prompts start in the order given, when an eighth of the `num` slots is free: a pass over a few prompts costs
    hardly less than one over more. `pick` gets logits (N, V) and, for each row, its item and the place of the token to
    choose.
    """
    waiting, rows = deque(prompts), list[_Row[Item]]()
    while waiting or rows:
        if waiting and (not rows or num - len(rows) >= max(1, num // 8)):
            taken = _take(waiting, num - len(rows), len(slots.shared), slots.most_padding)
            new = [_Row(item, []) for item, _ in taken]
            logits = slots.add([prompt for _, prompt in taken])
            rows += new
        else:
            new = rows
            logits = slots.step([row.ids[-1] for row in rows])
        tokens = pick(at_least_float32(logits), [(row.item, len(row.ids)) for row in new])
        for row, token in zip(new, tokens, strict=True):
            row.ids.append(token)
        done = [row.ids[-1] in ends or len(row.ids) == max_new_tokens for row in rows]
        if any(done):
            over = [row for row, is_done in zip(rows, done, strict=True) if is_done]
            order = slots.keep([place for place, is_done in enumerate(done) if not is_done])
            rows = [rows[place] for place in order]
            yield [_answer(row, ends) for row in over]


def _answer(row: _Row[Item], ends: frozenset[int]) -> tuple[Item, list[int], bool]:
    ended = row.ids[-1] in ends
    return row.item, row.ids[:-1] if ended else row.ids, ended


def _take(
    waiting: deque[tuple[Item, tuple[int, ...]]], most: int, shared: int, most_padding: int
) -> list[tuple[Item, tuple[int, ...]]]:
    """Take at most so many prompts, fewer where one pass over them has too many tokens beside the shared ones, or too
    much padding."""
    taken: list[tuple[Item, tuple[int, ...]]] = []
    distinct: dict[tuple[int, ...], int] = {}
    while waiting and len(taken) < most:
        distinct[waiting[0][1]] = len(waiting[0][1]) - shared
        padded = len(distinct) * max(distinct.values())
        if taken and (padded > BATCH_TOKENS or padded - sum(distinct.values()) > most_padding):
            break
        taken.append(waiting.popleft())
    return taken


def shared_beginning(model: Any, prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the tokens with which all prompts begin, without the last one of any; () where it saves nothing.

    Also () for a model with sliding windows, where the gap behind them would count, and for one that gives other logits
    with them.
    """
    first, last = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    num = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
    num = min(num, most)
    saved = num * (len(set(prompts)) - 1)
    return first[:num] if saved >= _FEWEST_SAVED and _shares(model) else ()


def num_slots(causal_lm: Any, width: int) -> int:
    """Return how many rows of so many tokens are worked on at once: by the kind of device and its free memory."""
    config = causal_lm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * size * causal_lm.dtype.itemsize
    per_row = (width + _SLACK) * per_token + _BYTES_PER_LOGIT * config.vocab_size
    device = causal_lm.device
    most = _SLOTS.get(device.type, _SLOTS_ELSEWHERE)
    free = free_bytes(device)
    return most if free is None else max(1, min(most, int(free * _SHARE_OF_MEMORY) // per_row))


# Which models can be asked this way

_reasons: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_sharing: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def why_not_refilled(model: Any) -> str:
    """Return why rows of this model cannot be refilled, "" if they can; tested once on the model itself, in evaluation
    mode, and logged."""
    if model not in _reasons:
        _reasons[model] = _reason(model)
        if _reasons[model]:
            _log.info("generation: slots of finished answers stay empty to the end of a batch: %s", _reasons[model])
    return _reasons[model]


def _shares(model: Any) -> bool:
    """Return whether a model that is refilled can compute the beginning of its prompts once; tested on the model."""
    if model not in _sharing:
        causal_lm = unwrap_causal_lm(model)
        layers = DynamicCache(config=causal_lm.config.get_text_config()).layers
        plain = all(type(layer) is DynamicLayer for layer in layers)
        try:
            _sharing[model] = plain and _error(model, causal_lm, (3, 5, 2)) <= _bound(causal_lm)
        except Exception:  # as in `_reason`, a model of another build may raise anything
            _sharing[model] = False
    return _sharing[model]


def _reason(model: Any) -> str:
    causal_lm = unwrap_causal_lm(model)
    name = type(causal_lm).__name__
    if type(causal_lm).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        return f"{name} prepares its inputs in a way of its own"
    config = causal_lm.config.get_text_config()
    try:
        layers = DynamicCache(config=config).layers
        kinds = {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}
        if kinds or "chunked_attention" in (getattr(config, "layer_types", None) or ()):
            return f"{name} keeps more than keys and values of its past tokens"
        error = _error(model, causal_lm)
    except Exception as failure:  # a model of another build may raise anything; plain decoding still serves it
        return f"{name} does not take keys and values in slots ({type(failure).__name__}: {failure})"
    return "" if error <= _bound(causal_lm) else f"{name} gives other logits in slots (by {error:.2g} of their spread)"


def _bound(causal_lm: Any) -> float:
    return _RELATIVE_ERROR.get(causal_lm.dtype, _OF_HALF)


@torch.no_grad()
def _error(model: Any, causal_lm: Any, shared: tuple[int, ...] = ()) -> float:
    """Return the largest difference of logits, in slots and of whole texts, relative to their spread.

    A text of five tokens is begun, two of three and four join it, the first one leaves; all begin with `shared`. The
    whole texts are one batch, padded on the right.
    """
    size = causal_lm.config.get_text_config().vocab_size
    starts = [
        (*shared, *(number * step % size for number in range(3, end))) for step, end in ((7, 8), (11, 6), (13, 7))
    ]
    slots = Slots(causal_lm, 3, len(shared) + 10, shared=shared)
    found = [slots.add(starts[:1]), slots.step([1]), slots.add(starts[1:]), slots.step([4, 1, 4])]
    slots.keep([1, 2])
    found.append(slots.step([2, 3]))
    texts = [(*start, *more) for start, more in zip(starts, ((1, 4), (1, 3), (4, 2)), strict=True)]
    read = [(0, 0), (0, 1), (1, 0), (2, 0), (0, 2), (1, 1), (2, 1), (2, 2), (1, 2)]  # text, tokens after its start
    rows, places = zip(*((row, len(starts[row]) - 1 + more) for row, more in read), strict=True)
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=causal_lm.device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=causal_lm.device)
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[list(rows), list(places)].double()
    spread = (whole - whole.mean(1, keepdim=True)).abs().amax(1).clamp(min=1e-30)
    return float(((torch.cat(found).double() - whole).abs().amax(1) / spread).max())  # NaN counts as the largest
