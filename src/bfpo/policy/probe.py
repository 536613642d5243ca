"""How to compute a model's log-probs: decided by its config, and tested on the model itself, before training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from bfpo.core.errors import ModelError, SettingError, first_line
from bfpo.data.pack import Form, MicroBatch, collate_pairs, on_device
from bfpo.data.tokenize import Ids, TokenPair
from bfpo.policy.attention import UnknownExtraError, register_packed
from bfpo.policy.logps import evaluating, sequence_logps, unwrap_causal_lm, use_own_logits, uses_own_logits
from bfpo.policy.precision import in_float32

__all__ = ["Attention", "check_positions", "choose_form"]

logger = logging.getLogger(__name__)

Attention = Literal["auto", "packed", "padded"]

# Largest error in nats of a sum of half a dozen log-probs that rounding explains: between two ways of computing it, and
# between two rows of the same computation.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
_SAME_WAY = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
_LENGTHS = ((5, 4, 6), (1, 1, 3))

# The exact test: pairs of which one takes this many tokens in a row, fewer if the model has fewer positions.
_LONGEST_PAIR, _PARTS = 72, ((1 / 3, 1 / 4, 5 / 12), (1 / 9, 1 / 2, 1 / 6))
# An error below this part of the effect is rounding. With fresh weights in float32, right models are at 1e-5, wrong
# ones at 6e-4 (convolutions), 7e-4 (attention temperature), 0.05 to 0.3 (linear attention).
_RELATIVE_ERROR = 1e-4
_ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers of transformers' configs


class _CannotPackError(Exception):
    """The reason why a model does not take packed rows, to follow the model's name."""


@dataclass(frozen=True, slots=True)
class _FormDecision:
    """Which form of rows a model takes, and whether its log-probs are taken from its own logits."""

    form: Form
    own_logits: bool


def choose_form(
    model: nn.Module, attention: str = "auto", *, longest_text: int, process_index: int = 0, num_processes: int = 1
) -> Form:
    """Return the form of rows that this model takes, and make the model ready for it.

    Arguments, what is tried, and errors: see `_decide_form`. With several processes the first one decides for all, so
    all must call this together: the weights of the others may be empty until they are sharded, and results near the
    bound could differ. All raise what it raises.
    """
    decision, failure = None, None
    if process_index == 0:
        try:
            decision = _decide_form(model, attention, longest_text=longest_text)
        except Exception as error:  # the others wait for the outcome, whatever it is
            failure = error
    if num_processes > 1:
        said = None if failure is None else str(failure) or type(failure).__name__
        decision, said = broadcast_object_list([decision, said])
        if said is not None and failure is None:
            failure = ModelError(f"{said} (in the first process)")
    if failure is not None:
        raise failure
    assert decision is not None
    _adopt_form(model, decision)
    return decision.form


def _decide_form(model: nn.Module, attention: str = "auto", *, longest_text: int) -> _FormDecision:
    """Return the form of rows that this model takes, and whether its own logits are needed; leave it as it was.

    "packed" and "auto" try packed rows. Layers that the config or the modules show to mix tokens outside attention are
    a reason against them. Then the model's attention is set to packed attention over its own one. In float32, the
    log-probs of two pairs must agree with those of single texts, relative to the effect that wrong text in front of a
    completion has. In the dtype of training, those of two short pairs must agree with the model's own logits within
    rounding, and must not change with the order of the pairs or, on the rejected side, with the chosen completion. If a
    model does not pass, "auto" logs one line with the reason and takes padded rows. In both forms the head is also
    tested: if it does not give the model's own logits, those are used.

    `longest_text`: tokens of the longest prompt with a completion that will come; a sliding window below it is
    supported if the model passes it to its attention. A model without its weights (sharded or on the meta device)
    cannot be tested: then its config and class decide.

    Raises `SettingError` for an unknown name and `ModelError` with the reason if "packed" was requested and does not
    work, for texts so long that the model's rotary positions depend on the longest text of the batch, for texts beyond
    its learned positions, and for a model that does not run.
    """
    if attention not in get_args(Attention):
        raise SettingError(f"attention: got {attention!r}; allowed: {', '.join(get_args(Attention))}")
    causal_lm = unwrap_causal_lm(model)
    _check_rope(causal_lm.config, longest_text)
    check_positions(causal_lm, longest_text)
    can_be_asked = all(p.device.type != "meta" and not hasattr(p, "ds_id") for p in model.parameters())
    with _quietly(model), _restoring(causal_lm) as before:
        expected = _single_text_logps(model, causal_lm) if can_be_asked else None
        own_logits = uses_own_logits(model)
        if attention == "padded":
            return _FormDecision("padded", own_logits)
        try:
            _check_config(causal_lm)
            exact = _check_exactly(model, causal_lm, before) if can_be_asked else None
            _set_packed(model, causal_lm, before)
            served = set() if expected is None or exact is None else _check_packed(model, causal_lm, expected, exact)
            window = _window(causal_lm.config)
            if window is not None and window < longest_text and window not in served:
                raise _CannotPackError(f"has a window of {window} tokens, and the longest text is {longest_text}")
        except _CannotPackError as reason:
            if attention == "packed":
                raise ModelError(f"attention packed: {type(causal_lm).__name__} {reason}; use auto or padded") from None
            logger.info("rows are padded, not packed: %s %s", type(causal_lm).__name__, reason)
            return _FormDecision("padded", own_logits)
    return _FormDecision("packed", own_logits)


def _adopt_form(model: nn.Module, decision: _FormDecision) -> None:
    """Make a model ready for what was decided, by this process or another one."""
    use_own_logits(model, decision.own_logits)
    if decision.form == "packed":
        causal_lm = unwrap_causal_lm(model)
        _set_packed(model, causal_lm, causal_lm.config._attn_implementation)


@contextmanager
def _restoring(causal_lm: Any) -> Iterator[str]:
    """Yield the name of the model's attention; afterwards restore it and the source of the log-probs."""
    before, own_logits = causal_lm.config._attn_implementation, uses_own_logits(causal_lm)
    try:
        yield before
    finally:
        use_own_logits(causal_lm, own_logits)
        if causal_lm.config._attn_implementation != before:
            causal_lm.set_attn_implementation(before)


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradient, and leave modes and random numbers as they were."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with evaluating(model), torch.random.fork_rng(devices):
        yield


def _pairs(model: Any, every_lengths: Sequence[tuple[int, int, int]] = _LENGTHS) -> list[TokenPair]:
    generator = np.random.default_rng(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    usable = [token for token in range(vocabulary) if token != pad]
    pairs = []
    for number, lengths in enumerate(every_lengths):
        prompt, chosen, rejected = (generator.choice(usable, length).astype(np.int32) for length in lengths)
        pairs.append(TokenPair(f"probe {number}", prompt, chosen, rejected, 1.0, 0.0))
    return pairs


def _batch(model: nn.Module, pairs: list[TokenPair], form: Form) -> MicroBatch:
    return on_device(collate_pairs(pairs, form=form), next(model.parameters()).device)


def _bound(model: nn.Module, bounds: Mapping[torch.dtype, float]) -> float:
    dtypes = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return max(bounds.get(dtype, bounds[torch.bfloat16]) for dtype in dtypes)


def _single_text_logps(model: nn.Module, causal_lm: Any) -> Tensor:
    """Return the log-probs under the model's own logits, one completion at a time; use these logits from now on if the
    head gives other ones.
    """
    pairs = _pairs(causal_lm)
    try:
        exact = _exact_logps(model, pairs)
    except (RuntimeError, TypeError, ValueError) as failure:
        dtype = next(model.parameters()).dtype
        raise ModelError(f"{type(causal_lm).__name__} does not run in {dtype} ({first_line(failure)})") from failure
    try:
        found = sequence_logps(model, _batch(model, pairs, "padded")).logps.cpu()
        error = float((found - exact).abs().max())
    except (ModelError, AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        error = float("nan")
    if not error <= _bound(model, _TOLERANCE):
        use_own_logits(model)
        logger.info("log-probs are taken from the model's logits: those of its head alone differ (by %.3g nats)", error)
    return exact


def _exact_logps(model: nn.Module, pairs: Sequence[TokenPair]) -> Tensor:
    """Return the log-probs (2P,) float64 of the completions, chosen ones first, each after its prompt alone."""
    texts = [(pair.prompt_ids, getattr(pair, side)) for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    return torch.stack([_text_logp(model, *text) for text in texts])


def _text_logp(model: nn.Module, before: Ids, completion: Ids) -> Tensor:
    """Return the log-prob of `completion` after `before`, one text, under the model's own logits."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.concatenate([before, completion]).astype(np.int64)).to(device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
    logp: Tensor = logits.gather(1, ids[1:, None])[-len(completion) :].sum().cpu()
    return logp


def _set_packed(model: nn.Module, causal_lm: Any, before: str) -> None:
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise _CannotPackError("has a prompt-learning adapter, whose virtual tokens belong before each row")
    if not hasattr(causal_lm, "set_attn_implementation") or before is None:
        raise _CannotPackError("cannot change its attention")
    name = register_packed(before)
    causal_lm.set_attn_implementation(name)
    if causal_lm.config._attn_implementation != name:
        raise _CannotPackError("cannot change its attention")


def _window(config: Any) -> int | None:
    """Return the sliding window of the config that some layer uses, in tokens."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if getattr(text, "use_sliding_window", True) is False or (kinds and set(kinds) == {"full_attention"}):
        return None
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if window), default=None)


def _check_rope(config: Any, longest_text: int) -> None:
    """Refuse texts whose log-probs would depend on the other texts of their micro-batch.

    Rotary positions of these kinds are scaled, for all rows alike, by the longest text of a forward pass.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    for rope in (parameters, *(part for part in parameters.values() if isinstance(part, dict))):
        limit = getattr(text, "max_position_embeddings", None)
        if rope.get("rope_type") == "longrope":
            limit = rope.get("original_max_position_embeddings") or limit
        elif rope.get("rope_type") != "dynamic":
            continue
        if limit is not None and longest_text > limit:
            raise ModelError(
                f"rope type {rope['rope_type']}: the longest text is {longest_text} tokens; beyond {limit} a log-prob "
                f"depends on the other texts of its batch. Set max_length to at most {limit}"
            )


def check_positions(causal_lm: Any, longest_text: int) -> None:
    """Refuse texts longer than a table of learned positions, which the model would read beyond its end."""
    limit = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    for name, module in causal_lm.named_modules():
        if not isinstance(module, nn.Embedding) or not name.endswith(("wpe", "embed_positions")):
            continue
        if limit is not None and longest_text > limit:
            raise ModelError(
                f"the longest text is {longest_text} tokens, and {type(causal_lm).__name__} has learned {limit} "
                f"positions. Set max_length to at most {limit}"
            )


def _check_config(causal_lm: Any) -> None:
    """Raise `_CannotPackError` for layers that are known to mix the tokens of a row outside their attention."""
    text = causal_lm.config.get_text_config()
    kinds = sorted(set(getattr(text, "layer_types", None) or ()) - _ATTENTIONS)
    if kinds:
        raise _CannotPackError(f"has layers of type {', '.join(kinds)}, which mix tokens outside attention")
    if getattr(text, "attn_temperature_tuning", False):
        raise _CannotPackError("scales its attention by the place in the row (attn_temperature_tuning)")
    for name, module in getattr(causal_lm, "base_model", causal_lm).named_modules():
        if isinstance(module, (nn.Conv1d, nn.RNNBase)):
            raise _CannotPackError(f"mixes tokens outside attention, in {name} ({type(module).__name__})")


def _longest_row(config: Any) -> int:
    """Return the tokens of a row within which every position of the model is learned and unscaled."""
    text = config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None), getattr(text, "original_max_position_embeddings", None)]
    limits.append((getattr(text, "rope_parameters", None) or {}).get("original_max_position_embeddings"))
    return int(min([_LONGEST_PAIR, *(limit for limit in limits if limit)]))


def _check_exactly(model: nn.Module, causal_lm: Any, before: str) -> Tensor:
    """Compare packed rows with single texts in float32; raises `_CannotPackError` for an error beyond rounding.

    Returns the log-probs of `_pairs` in float32, for `_check_packed`.

    The scale is the effect: by how much the log-prob of a rejected completion changes if it follows the chosen one in
    the plain text, which is what a model does that ignores packing. Rounding is the difference between padded rows and
    single texts, both of which are right.
    """
    row = _longest_row(causal_lm.config)
    pairs = _pairs(causal_lm, [tuple(max(1, int(part * row)) for part in parts) for parts in _PARTS])  # type: ignore[misc]
    # Flash attention has no float32; all implementations compute the same.
    plain = before if before in ("eager", "sdpa") else "sdpa"
    try:
        with in_float32(model):
            if plain != before and hasattr(causal_lm, "set_attn_implementation"):
                causal_lm.set_attn_implementation(plain)
            alone, short = _exact_logps(model, pairs), _exact_logps(model, _pairs(causal_lm))
            joined = [_text_logp(model, np.concatenate([p.prompt_ids, p.chosen_ids]), p.rejected_ids) for p in pairs]
            padded = sequence_logps(model, _batch(model, pairs, "padded")).logps.cpu()
            _set_packed(model, causal_lm, plain)
            batch = _batch(model, pairs, "packed")
            batch["layout"].by_segment = True
            packed = sequence_logps(model, batch).logps.cpu()
    except _CannotPackError:
        raise
    except UnknownExtraError as error:
        raise _CannotPackError(f"has an attention that packed rows do not support ({error})") from error
    except Exception as error:  # models of any origin
        raise _CannotPackError(f"does not run on packed rows in float32 ({first_line(error)})") from error
    effect = float((torch.stack(joined) - alone[len(pairs) :]).abs().max())
    rounding, error_seen = 4 * float((padded - alone).abs().max()), float((packed - alone).abs().max())
    if not error_seen <= _RELATIVE_ERROR * effect + rounding:
        raise _CannotPackError(
            f"gives other log-probs on packed rows (by {error_seen:.3g} nats, where other text in front changes them "
            f"by {effect:.3g}): it mixes tokens outside its attention"
        )
    if not rounding <= 0.1 * effect and not getattr(causal_lm.config.get_text_config(), "layer_types", None):
        raise _CannotPackError(
            f"cannot be tested: text in front changes its log-probs by {effect:.3g} nats, rounding by {rounding:.3g}"
        )
    return short


def _check_packed(model: nn.Module, causal_lm: Any, expected: Tensor, exact: Tensor) -> set[int | None]:
    """Return the windows that layers pass to their attention; raises `_CannotPackError` if log-probs are wrong.

    `expected` (4,): of the model's own logits in its dtype; `exact`: in float32. Rows of half precision and the own
    logits round differently, by a nat where a text is unlikely; packed rows may be three times as far from float32 as
    the own logits are.
    """
    first, second = _pairs(causal_lm)
    batch = _batch(model, [first, second], "packed")
    other_chosen = _batch(model, [replace(first, chosen_ids=first.chosen_ids[::-1].copy()), second], "packed")
    try:
        found = sequence_logps(model, batch).logps.cpu()
        rejected = sequence_logps(model, other_chosen).logps.cpu()[2:]
        turned = sequence_logps(model, _batch(model, [second, first], "packed")).logps.cpu()[[1, 0, 3, 2]]
    except UnknownExtraError as error:
        raise _CannotPackError(f"has an attention that packed rows do not support ({error})") from error
    except Exception as error:  # models of any origin
        raise _CannotPackError(f"does not run on packed rows ({first_line(error)})") from error
    rounding, away = (float((logps - exact).abs().max()) for logps in (expected, found))
    if not away <= max(_bound(model, _TOLERANCE), 3 * rounding):
        dtype = next(model.parameters()).dtype
        raise _CannotPackError(
            f"gives other log-probs on packed rows in {dtype} (by {away:.3g} nats from float32, its own logits by "
            f"{rounding:.3g})"
        )
    if not float((rejected - found[2:]).abs().max()) <= _bound(model, _SAME_WAY):
        raise _CannotPackError("lets rejected completions see chosen ones")
    if not float((turned - found).abs().max()) <= _bound(model, _SAME_WAY):
        raise _CannotPackError("gives a pair other log-probs in another place of the row")
    handed: set[int | None] = batch["layout"].windows
    return handed
