"""Decoding in slots: the slot of a finished answer goes to the next prompt, so that no row-step is wasted.

All rows end at one column of preallocated keys and values, as rows padded on the left do. To the model, a step is
therefore one of plain left-padded decoding, also with sliding windows, and nothing is copied from step to step. Axes: N
rows, W columns, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from bfpo.policy.batches import BATCH_TOKENS
from bfpo.policy.devices import find_devices
from bfpo.policy.head import at_least_float32
from bfpo.policy.logps import unwrap_causal_lm

__all__ = ["Slots", "Work", "num_slots", "refilled", "why_not_refilled"]

_log = logging.getLogger(__name__)

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


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
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


class Slots:
    """The rows in work of a causal LM, at most `num`, each of at most `width` tokens; their logits are (N, V)."""

    def __init__(self, causal_lm: Any, num: int, width: int, work: Work | None = None) -> None:
        self._model, self._capacity, self.work = causal_lm, width + _SLACK, work or Work()
        self._span = _Span(slice(0, 0), 0, 0)
        layers = causal_lm.config.get_text_config().num_hidden_layers
        self._layers = [_Layer(self._span, num, self._capacity) for _ in range(layers)]
        self._cache = Cache(layers=list(self._layers))
        self._lengths: list[int] = []  # tokens of each row in the cache
        self._stop = 0  # the column after the last one that is filled
        known = inspect.signature(type(causal_lm).forward).parameters
        self._has_positions = "position_ids" in known
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    @torch.no_grad()
    def add(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Put prompts behind the rows and return the logits after them; equal ones are computed once."""
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        width, old, new = max(map(len, places)), len(self._lengths), len(places)
        if self._stop < width:
            self._move(width)
        device = self._model.device
        ids = torch.tensor([[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in places], device=device)
        lengths = torch.tensor([len(prompt) for prompt in places], device=device)
        mask = torch.arange(width, device=device) >= width - lengths[:, None]
        self.work.prompt_tokens += sum(map(len, places))
        self.work.padded_prompt_tokens += ids.numel()
        begin = self._stop - width
        logits = self._run(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), _Span(slice(old, old + new), begin, begin))
        if new < len(prompts):
            index = torch.tensor([places[prompt] for prompt in prompts], device=device)
            for tensor in self._tensors():
                columns = tensor[:, :, begin : self._stop]
                columns[old : old + len(prompts)] = columns[old : old + new][index]
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

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor, span: _Span) -> Tensor:
        self._span.rows, self._span.start, self._span.stop = span.rows, span.start, span.stop
        more = {"position_ids": positions} if self._has_positions else {}
        self.work.passes += 1
        output = self._model(
            input_ids=ids,
            attention_mask=mask.long(),
            past_key_values=self._cache,
            use_cache=True,
            **more,
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
            taken = _take(waiting, num - len(rows))
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


def _take(waiting: deque[tuple[Item, tuple[int, ...]]], most: int) -> list[tuple[Item, tuple[int, ...]]]:
    """Take at most so many prompts, fewer where they have too many tokens for one pass."""
    taken: list[tuple[Item, tuple[int, ...]]] = []
    distinct: set[tuple[int, ...]] = set()
    while waiting and len(taken) < most:
        distinct.add(waiting[0][1])
        if taken and len(distinct) * max(map(len, distinct)) > BATCH_TOKENS:
            break
        taken.append(waiting.popleft())
    return taken


def num_slots(causal_lm: Any, width: int) -> int:
    """Return how many rows of so many tokens are worked on at once: by the kind of device and its free memory."""
    config = causal_lm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * size * causal_lm.dtype.itemsize
    per_row = (width + _SLACK) * per_token + _BYTES_PER_LOGIT * config.vocab_size
    device = causal_lm.device
    most = _SLOTS.get(device.type, _SLOTS_ELSEWHERE)
    free = find_devices()[device.index or 0].free_bytes
    return most if free is None else max(1, min(most, int(free * _SHARE_OF_MEMORY) // per_row))


# Which models can be asked this way

_reasons: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def why_not_refilled(model: Any) -> str:
    """Return why rows of this model cannot be refilled, "" if they can; tested once on the model itself, in evaluation
    mode, and logged."""
    if model not in _reasons:
        _reasons[model] = _reason(model)
        if _reasons[model]:
            _log.info("generation: slots of finished answers stay empty to the end of a batch: %s", _reasons[model])
    return _reasons[model]


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
    bound = _RELATIVE_ERROR.get(causal_lm.dtype, _OF_HALF)
    return "" if error <= bound else f"{name} gives other logits in slots (by {error:.2g} of their spread)"


@torch.no_grad()
def _error(model: Any, causal_lm: Any) -> float:
    """Return the largest difference of logits, in slots and of whole texts, relative to their spread.

    A text of five tokens is begun, one of three joins it, the first one leaves.
    """
    size = causal_lm.config.get_text_config().vocab_size
    first, second = (tuple(number * step % size for number in range(3, end)) for step, end in ((7, 8), (11, 6)))
    slots = Slots(causal_lm, 2, 10)
    found = [slots.add([first]), slots.step([first[0]]), slots.add([second])]
    both = slots.step([first[1], second[1]])
    slots.keep([1])
    found += [both[:1], both[1:], slots.step([second[0]])]
    texts = [first, (*first, first[0]), second, (*first, *first[:2]), (*second, second[1])]
    texts.append((*second, second[1], second[0]))
    worst = 0.0
    for logits, text in zip(found, texts, strict=True):
        ids = torch.tensor([text], device=causal_lm.device)
        whole = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1].double()
        spread = (whole - whole.mean()).abs().max().clamp(min=1e-30)
        worst = max(worst, float((logits[0].double() - whole).abs().max() / spread))
    return worst
