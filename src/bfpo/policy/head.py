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
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

__all__ = ["CHUNK_ROWS", "LogitTransform", "at_least_float32", "head_logps", "is_linear", "tied_embedding", "tied_rows"]

CHUNK_ROWS = 256
"""Rows of logits in memory at a time: 256 x V numbers, enough to keep a matrix product busy."""
_WEIGHT_ROWS = 8192  # rows of a weight whose gradient is added at a time


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
    weight: Tensor | None = None,
) -> Tensor:
    """Return log p(target), (M,) in nats: float64 if the logits are, else float32.

    `hidden` (M, H), `targets` (M,) int64. For a frozen linear head, the gradient with respect to the hidden states is
    computed in the forward pass: it does not depend on the loss, so 4 M H V operations do where recomputing needs 6 M H
    V. For a linear head that trains, the logits of all chunks but the last are computed again in the backward pass, in
    place: 6 M H V operations for the last chunk, 8 M H V for the others. A head with an adapter or quantised weights is
    run again, chunk by chunk. `weight`, from `tied_rows`, stands for the weight of a linear head.
    """
    if is_linear(head):
        # Autocast does not reach products that write to `out=`, so its dtype is applied by hand and autocast is off
        # inside.
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        trains = any(parameter.requires_grad for parameter in head.parameters())
        function = _TrainedHead if trains else _FrozenHead
        with torch.autocast(device, enabled=False):
            weight = head.weight if weight is None else weight
            inputs = (hidden.to(dtype), weight, head.bias, targets, transform, chunk_rows)
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


def is_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether it is a plain matrix of numbers; adapters and quantised weights have a forward of their own."""
    return (
        isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and head.weight.dtype.is_floating_point
    )


def at_least_float32(logits: Tensor) -> Tensor:
    """Return the logits in float64 if they are float64, else in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


class _Chunks:
    """Logits of one chunk of rows after the other, all in the same buffer.

    Only the first chunk may be short, so that the last one, which a head that trains keeps, is as large as it can be.
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

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield the rows, their transformed logits (C, V), to be changed in place, and the slope of the transform."""
        num, chunk_rows = len(self.hidden_MH), self.chunk_rows
        buffer_CV = self.hidden_MH.new_empty(min(chunk_rows, num), len(self.weight_VH))
        for stop in range(num - (num - 1) // chunk_rows * chunk_rows, num + 1, chunk_rows):
            rows = slice(max(0, stop - chunk_rows), stop)
            products_CV = buffer_CV[: stop - rows.start]
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
    """Log-probs under a head that trains; once differentiable.

    Kept between the passes: the inputs, the weight in the dtype of the products, the logarithm of each row's softmax
    sum, (M,), and of the last chunk exp(logits - largest). The backward pass turns these into a gradient in place and
    drops them; it would need a buffer of their size in any case. It computes the logits of the other chunks again, as
    does a second backward pass of all chunks. The gradient of the weight is the sum of a product per chunk, in the
    weight's own dtype.
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
        ctx.kept = None
        for rows, logits_CV, slope_CV in chunks:
            logps_M[rows], log_sums_M[rows], sums_C1 = _softmax_sums(logits_CV, targets_M[rows, None])
            ctx.kept = (rows, logits_CV, sums_C1, slope_CV)
        ctx.save_for_backward(hidden_MH, chunks.weight_VH, bias_V, targets_M, log_sums_M)
        ctx.transform, ctx.chunk_rows, ctx.weight_dtype = transform, chunk_rows, weight_VH.dtype
        return logps_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *by_logps: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden_MH, weight_VH, bias_V, targets_M, log_sums_M = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        by_hidden_MH = torch.empty_like(hidden_MH) if needs_hidden else None
        by_bias_V = torch.zeros_like(bias_V) if needs_bias else None
        by_weight_VH: Tensor | None = None

        def add(rows: slice, by_logits_CV: Tensor, slope_CV: Tensor | None) -> None:
            """Add a chunk, given -softmax x (d loss / d log p)."""
            nonlocal by_weight_VH
            by_logits_CV.scatter_add_(1, targets_M[rows, None], by_logps[0][rows, None])
            by_logits_CV.mul_(ctx.transform.scale if slope_CV is None else slope_CV)
            if by_bias_V is not None:
                by_bias_V.add_(by_logits_CV.sum(dim=0))
            factor_CV = by_logits_CV.to(hidden_MH.dtype)
            if by_hidden_MH is not None:
                torch.mm(factor_CV, weight_VH, out=by_hidden_MH[rows])
            if not needs_weight:
                return
            if factor_CV.dtype == ctx.weight_dtype:
                if by_weight_VH is None:
                    by_weight_VH = torch.mm(factor_CV.t(), hidden_MH[rows])
                else:
                    torch.addmm(by_weight_VH, factor_CV.t(), hidden_MH[rows], out=by_weight_VH)
                return
            # Float32 masters under bfloat16: the product of all rows, in both dtypes, would take 1.5 times the memory
            # of the gradient, at what is often the peak of a step.
            if by_weight_VH is None:
                by_weight_VH = torch.zeros_like(weight_VH, dtype=ctx.weight_dtype)
            for start in range(0, len(by_weight_VH), _WEIGHT_ROWS):
                some = slice(start, start + _WEIGHT_ROWS)
                by_weight_VH[some] += factor_CV[:, some].t() @ hidden_MH[rows]

        num_left, kept, ctx.kept = len(hidden_MH), ctx.kept, None
        with torch.autocast(hidden_MH.device.type, enabled=False):
            if kept is not None:
                rows, exps_CV, sums_C1, slope_CV = kept
                add(rows, exps_CV.mul_(-by_logps[0][rows, None] / sums_C1), slope_CV)
                num_left = rows.start
                del kept, exps_CV, slope_CV  # before the next chunk takes as much memory
            for rows, logits_CV, slope_CV in _Chunks(
                hidden_MH[:num_left], weight_VH, bias_V, ctx.transform, ctx.chunk_rows
            ):
                softmax_CV = logits_CV.sub_(log_sums_M[rows, None]).exp_()
                add(rows, softmax_CV.mul_(-by_logps[0][rows, None]), slope_CV)
        if needs_weight and by_weight_VH is None:  # no row at all
            by_weight_VH = torch.zeros_like(weight_VH, dtype=ctx.weight_dtype)
        return by_hidden_MH, by_weight_VH, by_bias_V, None, None, None


def tied_embedding(model: nn.Module, head: nn.Module) -> nn.Embedding | None:
    """Return the plain embedding whose weight is that of this linear head, where `tied_rows` serves it.

    That is: the weight trains, whole, in float32 at least, on a CPU. `index_add_` adds in a fixed order there, and in
    bfloat16 it would round at each token.
    """
    if not is_linear(head) or type(head.weight) is not nn.Parameter:  # sharded and quantised ones are subclasses
        return None
    weight = head.weight
    whole = weight.dim() == 2 and weight.dtype in (torch.float32, torch.float64) and weight.device.type == "cpu"
    if not (whole and weight.requires_grad):
        return None
    for module in model.modules():
        if type(module) is nn.Embedding and module.weight is weight:
            plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
            return module if plain and weight.shape == (module.num_embeddings, module.embedding_dim) else None
    return None


def tied_rows(embedding: nn.Embedding, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embeddings of `ids`, (*, H), and the weight for the head that is tied to them.

    The gradient of that weight, (V, H), comes back here, and what the embeddings add to it is added in place: autograd
    alone would make a second (V, H) for them, of zeros but for the rows of `ids`, and add the two.
    """
    rows, weight = _TiedRows.apply(embedding.weight, ids, embedding.padding_idx)  # type: ignore[no-untyped-call]
    return rows, weight


class _TiedRows(torch.autograd.Function):
    """What `tied_rows` returns; once differentiable."""

    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor, ids: Tensor, padding: int | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.set_materialize_grads(False)
        ctx.padding, ctx.shape = padding, weight_VH.shape
        return functional.embedding(ids, weight_VH), weight_VH.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_rows: Tensor | None, by_weight_VH: Tensor | None) -> tuple[Tensor | None, None, None]:
        if by_rows is not None:
            ids_T, by_rows_TH = ctx.saved_tensors[0].flatten(), by_rows.flatten(0, -2)
            if ctx.padding is not None:  # the embedding of this token does not train
                kept = ids_T != ctx.padding
                ids_T, by_rows_TH = ids_T[kept], by_rows_TH[kept]
            if by_weight_VH is None:
                by_weight_VH = by_rows.new_zeros(ctx.shape)
            by_weight_VH.index_add_(0, ids_T, by_rows_TH)
        return by_weight_VH, None, None
