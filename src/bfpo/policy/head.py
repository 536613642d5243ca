"""Log-probs of target tokens from hidden states, never more than a chunk of rows x vocabulary at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["CHUNK_ROWS", "LogitTransform", "at_least_float32", "head_logps"]

CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to its logits after the head: `softcap * tanh(scale * x / softcap)`, or `scale * x`."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Read it from a model's config: `logit_scale` (Cohere), `logits_scaling` (Granite), `final_logit_softcapping`
        (Gemma).
        """
        text = config.get_text_config()
        scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
        return cls(float(scale), getattr(text, "final_logit_softcapping", None))

    def apply(self, logits: Tensor) -> Tensor:
        """Return the transformed logits."""
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def apply_(self, logits: Tensor) -> Tensor | None:
        """Transform in place and return the derivative by the logits, or `None` where it is the constant `scale`."""
        logits.mul_(self.scale)
        if self.softcap is None:
            return None
        logits.div_(self.softcap).tanh_()
        slope = logits.square().neg_().add_(1.0).mul_(self.scale)
        logits.mul_(self.softcap)
        return slope


def head_logps(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    *,
    transform: LogitTransform = LogitTransform(),
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Return log p(target), (M,) in nats: float64 where the logits are, else float32.

    `hidden` (M, H), `targets` (M,) int64. Where a linear head is frozen, the gradient by the hidden states is made in
    the forward pass: it does not depend on the loss, so 4 M H V operations do where recomputing needs 6 M H V. A head
    that trains, or has an adapter or quantised weights, is run again chunk by chunk in the backward pass.
    """
    if _is_frozen_linear(head):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        bias = None if head.bias is None else head.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            inputs = (hidden.to(dtype), head.weight.to(dtype), bias, targets, transform, chunk_rows)
            found: Tensor = _FrozenHead.apply(*inputs)  # type: ignore[no-untyped-call]
        return found

    def chunk(rows: Tensor, chunk_targets: Tensor) -> Tensor:
        logits = transform.apply(at_least_float32(head.forward(rows)))
        picked = logits.gather(1, chunk_targets[:, None]).squeeze(1)
        return picked - torch.logsumexp(logits, dim=1)

    return _recomputed(chunk, hidden, targets, chunk_rows)


def _is_frozen_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a plain matrix of numbers that does not train; adapters and quantised weights have a forward of
    their own.
    """
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and head.weight.dtype.is_floating_point
        and not any(parameter.requires_grad for parameter in head.parameters())
    )


def _recomputed(chunk: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
    pieces = zip(torch.split(hidden, chunk_rows), torch.split(targets, chunk_rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([chunk(rows, some) for rows, some in pieces])
    return torch.cat([checkpoint(chunk, rows, some, use_reentrant=False) for rows, some in pieces])


def at_least_float32(logits: Tensor) -> Tensor:
    """Return the logits in float64 where they are, else in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


class _FrozenHead(torch.autograd.Function):
    """d log p(t) / d h = (W[t] - softmax(hW')W), scaled by the slope of the transform; once differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk_rows: int,
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps = torch.empty(len(hidden), dtype=accumulate, device=hidden.device)
        gradient = torch.empty_like(hidden) if wants_gradient else None
        buffer = torch.empty(min(chunk_rows, len(hidden)), len(weight), dtype=hidden.dtype, device=hidden.device)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, min(start + chunk_rows, len(hidden)))
            logits = torch.mm(hidden[rows], weight.t(), out=buffer[: rows.stop - start]).to(accumulate)
            if bias is not None:
                logits += bias
            slope = transform.apply_(logits)
            target = targets[rows, None]
            picked = logits.gather(1, target).squeeze(1)
            largest = logits.amax(dim=1, keepdim=True)
            sums = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
            logps[rows] = picked - (largest + sums.log()).squeeze(1)
            if gradient is not None:
                by_logits = logits.div_(-sums).scatter_add_(1, target, torch.ones_like(sums))
                by_logits.mul_(transform.scale if slope is None else slope)
                torch.mm(by_logits.to(hidden.dtype), weight, out=gradient[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *by_logps: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * by_logps[0][:, None].to(gradient.dtype), None, None, None, None, None
