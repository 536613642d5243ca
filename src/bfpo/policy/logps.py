"""Log-probs of completions from a micro-batch: one forward pass, the head at completion tokens only.

`sequence_logps` runs the model as it is wrapped; hooks around its output head (`_HeadHooks`) turn the hidden states
into log-probs of the completion tokens, by `bfpo.policy.head`; the result is their sum over each completion.

Axes: P pairs; N = 2P completions, the chosen ones first; M completion tokens of all of them; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn

from bfpo.core.errors import ModelError, SettingError
from bfpo.policy.attention import LAYOUT, PREFIX
from bfpo.policy.head import (
    CHUNK_ROWS,
    LogitTransform,
    at_least_float32,
    head_logps,
    is_linear,
    tied_embedding,
    tied_rows,
)

__all__ = [
    "Reduction",
    "SequenceLogps",
    "evaluating",
    "sequence_logps",
    "unwrap_causal_lm",
    "use_own_logits",
    "uses_own_logits",
]

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True, slots=True)
class SequenceLogps:
    """Log-probs of N completions in nats: `logps` (N,) float64, `num_tokens` (N,) int64, the tokens summed over."""

    logps: Tensor
    num_tokens: Tensor


def sequence_logps(
    model: nn.Module, batch: Mapping[str, Any], *, reduction: Reduction = "sum", chunk_rows: int = CHUNK_ROWS
) -> SequenceLogps:
    """Return the log-prob of each completion of a micro-batch (`bfpo.data.pack.MicroBatch`), packed or padded.

    The model runs as it is wrapped, once; its head sees the hidden states that predict a completion token, `chunk_rows`
    of them at a time (see `head_logps`). The log-softmax is float32 at least, the sum over tokens float64: over a long
    completion the rounding of the sum would otherwise outweigh that of the model. `mean` divides by the number of
    completion tokens.

    No attention mask is passed for padded rows: in a causal model no token sees the padding on its right, and a mask
    costs the fast attention kernels.

    Raises `SettingError` for an unknown reduction and `ModelError` for a model without an output head.
    """
    if reduction not in get_args(Reduction):
        raise SettingError(f"reduction: got {reduction!r}; allowed: {', '.join(get_args(Reduction))}")
    logps_M = _token_logps(model, batch, chunk_rows).double()  # summed in float64 below
    completion_M = batch["sequence"]
    zeros_N = torch.zeros(2 * len(batch["chosen_is_safe"]), dtype=torch.float64, device=completion_M.device)
    logps_N = zeros_N.index_add(0, completion_M, logps_M)
    num_tokens_N = zeros_N.long().index_add(0, completion_M, torch.ones_like(completion_M))
    return SequenceLogps(logps=logps_N / num_tokens_N if reduction == "mean" else logps_N, num_tokens=num_tokens_N)


def _token_logps(model: nn.Module, batch: Mapping[str, Any], chunk_rows: int) -> Tensor:
    """Return the log-prob of each completion token, (M,) float32 at least."""
    causal_lm = unwrap_causal_lm(model)
    arguments: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    if batch.get("layout") is not None:
        if not str(causal_lm.config._attn_implementation).startswith(PREFIX):
            raise ModelError(
                f"a packed micro-batch needs packed attention, and {type(causal_lm).__name__} has "
                f"{causal_lm.config._attn_implementation!r}; call bfpo.policy.probe.choose_form first, or pad the rows"
            )
        arguments |= {"position_ids": batch["position_ids"], LAYOUT: batch["layout"]}
        # A mask of four dimensions is passed on as it is; packed attention does not read it.
        arguments["attention_mask"] = torch.zeros(1, 1, 1, 1, device=batch["input_ids"].device)
    if uses_own_logits(causal_lm):
        logits_MV = model(**arguments).logits.flatten(0, 1)[batch["source"]]
        return -torch.nn.functional.cross_entropy(at_least_float32(logits_MV), batch["targets"], reduction="none")
    hooks = _HeadHooks(batch["source"], batch["targets"], LogitTransform.of(causal_lm.config), chunk_rows)
    with hooks.on(causal_lm):
        logps_M: Tensor = model(**arguments)["logits"]  # `_leave_model` has put them there
    return logps_M


@dataclass(slots=True)
class _HeadHooks:
    """Hooks that turn a causal LM's forward pass into one that returns token log-probs.

    The head is reached inside the forward pass of whatever wraps the model, where sharded weights are whole. Its input
    is gathered at `source` and taken from it; the head itself then runs on no row. The log-probs pass out as the
    output of the head and of the model, so that wrappers that attach backward hooks to outputs see them. An embedding
    tied to a head that trains shares its gradient (`tied_rows`).

    Hooks cannot pass values to each other, so `_logps` (M,) holds them during the pass, and `_weight` (V, H) the weight
    for a tied head; an object is for one pass.
    """

    source: Tensor
    targets: Tensor
    transform: LogitTransform
    chunk_rows: int
    _logps: Tensor | None = field(default=None, init=False)
    _weight: Tensor | None = field(default=None, init=False)
    _in_head: ExitStack = field(default_factory=ExitStack, init=False)

    @contextmanager
    def on(self, causal_lm: Any) -> Iterator[None]:
        head = causal_lm.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise ModelError(f"{type(causal_lm).__name__} has no output head; a causal LM with one is needed")
        embedding = tied_embedding(causal_lm, head)
        with ExitStack() as stack:
            if embedding is not None:
                stack.callback(embedding.register_forward_hook(self._leave_embedding, prepend=True).remove)
            for hook in (  # in the order in which they run
                head.register_forward_pre_hook(self._enter_head),  # after the hooks that make sharded weights whole
                head.register_forward_hook(self._leave_head, prepend=True, always_call=True),
                head.register_forward_hook(self._see_output),  # after wrappers have put their own on it
                causal_lm.register_forward_hook(self._leave_model, prepend=True),
            ):
                stack.callback(hook.remove)
            yield

    def _leave_embedding(self, embedding: nn.Embedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Look the rows up again, so that their gradient is added to that of the head."""
        if not (inputs and output.requires_grad):  # also without gradient: the first pass of a reentrant checkpoint
            return None
        rows, self._weight = tied_rows(embedding, inputs[0])
        return rows

    def _enter_head(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Compute the log-probs from the hidden states, (1, T, H) or (N, T, H), and give the head none of them."""
        hidden = inputs[0]
        hidden_MH = hidden.flatten(0, -2)[self.source]
        self._logps = head_logps(
            head,
            hidden_MH,
            self.targets,
            transform=self.transform,
            chunk_rows=self.chunk_rows,
            weight=self._weight,
        )
        if not is_linear(head):
            return (hidden[:1, :0].detach(),)
        # Autocast would cast the whole weight even for no row.
        self._in_head.enter_context(torch.autocast(hidden.device.type, enabled=False))
        return (hidden.new_empty((1, 0, hidden.shape[-1]), dtype=head.weight.dtype),)

    def _leave_head(self, head: nn.Module, inputs: Any, output: Any) -> Any:
        """Replace the empty logits by the log-probs; also called where the head fails, as autocast must come back."""
        self._in_head.close()
        return self._logps

    def _see_output(self, head: nn.Module, inputs: Any, output: Any) -> None:
        """Keep the log-probs as wrappers have changed them, before the model's own code after the head."""
        self._logps = output

    def _leave_model(self, model: nn.Module, inputs: Any, output: Any) -> dict[str, Any]:
        """Return the log-probs in place of the model's output (scaled, capped, cast)."""
        if self._logps is None:
            raise ModelError(
                f"{type(model).__name__} does not call its output head; its log-probs cannot be taken there"
            )
        return {"logits": self._logps}


def unwrap_causal_lm(model: nn.Module) -> Any:
    """Return the causal LM inside data-parallel and PEFT wrappers."""
    inner: Any = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


# Models whose logits differ from what the head and the known transforms give; `bfpo.policy.probe` finds them. Kept here
# because trainer, reference and evaluation all reach the model through `sequence_logps`.
_WITH_OWN_LOGITS: WeakSet[nn.Module] = WeakSet()


def use_own_logits(model: nn.Module, use: bool = True) -> None:
    """From now on, take this model's log-probs from its own logits, of all completion tokens at once.

    This also holds if the model is wrapped or compiled later.
    """
    if use:
        _WITH_OWN_LOGITS.add(_uncompiled(model))
    else:
        _WITH_OWN_LOGITS.discard(_uncompiled(model))


def uses_own_logits(model: nn.Module) -> bool:
    """Return whether `use_own_logits` holds for this model."""
    return _uncompiled(model) in _WITH_OWN_LOGITS


def _uncompiled(model: nn.Module) -> nn.Module:
    causal_lm = unwrap_causal_lm(model)
    inner: nn.Module = getattr(causal_lm, "_orig_mod", causal_lm)
    return inner


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch the model to evaluation mode and back, module by module, without gradients."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
