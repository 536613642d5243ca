"""Activations that the backward pass computes again instead of keeping them: all within a block, or the cheap ones."""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from bfpo.core.errors import SettingError

__all__ = ["Recompute", "set_recompute"]

Recompute = bool | Literal["selective"]
"""`True`: all within a block, of which its input alone is kept. "selective": all but the results of products with
weights and of attention, which take almost all of the time of a block."""

# A product of two activations, such as the scores of attention written out, is as large as what it saves: not kept.
_KEPT = ("mm", "addmm", "_grouped_mm")
_ATTENTION = (
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    "_scaled_dot_product_fused_attention_overrideable",
)
_COMPILED = ("flex_attention", "inductor_compiled_code")  # operators that hold others


def set_recompute(model: Any, wanted: Recompute, *, preserve_rng_state: bool = True) -> None:
    """Switch the recomputation of a model of transformers, under the name that its version has for it.

    `preserve_rng_state`: whether dropout draws the same numbers again. Raises `SettingError` for a model that cannot
    recompute; with "selective" its backward pass does for one that changes the result of a product in place.
    """
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if wanted:
        settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
        if wanted == "selective":
            settings["context_fn"] = _contexts
        try:
            getattr(model, f"{name}_checkpointing_enable")(settings)
        except ValueError as error:
            raise SettingError(f"gradient_checkpointing: {str(error).rstrip('.')}; leave it out") from error
    elif getattr(model, f"is_{name}_checkpointing"):
        getattr(model, f"{name}_checkpointing_disable")()


def _contexts() -> tuple[Any, Any]:
    """Return the contexts of the forward pass of a block and of its repetition."""
    changed: list[Any] = []

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if _changes_kept(held(), _changed(operator, args, kwargs)):
            changed.append(operator)
        kept = operator in _kept() or getattr(operator, "namespace", "") == "flash_attn"
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    forward, again = create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
    held = weakref.ref(forward)  # a cycle would hold what is kept beyond the backward pass
    return forward, _Again(again, changed)


class _Again:
    """The context of the repetition; raises `SettingError` if a result that is kept was changed in place.

    The change would be made twice. Torch notices by the version of a tensor, which a reshaped product does not share.
    """

    def __init__(self, context: Any, changed: list[Any]) -> None:
        self._context, self._changed = context, changed

    def __enter__(self) -> None:
        if self._changed:
            raise SettingError(
                f"gradient_checkpointing: got selective with a model that changes the result of a product in place "
                f"({self._changed[0]}); set gradient_checkpointing: true"
            )
        self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)


def _changes_kept(forward: Any, changed: list[Any]) -> bool:
    if forward is None or not changed:  # None: in the repetition, where older versions of torch ask too
        return False
    kept = [getattr(leaf, "val", None) for leaf in tree_leaves(forward.storage)]
    ours, theirs = (
        {value.untyped_storage()._cdata for value in values if isinstance(value, Tensor)} for values in (kept, changed)
    )
    return not ours.isdisjoint(theirs)


def _changed(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operator writes to."""
    names = _written(operator)
    return tree_leaves([args[name] if isinstance(name, int) else kwargs.get(name) for name in names])


@cache
def _written(operator: Any) -> tuple[int | str, ...]:
    schema = getattr(operator, "_schema", None)  # which operators that hold others lack
    if schema is None or not schema.is_mutable:
        return ()
    return tuple(
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@cache
def _kept() -> frozenset[Any]:
    """Return the operators of this version of torch whose results are kept."""
    found = {getattr(torch.ops.aten, name).default for name in (*_KEPT, *_ATTENTION) if hasattr(torch.ops.aten, name)}
    return frozenset({*found, *(op for name in _COMPILED if (op := getattr(torch.ops.higher_order, name, None)))})
