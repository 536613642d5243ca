"""Number types of training: float32 masters for what trains under bfloat16, and a base quantised to four bits."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils.hub import cached_file

from bfpo.core.errors import MissingExtraError, ModelError
from bfpo.policy.devices import computes_bfloat16

__all__ = [
    "EMULATED",
    "HALF",
    "decoding_dtype",
    "emulates",
    "hold_masters",
    "in_float32",
    "margin_rounding",
    "prepare_quantised",
    "quantisation",
]

EMULATED = "this CPU has no instructions for it, float32 is faster"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def decoding_dtype(asked: str, saved: Any = None) -> tuple[str, str]:
    """Return the number type that holds weights which only generate, and why.

    "auto" is float16 for weights saved in it if they go to a GPU, else bfloat16 where the device computes in it
    natively, else float32. `saved`: the dtype that the model's config names.
    """
    if asked != "auto":
        return asked, f"as asked; {EMULATED}" if emulates(asked) else "as asked"
    if str(saved).removeprefix("torch.") == "float16" and torch.cuda.is_available():
        return "float16", "auto: as saved"
    if computes_bfloat16():
        return "bfloat16", "auto: the device computes in it"
    return "float32", "auto: the device has no instructions for bfloat16"


def emulates(dtype: str) -> bool:
    """Return whether the processor computes in this number type without instructions for it."""
    return dtype == "bfloat16" and not torch.cuda.is_available() and not computes_bfloat16()


def hold_masters(model: nn.Module, source: str | Path, *, revision: str | None = None) -> None:
    """Hold every parameter that trains in float32, with all the digits that the files of `source` have.

    Updates of a learning rate of 5e-7 are below half a unit in the last place of most bfloat16 weights and would be
    lost one by one; in float32 they add up. Where the files hold a parameter in float32, as those of an earlier run
    do, its value is read from there: loading in bfloat16 has rounded it. Call this before an optimizer is built; the
    forward pass then needs bfloat16 autocast.
    """
    masters = {name: p for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32}
    for parameter in masters.values():
        parameter.data = parameter.data.float()
    for name, value in _stored(source, revision, set(masters)):
        if value.dtype in (torch.float32, torch.float64) and value.shape == masters[name].shape:
            masters[name].data.copy_(value)


def _stored(source: str | Path, revision: str | None, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield those of the parameters that the files hold under the same name."""
    how = {"revision": revision or "main", "_raise_exceptions_for_missing_entries": False}
    index = cached_file(str(source), _INDEX, **how)
    if index is None:
        single = cached_file(str(source), _SINGLE, **how)
        files = {} if single is None else {single: names}
    else:
        places: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = {}
        for name in sorted(names & places.keys()):
            shard = cached_file(str(source), places[name], revision=revision or "main")
            files.setdefault(str(shard), set()).add(name)
    for file, wanted in files.items():
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(wanted & set(tensors.keys())):
                yield name, tensors.get_tensor(name)


def quantisation(dtype: torch.dtype) -> Any:
    """Return the settings of a base in four bits (NF4, with quantised constants), computing in `dtype`.

    Source: arXiv 2305.14314. Raises `MissingExtraError` without bitsandbytes.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("quantize: nf4 needs bitsandbytes; install it with: pip install 'bfpo[quant]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def prepare_quantised(model: nn.Module) -> None:
    """Keep the quantised weights in the form that has a gradient.

    On CPUs with bfloat16 instructions bitsandbytes repacks a weight at its first evaluation into a form whose product
    silently passes no gradient on; the reference pass evaluates before training.
    """
    quantised = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for module in quantised:
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if not any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        raise ModelError("quantize: nf4 found no linear layer to quantise in this model")


# Errors of log-probs between two batches that pad differently, relative to the log of the vocabulary, as measured on
# real models: of one token, where errors of several add up by chance, and the largest mean over the tokens of a text,
# widened several times. Half precision rounds hidden states, so its values reflect the matrix products, not the sum.
_TOKEN_ERROR = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1.25e-3, torch.bfloat16: 1e-2}
_LARGEST_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def margin_rounding(
    chosen_tokens: torch.Tensor,
    rejected_tokens: torch.Tensor,
    *,
    dtype: torch.dtype,
    log_vocabulary: float,
    reduction: str = "sum",
    largest: bool = False,
) -> torch.Tensor:
    """Return how far rounding moves a margin, (P,) float64, in nats; a margin that is no larger has no sign.

    `log_vocabulary`: the loss per token of a model without knowledge, in nats, the scale of logits and log-probs. With
    `largest`, all errors of a pair add up in one direction: a bound, not the usual size.
    """
    lengths_2P = torch.stack([chosen_tokens, rejected_tokens]).double()
    if largest:
        # Two means over tokens are each of the size of one token's log-prob.
        size_P = lengths_2P.sum(0) if reduction == "sum" else torch.full_like(lengths_2P[0], 2.0)
        return _LARGEST_ERROR[dtype] * (1 + size_P * log_vocabulary)
    variance_P = (1 / lengths_2P.clamp(min=1) if reduction == "mean" else lengths_2P).sum(0)
    return _TOKEN_ERROR[dtype] * log_vocabulary * variance_P.sqrt()


HALF = (torch.float16, torch.bfloat16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Compute in float32 whatever dtype the weights are held in, without a second copy of the model.

    Autocast and TF32 are off. Weights in half precision are float32 while they are used: those of a layer (an element
    of a `ModuleList`) while it runs, the others throughout. Quantised weights stay, and their products are float32.
    Afterwards every tensor is the one that it was. The model must not be sharded.
    """
    layers = _layers(model)
    inside = {id(tensor) for layer in layers for tensor in _half_tensors(layer)}
    others = [tensor for tensor in _half_tensors(model) if id(tensor) not in inside]
    matmul, device = torch.get_float32_matmul_precision(), next(model.parameters()).device.type
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, matmul)
        torch.set_float32_matmul_precision("highest")
        stack.enter_context(torch.autocast(device, enabled=False))
        for module in model.modules():
            if getattr(module, "compute_dtype", None) in HALF:  # a quantised linear layer
                stack.callback(setattr, module, "compute_dtype", module.compute_dtype)
                module.compute_dtype = torch.float32  # type: ignore[assignment]
        _widen(others, stack)
        running: dict[nn.Module, ExitStack] = {}
        for layer in layers:

            def enter(module: nn.Module, _: Any) -> None:
                _widen(_half_tensors(module), running.setdefault(module, ExitStack()))

            def leave(module: nn.Module, *_: Any) -> None:
                running.pop(module, ExitStack()).close()

            stack.callback(leave, layer)
            stack.callback(layer.register_forward_pre_hook(enter).remove)
            stack.callback(layer.register_forward_hook(leave, always_call=True).remove)
        yield


def _layers(module: nn.Module) -> list[nn.Module]:
    """Return the elements of the outermost lists of modules, each once."""
    found: dict[nn.Module, None] = {}
    for child in module.children():
        found.update(dict.fromkeys(child if isinstance(child, nn.ModuleList) else _layers(child)))
    return list(found)


def _half_tensors(module: nn.Module) -> list[torch.Tensor]:
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype in HALF]


def _widen(tensors: list[torch.Tensor], until: ExitStack) -> None:
    for tensor in tensors:
        until.callback(setattr, tensor, "data", tensor.data)
        tensor.data = tensor.data.float()
