"""Log-probs of target tokens from hidden states, never more than a chunk of rows x vocabulary at a time.

For a row h of hidden states and the head W, b, with f the model's transform of its logits: z = f(W h + b) and

    log p(t) = z[t] - log sum_v exp(z[v])
    d log p(t) / d h = W' [f'(W h + b) * (onehot(t) - softmax(z))]      W' the transpose, * elementwise

Axes: M rows, one for each completion token; C rows of one chunk; H hidden size; V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["CHUNK_ROWS", "LogitTransform", "at_least_float32", "head_logps"]

CHUNK_ROWS = 256
"""Rows of logits in memory at a time: 256 x V numbers, enough to keep a matrix product busy."""


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
        logits.div_(self.softcap).tanh_()  # with y = tanh(scale x / cap): f = cap y, f' = scale (1 - y^2)
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
    """Return log p(target), (M,) in nats: float64 if the logits are, else float32.

    `hidden` (M, H), `targets` (M,) int64. For a frozen linear head, the gradient with respect to the hidden states is
    computed in the forward pass: it does not depend on the loss, so 4 M H V operations do where recomputing needs 6 M H
    V. A head that trains, or has an adapter or quantised weights, is run again chunk by chunk in the backward pass.
    """
    if _is_frozen_linear(head):
        # Autocast does not reach products that write to `out=`, so its dtype is applied by hand and autocast is off
        # inside.
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        bias_V = None if head.bias is None else head.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            inputs = (hidden.to(dtype), head.weight.to(dtype), bias_V, targets, transform, chunk_rows)
            logps_M: Tensor = _FrozenHead.apply(*inputs)  # type: ignore[no-untyped-call]
        return logps_M

    def chunk(hidden_CH: Tensor, targets_C: Tensor) -> Tensor:
        logits_CV = transform.apply(at_least_float32(head.forward(hidden_CH)))
        picked_C = logits_CV.gather(1, targets_C[:, None]).squeeze(1)
        return picked_C - torch.logsumexp(logits_CV, dim=1)

    chunks = zip(torch.split(hidden, chunk_rows), torch.split(targets, chunk_rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([chunk(hidden_CH, targets_C) for hidden_CH, targets_C in chunks])
    return torch.cat([checkpoint(chunk, hidden_CH, targets_C, use_reentrant=False) for hidden_CH, targets_C in chunks])


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


def at_least_float32(logits: Tensor) -> Tensor:
    """Return the logits in float64 if they are float64, else in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


class _FrozenHead(torch.autograd.Function):
    """Log-probs whose gradient by the hidden states is computed in the forward pass; once differentiable.

    The head does not train, so the whole backward pass is one product per row: (d loss / d log p) x (d log p / d h),
    and the second factor, (M, H), is all that is kept for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        transform: LogitTransform,
        chunk_rows: int,
    ) -> Tensor:
        num_rows, dtype, device = len(hidden_MH), hidden_MH.dtype, hidden_MH.device
        # The products may be in half precision, the softmax may not: in bfloat16 it costs up to 7 nats per completion.
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        logps_M = torch.empty(num_rows, dtype=accumulate, device=device)
        gradient_MH = torch.empty_like(hidden_MH) if ctx.needs_input_grad[0] else None
        buffer_CV = torch.empty(min(chunk_rows, num_rows), len(weight_VH), dtype=dtype, device=device)
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, min(start + chunk_rows, num_rows))
            # One buffer serves every chunk, and what follows works in place: logits, then exp, then the gradient.
            logits_CV = torch.mm(hidden_MH[rows], weight_VH.t(), out=buffer_CV[: rows.stop - start]).to(accumulate)
            if bias_V is not None:
                logits_CV += bias_V
            slope_CV = transform.apply_(logits_CV)
            targets_C1 = targets_M[rows, None]
            picked_C = logits_CV.gather(1, targets_C1).squeeze(1)
            largest_C1 = logits_CV.amax(dim=1, keepdim=True)
            exp_CV = logits_CV.sub_(largest_C1).exp_()
            sums_C1 = exp_CV.sum(dim=1, keepdim=True)
            logps_M[rows] = picked_C - (largest_C1 + sums_C1.log()).squeeze(1)
            if gradient_MH is not None:
                # onehot(target) - softmax: dividing by -sums gives -softmax, the scatter adds 1 at the target
                by_logits_CV = exp_CV.div_(-sums_C1).scatter_add_(1, targets_C1, torch.ones_like(sums_C1))
                by_logits_CV.mul_(transform.scale if slope_CV is None else slope_CV)
                torch.mm(by_logits_CV.to(dtype), weight_VH, out=gradient_MH[rows])
        if gradient_MH is not None:
            ctx.save_for_backward(gradient_MH)
        return logps_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *by_logps: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient_MH,) = ctx.saved_tensors
        return gradient_MH * by_logps[0][:, None].to(gradient_MH.dtype), None, None, None, None, None
