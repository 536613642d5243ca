"""Log-probs of target tokens from hidden states, never more than a chunk of rows x vocabulary at a time.

For a row h of hidden states and the head W, b, with f the model's transform of its logits: z = f(W h + b) and

    log p(t) = z[t] - log sum_v exp(z[v])
    d log p(t) / d h = W' [f'(W h + b) * (onehot(t) - softmax(z))]      W' the transpose, * elementwise

Axes: M rows, one for each completion token; C rows of one chunk; H hidden size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    V. For a linear head that trains, logits are computed again in the backward pass, in place (8 M H V). A head with an
    adapter or quantised weights is run again, chunk by chunk.
    """
    if _is_linear(head):
        # Autocast does not reach products that write to `out=`, so its dtype is applied by hand and autocast is off
        # inside.
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        trains = any(parameter.requires_grad for parameter in head.parameters())
        function = _TrainedHead if trains else _FrozenHead
        with torch.autocast(device, enabled=False):
            inputs = (hidden.to(dtype), head.weight, head.bias, targets, transform, chunk_rows)
            logps_M: Tensor = function.apply(*inputs)  # type: ignore[no-untyped-call]
        return logps_M

    def chunk(hidden_CH: Tensor, targets_C: Tensor) -> Tensor:
        logits_CV = transform.apply(at_least_float32(head.forward(hidden_CH)))
        picked_C = logits_CV.gather(1, targets_C[:, None]).squeeze(1)
        return picked_C - torch.logsumexp(logits_CV, dim=1)

    chunks = zip(torch.split(hidden, chunk_rows), torch.split(targets, chunk_rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([chunk(hidden_CH, targets_C) for hidden_CH, targets_C in chunks])
    return torch.cat([checkpoint(chunk, hidden_CH, targets_C, use_reentrant=False) for hidden_CH, targets_C in chunks])


def _is_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a plain matrix of numbers; adapters and quantised weights have a forward of their own."""
    return (
        isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and head.weight.dtype.is_floating_point
    )


def at_least_float32(logits: Tensor) -> Tensor:
    """Return the logits in float64 if they are float64, else in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


class _Chunks:
    """Logits of one chunk of rows after the other, all in the same buffer.

    The products are in the dtype of the hidden states. The softmax is float32 at least: in bfloat16 it costs up to 7
    nats per completion.
    """

    def __init__(
        self, hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, transform: LogitTransform, chunk_rows: int
    ) -> None:
        dtype = hidden_MH.dtype
        self.hidden_MH, self.weight_VH = hidden_MH, weight_VH.to(dtype)
        self.bias_V = None if bias_V is None else bias_V.to(dtype)
        self.transform, self.chunk_rows = transform, chunk_rows
        self.accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        self._buffer_CV = hidden_MH.new_empty(min(chunk_rows, len(hidden_MH)), len(weight_VH))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield the rows, their transformed logits (C, V), to be changed in place, and the slope of the transform."""
        for start in range(0, len(self.hidden_MH), self.chunk_rows):
            rows = slice(start, min(start + self.chunk_rows, len(self.hidden_MH)))
            products_CV = self._buffer_CV[: rows.stop - start]
            logits_CV = torch.mm(self.hidden_MH[rows], self.weight_VH.t(), out=products_CV).to(self.accumulate)
            if self.bias_V is not None:
                logits_CV += self.bias_V
            yield rows, logits_CV, self.transform.apply_(logits_CV)


def _softmax_sums(logits_CV: Tensor, targets_C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs (C,), log sums (C,) and sums (C, 1) of exp(logits - largest), which the logits become."""
    picked_C = logits_CV.gather(1, targets_C1).squeeze(1)
    largest_C1 = logits_CV.amax(dim=1, keepdim=True)
    sums_C1 = logits_CV.sub_(largest_C1).exp_().sum(dim=1, keepdim=True)
    log_sums_C = (largest_C1 + sums_C1.log()).squeeze(1)
    return picked_C - log_sums_C, log_sums_C, sums_C1


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
        chunks = _Chunks(hidden_MH, weight_VH, bias_V, transform, chunk_rows)
        logps_M = hidden_MH.new_empty(len(hidden_MH), dtype=chunks.accumulate)
        gradient_MH = torch.empty_like(hidden_MH) if ctx.needs_input_grad[0] else None
        for rows, logits_CV, slope_CV in chunks:
            targets_C1 = targets_M[rows, None]
            logps_M[rows], _, sums_C1 = _softmax_sums(logits_CV, targets_C1)
            if gradient_MH is not None:
                # onehot(target) - softmax: dividing by -sums gives -softmax, the scatter adds 1 at the target
                by_logits_CV = logits_CV.div_(-sums_C1).scatter_add_(1, targets_C1, torch.ones_like(sums_C1))
                by_logits_CV.mul_(transform.scale if slope_CV is None else slope_CV)
                torch.mm(by_logits_CV.to(hidden_MH.dtype), chunks.weight_VH, out=gradient_MH[rows])
        if gradient_MH is not None:
            ctx.save_for_backward(gradient_MH)
        return logps_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *by_logps: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient_MH,) = ctx.saved_tensors
        return gradient_MH * by_logps[0][:, None].to(gradient_MH.dtype), None, None, None, None, None


class _TrainedHead(torch.autograd.Function):
    """Log-probs under a head that trains; the backward pass computes the logits again; once differentiable.

    Kept between the passes: the inputs and the logarithm of each row's softmax sum, (M,). The gradient of the weight
    is the sum of a product per chunk, in the weight's own dtype.
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
        chunks = _Chunks(hidden_MH, weight_VH, bias_V, transform, chunk_rows)
        logps_M = hidden_MH.new_empty(len(hidden_MH), dtype=chunks.accumulate)
        log_sums_M = torch.empty_like(logps_M)
        for rows, logits_CV, _ in chunks:
            logps_M[rows], log_sums_M[rows], _ = _softmax_sums(logits_CV, targets_M[rows, None])
        ctx.save_for_backward(hidden_MH, weight_VH, bias_V, targets_M, log_sums_M)
        ctx.transform, ctx.chunk_rows = transform, chunk_rows
        return logps_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *by_logps: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden_MH, weight_VH, bias_V, targets_M, log_sums_M = ctx.saved_tensors
        makes = (hidden_MH, weight_VH, bias_V)
        by_hidden_MH, by_weight_VH, by_bias_V = (
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip(makes, ctx.needs_input_grad[:3], strict=True)
        )
        with torch.autocast(hidden_MH.device.type, enabled=False):
            chunks = _Chunks(hidden_MH, weight_VH, bias_V, ctx.transform, ctx.chunk_rows)
            for rows, logits_CV, slope_CV in chunks:
                by_logps_C1 = by_logps[0][rows, None]
                by_logits_CV = logits_CV.sub_(log_sums_M[rows, None]).exp_().mul_(-by_logps_C1)
                by_logits_CV.scatter_add_(1, targets_M[rows, None], by_logps_C1)
                by_logits_CV.mul_(ctx.transform.scale if slope_CV is None else slope_CV)
                if by_bias_V is not None:
                    by_bias_V += by_logits_CV.sum(dim=0)
                factor_CV = by_logits_CV.to(hidden_MH.dtype)
                if by_hidden_MH is not None:
                    torch.mm(factor_CV, chunks.weight_VH, out=by_hidden_MH[rows])
                if by_weight_VH is None:
                    continue
                if by_weight_VH.dtype == factor_CV.dtype:
                    torch.addmm(by_weight_VH, factor_CV.t(), hidden_MH[rows], out=by_weight_VH)
                else:  # float32 masters under bfloat16
                    by_weight_VH += factor_CV.t() @ hidden_MH[rows]
        return by_hidden_MH, by_weight_VH, by_bias_V, None, None, None
