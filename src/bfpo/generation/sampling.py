"""Prompts in tokens -> answers in tokens, by random draws that do not depend on the other prompts.

Also the log-probs of given first tokens of answers. Axes: N prompts, L tokens of an opening, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from bfpo.core.errors import ModelError, SettingError
from bfpo.generation.refill import Slots, Work, cache_name, num_slots, refilled, shared_beginning, why_not_refilled
from bfpo.policy.batches import batches_by_length
from bfpo.policy.head import at_least_float32
from bfpo.policy.logps import unwrap_causal_lm
from bfpo.policy.source import configured_ends, num_positions, read_config
from bfpo.policy.trained import start_of

__all__ = [
    "Answer",
    "Request",
    "Watch",
    "answer_batches",
    "check_room",
    "end_token_ids",
    "opening_logps",
    "positions_left",
    "saved_end_token_ids",
]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt in tokens; the `id` and the run's seed decide its random draws."""

    id: str
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The generated tokens without the end token; `finished`: whether there was one."""

    id: str
    token_ids: tuple[int, ...]
    finished: bool


Watch = Callable[[Tensor, Sequence[tuple[str, int]]], None]
"""Reads (N, V) logits; of each row, the request's id and the place of the token that they choose."""


def end_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return every token that ends an answer: those of the generation config and the tokenizer's own.

    Raises `ModelError` as `configured_ends` does.
    """
    return configured_ends(model.generation_config, tokenizer)


def saved_end_token_ids(model: str | Path, tokenizer: Any, *, revision: str | None = None) -> tuple[int, ...]:
    """Return the `end_token_ids` of a model that is not loaded, from its folder or the hub.

    Raises `ModelError` as `end_token_ids` does, and for a model that is not found.
    """
    model, revision = start_of(model, revision)
    try:
        config = GenerationConfig.from_pretrained(model, revision=revision or "main", trust_remote_code=False)
    except OSError:  # as transformers does for a model without such a file
        config = GenerationConfig.from_model_config(read_config(model, revision=revision))
    return configured_ends(config, tokenizer)


def answer_batches(
    model: Any,
    requests: Sequence[Request],
    *,
    eos_token_ids: Collection[int],
    max_new_tokens: int,
    batch_size: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    processors: Sequence[LogitsProcessor] = (),
    watch: Watch | None = None,
    work: Work | None = None,
) -> Iterator[list[Answer]]:
    """Yield the answers as they are finished, longest prompts first (so that memory runs out at the start or never).

    `batch_size` answers are worked on at once; `None`: as many as memory and the device allow. A finished answer's
    place goes to the next prompt; where the model does not allow it (`why_not_refilled`), with `processors`, or for one
    prompt alone, padded batches are decoded to their ends. `work` is added to.

    At temperature 0 the most probable token is taken. Above, token t of an answer is the inverse of the cumulative
    distribution at u_t, where u comes from a generator seeded by (seed, id) alone: an answer does not depend on the
    other prompts, up to the rounding of the forward pass. Sampling defaults of the model's own generation config
    (top-k, repetition penalty) are not applied. `processors` get the logits of each step first; their rows are in the
    order of the yielded batch. `watch` gets the logits before each choice, in padded batches also those after an
    answer's end.

    Raises `SettingError` for a prompt that leaves no room for `max_new_tokens` in the model's positions, `ModelError`
    for logits that are not finite.
    """
    if not eos_token_ids:
        raise SettingError("eos_token_ids: got none; at least one end token is needed")
    check_room(model.config, [(request.id, request.prompt_ids) for request in requests], max_new_tokens)
    if not requests:
        return
    ends, draw = frozenset(eos_token_ids), _Draw(temperature, top_p, seed, max_new_tokens, watch)
    was_training = model.training
    model.eval()
    try:
        if len(requests) == 1 or processors or why_not_refilled(model):
            yield from _in_batches(model, requests, ends, draw, max_new_tokens, batch_size, processors, work or Work())
        else:
            yield from _in_slots(model, requests, ends, draw, max_new_tokens, batch_size, work)
    finally:
        model.train(was_training)


def _in_slots(
    model: Any,
    requests: Sequence[Request],
    ends: frozenset[int],
    draw: _Draw,
    max_new_tokens: int,
    batch_size: int | None,
    work: Work | None,
) -> Iterator[list[Answer]]:
    causal_lm = unwrap_causal_lm(model)
    ordered = sorted(requests, key=lambda one: (-len(one.prompt_ids), one.prompt_ids))  # equal prompts come together
    width = len(ordered[0].prompt_ids) + max_new_tokens
    num = min(len(ordered), batch_size or num_slots(causal_lm, width))
    prompts = [(request.id, request.prompt_ids) for request in ordered]
    shared = shared_beginning(model, [request.prompt_ids for request in ordered])
    slots = Slots(causal_lm, num, width, work, shared=shared)
    for batch in refilled(slots, prompts, draw.tokens, num=num, ends=ends, max_new_tokens=max_new_tokens):
        draw.forget(name for name, *_ in batch)
        yield [Answer(name, tuple(ids), finished) for name, ids, finished in batch]


def _in_batches(
    model: Any,
    requests: Sequence[Request],
    ends: frozenset[int],
    draw: _Draw,
    max_new_tokens: int,
    batch_size: int | None,
    processors: Sequence[LogitsProcessor],
    work: Work,
) -> Iterator[list[Answer]]:
    own_config = model.generation_config
    # `generate` takes missing arguments from the model's generation config, so it is replaced meanwhile.
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(ends), pad_token_id=min(ends)
    )
    try:
        lengths = [len(request.prompt_ids) for request in requests]
        for places in batches_by_length(lengths, batch_size, more=max_new_tokens):
            batch = [requests[place] for place in places]
            width = max(len(request.prompt_ids) for request in batch)
            chosen = LogitsProcessorList([*processors, _OneToken(draw, [request.id for request in batch], width)])
            input_ids, mask = _left_padded([request.prompt_ids for request in batch], min(ends), model.device)
            with torch.no_grad():
                output = model.generate(input_ids=input_ids, attention_mask=mask, logits_processor=chosen)
            draw.forget(request.id for request in batch)
            rows: list[list[int]] = output[:, width:].tolist()
            work.prompt_tokens += int(mask.sum())
            work.padded_prompt_tokens += mask.numel()
            work.passes += output.shape[1] - width
            work.row_steps += (output.shape[1] - width - 1) * len(batch)
            found = [next((place for place, token in enumerate(row) if token in ends), None) for row in rows]
            yield [
                Answer(request.id, tuple(row[:end]), end is not None)
                for request, row, end in zip(batch, rows, found, strict=True)
            ]
    finally:
        model.generation_config = own_config


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the ids and the mask of prompts, both (N, width) int64."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    return ids, mask


@torch.no_grad()
def opening_logps(
    model: Any,
    prompts: Sequence[Sequence[int]],
    openings: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int | None = None,
) -> list[list[float]]:
    """Return the summed log-prob, in nats, of each opening of an answer: `openings[n]` are those of prompt n.

    A prompt goes through the model once; its openings then read a copy of its keys and values. The model must be in
    evaluation mode.
    """
    found: list[list[float]] = [[0.0] * len(some) for some in openings]
    causal_lm = unwrap_causal_lm(model)
    known = inspect.signature(type(causal_lm).forward).parameters
    last_only, cache = {"logits_to_keep": 1} if "logits_to_keep" in known else {}, cache_name(known)
    for places in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        ids, mask_NW = _left_padded([prompts[n] for n in places], 0, causal_lm.device)
        positions_NW = (mask_NW.cumsum(1) - 1).clamp(min=0)

        def run(ids: Tensor, mask: Tensor, positions: Tensor, **more: Any) -> Any:
            more |= {"position_ids": positions} if "position_ids" in known else {}
            return causal_lm(input_ids=ids, attention_mask=mask, use_cache=True, **more)

        before = run(ids, mask_NW, positions_NW, **last_only)
        first_NV = at_least_float32(before.logits[:, -1]).log_softmax(-1)
        for k in range(max(len(openings[n]) for n in places)):
            rows = [list(openings[n][k]) if k < len(openings[n]) else [] for n in places]
            length = max(map(len, rows))
            tokens_NL = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=ids.device)
            given_NL = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=ids.device)
            logps_NLV = first_NV[:, None]
            if length > 1:
                after = run(
                    tokens_NL[:, :-1],
                    torch.cat([mask_NW, torch.ones_like(given_NL[:, :-1])], dim=1),
                    positions_NW[:, -1:] + torch.arange(1, length, device=ids.device),
                    **{cache: copy.deepcopy(getattr(before, cache))},
                )
                logps_NLV = torch.cat([logps_NLV, at_least_float32(after.logits).log_softmax(-1)], dim=1)
            logps_NL = logps_NLV.gather(-1, tokens_NL[..., None])[..., 0].double() * given_NL
            for n, logp in zip(places, logps_NL.sum(1).tolist(), strict=True):
                if k < len(openings[n]):
                    found[n][k] = logp
    return found


class _Draw:
    """Chooses tokens by logits; those of a row are drawn by its own stream of random numbers."""

    def __init__(
        self, temperature: float, top_p: float, seed: int, max_new_tokens: int, watch: Watch | None = None
    ) -> None:
        self._temperature, self._seed, self._size, self._watch = temperature, seed, max_new_tokens, watch
        self._top_p = TopPLogitsWarper(top_p) if top_p < 1 else None
        self._streams: dict[str, Any] = {}  # by request, a float64 array of (max_new_tokens,)
        self._room: Tensor | None = None  # (2, N, V) float64, kept: new memory in each step costs more than the draw

    def tokens(self, scores: Tensor, places: Sequence[tuple[str, int]]) -> list[int]:
        """Return a token for each row of (N, V) logits; `places`: the request's id and the token's place."""
        if self._watch is not None:
            self._watch(scores, places)
        if self._temperature == 0:
            best = scores.argmax(dim=-1)  # NaN counts as the largest
            _check_finite(scores.gather(1, best[:, None]), places)
            greedy: list[int] = best.tolist()
            return greedy
        if self._room is None or self._room.shape[1] < len(scores):
            self._room = scores.new_empty((2, *scores.shape), dtype=torch.float64)
        scaled, cumulative = self._room[:, : len(scores)]
        scaled.copy_(scores)
        if self._temperature != 1:
            scaled.div_(self._temperature)
        if self._top_p is not None:
            scaled = self._top_p(torch.zeros(0, dtype=torch.long), scaled)  # the ids are not looked at
        torch.softmax(scaled, dim=-1, out=cumulative).cumsum_(dim=-1)
        _check_finite(cumulative[:, -1:], places)
        uniform = torch.tensor([self._uniform(*place) for place in places], dtype=torch.float64, device=scores.device)
        # Strictly above u times the total: a token of probability zero can then never be drawn.
        chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        drawn: list[int] = chosen[:, 0].tolist()
        return drawn

    def _uniform(self, name: str, place: int) -> float:
        if name not in self._streams:
            self._streams[name] = _uniforms(self._seed, name, self._size).numpy()
        return float(self._streams[name][place])

    def forget(self, names: Iterable[str]) -> None:
        """Free the random numbers of requests that are answered."""
        for name in names:
            self._streams.pop(name, None)


def _check_finite(found_N1: Tensor, places: Sequence[tuple[str, int]]) -> None:
    """Raise `ModelError` unless each row's number is finite; that of a row with NaN among its logits is not."""
    is_finite = found_N1[:, 0].isfinite()
    if not is_finite.all():
        name, place = places[int(is_finite.int().argmin())]
        raise ModelError(
            f"model: its logits for token {place + 1} of the answer to {name!r} are not finite: the weights hold "
            "NaN or infinity, or overflow in their number type; check the losses of its training, or set dtype: float32"
        )


class _OneToken(LogitsProcessor):
    """Leaves one token per row, the one that is drawn."""

    def __init__(self, draw: _Draw, names: Sequence[str], width: int) -> None:
        self._draw, self._names, self._width = draw, names, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (N, V) scores: 0 for the drawn token of each row, minus infinity elsewhere."""
        place = input_ids.shape[1] - self._width
        tokens = self._draw.tokens(scores, [(name, place) for name in self._names])
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _uniforms(seed: int, request_id: str, size: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}\0{request_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(size, generator=generator, dtype=torch.float64)


def positions_left(config: Any, num_prompt_tokens: int) -> int | None:
    """Return how many tokens of an answer a model has positions for, by its config; `None`: any number.

    It is below 0 after too long a prompt.
    """
    positions = num_positions(config)
    return None if positions is None else positions - num_prompt_tokens


def check_room(config: Any, prompts: Sequence[tuple[str, Sequence[int]]], max_new_tokens: int) -> None:
    """Raise `SettingError` if the longest of the prompts, ids with tokens, leaves no room for an answer."""
    if not prompts:
        return
    name, longest = max(prompts, key=lambda prompt: len(prompt[1]))
    left = positions_left(config, len(longest))
    if left is not None and max_new_tokens > left:
        raise SettingError(
            f"max_new_tokens: got {max_new_tokens}, and prompt {name!r} has {len(longest)} tokens; the model has "
            f"{len(longest) + left} positions for both together; lower max_new_tokens or shorten the prompt"
        )
