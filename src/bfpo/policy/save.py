"""Save a model as a plain one: adapters merged, four-bit weights dequantised, sharded ones from a gathered state."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bfpo.core.errors import ModelError, first_line
from bfpo.data.chat import end_token_id
from bfpo.policy.load import load_policy, load_tokenizer, require_no_adapter, with_template_of
from bfpo.policy.source import configured_ends

__all__ = ["save_adapted", "save_policy"]

_REPLACED = ".original_module."  # in names of weights of which peft trains a copy


def save_policy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    stored: torch.dtype | None = None,
) -> None:
    """Write the model (safetensors) and its tokenizer to a folder; an adapter is merged into the weights first.

    LoRA is merged weight by weight and the results are held on the CPU: the model's device needs room for one weight.
    Other adapters are merged in a copy of the model. A quantised base is written dequantised. The model in memory keeps
    its adapter. Its config allows the key-value cache in generation again, which training had switched off, and
    generation ends at the token that ends an answer under the tokenizer's chat template too. `state_dict`: the whole
    weights of a sharded model, by its own names; its parameters are then not read. `stored`: the number type of the
    file, to which weights with an adapter are rounded once they are merged; by default that of the model.

    Raises `ModelError` for a model onto which transformers itself has put an adapter.
    """
    folder = Path(folder)
    adapted = hasattr(model, "merge_adapter")
    base = model.get_base_model() if adapted else model
    require_no_adapter(base, getattr(base.config, "_name_or_path", ""))
    base.config.use_cache = True
    if tokenizer.chat_template and getattr(base, "generation_config", None) is not None:
        _end_at_turns(base.generation_config, tokenizer)
    parts_only = state_dict is not None or getattr(base, "is_quantized", False)
    if not adapted and not parts_only:
        (base if stored is None else base.to(stored)).save_pretrained(folder)
    else:
        try:
            weights = _whole_weights(model, state_dict)
        except ModelError:
            if parts_only:
                raise
            merged = deepcopy(model).merge_and_unload()
            ends = [merged.get_input_embeddings(), merged.get_output_embeddings()]
            if ends[1] is not None and ends[0].weight is not ends[1].weight:
                merged.config.tie_word_embeddings = False
            (merged if stored is None else merged.to(stored)).save_pretrained(folder)
        else:
            if stored is not None:
                weights = {name: _stored(value, stored) for name, value in weights.items()}
            _save_plain(base, weights, folder)
    tokenizer.save_pretrained(folder)


def _end_at_turns(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    with suppress(ModelError):  # a template that renders no chat, or no end token at all
        ends = sorted({*configured_ends(config, tokenizer), end_token_id(tokenizer)})
        config.eos_token_id = ends if len(ends) > 1 else ends[0]


def save_adapted(
    model: str | Path,
    adapter: str | Path,
    folder: str | Path,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    stored: torch.dtype | None = None,
) -> None:
    """Write a model with a LoRA adapter, such as a checkpoint of its training, merged in `dtype`; see `save_policy`.

    A tokenizer or chat template in the adapter's folder takes the place of the model's own.
    Raises `ModelError` as `load_policy` does, and for an adapter that does not fit the model.
    """
    import peft

    base = load_policy(model, dtype=dtype, revision=revision)
    own = (Path(adapter) / "tokenizer_config.json").is_file()  # what it was trained with: a template, more tokens
    tokenizer = load_tokenizer(adapter) if own else base.tokenizer
    try:
        adapted = peft.PeftModel.from_pretrained(base.model, str(adapter), trust_remote_code=False)
    except Exception as error:  # files and sizes have their own classes
        raise ModelError(
            f"adapter: {str(adapter)!r} does not fit {str(model)!r} ({first_line(error)}); give the model that it was "
            "trained on"
        ) from error
    save_policy(adapted, with_template_of(tokenizer, adapter), folder, stored=stored)


def _whole_weights(model: Any, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the weights of a model with its LoRA adapter merged in, by the names of the bare model, on the CPU.

    `state_dict`: the model's state if its own parameters are only shards; by default it is read from the model. For a
    base in four bits this is the model that was trained: the dequantised weights plus the update. Merging as peft does
    would round the sum to four bits again.

    A weight that several modules share is given once. Raises `ModelError` for adapters that are not a low-rank product
    alone.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    state = base.state_dict() if state_dict is None else _of_base(model, base, state_dict)
    adapter = str(getattr(model, "active_adapter", ""))
    shared = _second_names(base)
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if "lora_" in name or ".weight." in name:  # adapters, and the constants of quantised weights
            continue
        if _REPLACED in name:  # by what was trained whole beside the adapter (modules_to_save)
            continue
        path, _, leaf = name.rpartition(".")
        bare = name.replace(".base_layer.", ".").replace(f".modules_to_save.{adapter}.", ".")
        if bare in shared:
            continue
        whole = _dequantised(base, name, tensor.detach())
        if path.endswith(".base_layer") and leaf == "weight":
            delta = _delta(base, path.removesuffix(".base_layer"), adapter, state)
            whole = (whole + delta.to(whole.device)).to(whole.dtype)
        weights[bare] = whole.to("cpu").contiguous()
    return weights


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _save_plain(base: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write `weights` as a model of the kind of `base`, which may be quantised, sharded or have adapters."""
    config = deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    head = base.get_output_embeddings()
    if any(f"{name}.weight" in weights for name, module in base.named_modules() if module is head):
        config.tie_word_embeddings = False  # one of the two was trained whole, apart from the other
    with torch.device("meta"):
        plain = _plain_class(type(base))(config)
        plain.tie_weights()  # older versions of transformers leave that to loading
    plain.to(next(value.dtype for value in weights.values() if value.is_floating_point()))
    lacking = {name for name, _ in plain.named_parameters()} - weights.keys()
    if lacking:
        raise ModelError(f"the model cannot be saved: {len(lacking)} weights are missing, such as {min(lacking)}")
    if hasattr(base, "generation_config"):  # a classifier has none
        plain.generation_config = base.generation_config
    plain.save_pretrained(folder, state_dict=dict(weights))


def _of_base(model: Any, base: Any, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}


def _second_names(base: Any) -> set[str]:
    """Return the names of parameters that are there under an earlier name too, unless only one has an adapter."""
    first: dict[tuple[int, int], str] = {}
    for name, value in base.named_parameters(remove_duplicate=False):
        path, adapter, _ = name.rpartition(".base_layer.")
        layer = id(base.get_submodule(path)) if adapter else 0
        if _REPLACED not in name:
            first.setdefault((id(value), layer), name)
    names = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    return {name.replace(".base_layer.", ".") for name in names - set(first.values()) if _REPLACED not in name}


def _dequantised(base: Any, name: str, tensor: Tensor) -> Tensor:
    path, _, leaf = name.rpartition(".")
    # a name may also belong to a buffer, or to other state of a module
    constants = getattr(getattr(base.get_submodule(path), leaf, None), "quant_state", None)
    if constants is None:
        return tensor
    from bitsandbytes.functional import dequantize_4bit

    whole: Tensor = dequantize_4bit(tensor.to(constants.absmax.device), constants)
    return whole


def _delta(base: Any, path: str, adapter: str, state: Mapping[str, Tensor]) -> Tensor:
    """Return what the adapter adds to the weight of the module at `path`, in float32 at least."""
    layer = base.get_submodule(path)
    of_layer = {name.removeprefix(f"{path}.") for name in state if name.startswith(f"{path}.lora_")}
    linear = (f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight")
    embedding = (f"lora_embedding_A.{adapter}", f"lora_embedding_B.{adapter}")
    names = next((kind for kind in (linear, embedding) if of_layer == set(kind)), None)
    if names is None or state[f"{path}.{names[0]}"].dim() != 2:
        raise ModelError(
            f"the adapter of {path} cannot be merged: it has {', '.join(sorted(of_layer))}; allowed: plain LoRA of "
            "linear and embedding layers"
        )
    down, up = (state[f"{path}.{name}"].detach() for name in names)
    dtype = torch.promote_types(down.dtype, torch.float32)
    product: Tensor = up.to(dtype) @ down.to(dtype) * layer.scaling[adapter]
    return product.T if names is embedding or layer.fan_in_fan_out else product


def _plain_class(kind: type[Any]) -> type[Any]:
    """Return the class of a model, without the class that `fully_shard` has put in front."""
    if not torch.distributed.is_available():
        return kind
    from torch.distributed.fsdp import FSDPModule

    return next(one for one in kind.__mro__ if not issubclass(one, FSDPModule))
