"""A saved model -> one GGUF file, as llama.cpp reads it: Llama, Qwen2 and Qwen3 with a byte-level BPE tokenizer.

What is not known to mean the same in llama.cpp is refused, never guessed. The package `gguf` has the names of tensors
and keys, and writes the file; it has no converter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bfpo.core.errors import MissingExtraError, ModelError
from bfpo.policy.blend import open_source, read_tensor
from bfpo.policy.load import load_tokenizer
from bfpo.policy.source import num_positions, read_config

__all__ = ["GGUF_KINDS", "import_gguf", "write_gguf"]

GGUF_KINDS = ("f32", "f16", "bf16", "q8_0")
"""Number types of the matrices; vectors are float32 in each."""

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
_BLOCK = 32  # numbers that share a scale in q8_0

# How a text is cut into words before the merges: llama.cpp knows these by a name.
_GPT2_WORDS: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_DIGITS: dict[str, Any] = {"type": "Digits", "individual_digits": True}
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": f"{_ENDINGS}{numbers}{_REST}"},
        "behavior": "Isolated",
        "invert": False,
    }


# name -> steps of the pre-tokenizer, whether whole words of the vocabulary skip the merges, allowed normalizers
_WORDS: dict[str, tuple[list[dict[str, Any]], bool, tuple[str | None, ...]]] = {
    "gpt-2": ([_GPT2_WORDS], False, (None,)),
    "smollm": ([_DIGITS, _GPT2_WORDS], False, (None,)),
    "llama-bpe": ([_split(r"\p{N}{1,3}"), _BYTES], True, (None,)),
    "qwen2": ([_split(r"\p{N}"), _BYTES], False, (None, "NFC")),
}


def import_gguf() -> Any:
    """Return the package; raises `MissingExtraError` without it."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(
            "a GGUF file needs the package gguf; install it with: pip install 'bfpo[gguf]'"
        ) from error
    return gguf


def write_gguf(
    folder: Path,
    file: Path,
    kind: str,
    *,
    name: str,
    end_ids: Collection[int],
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Write the model of `folder` (config, safetensors, tokenizer) to `file` and return the number of its tensors.

    `kind` is one of `GGUF_KINDS`; a matrix whose rows are no multiple of 32 is float16 in place of q8_0. `end_ids`: all
    tokens that end an answer. Memory is a few times that of the largest tensor. `advance` is called after each tensor.

    Raises `ModelError` for a model or tokenizer that is not known to mean the same in llama.cpp, and `OSError` for a
    file that cannot be written.
    """
    gguf = import_gguf()
    config = read_config(folder)
    _check_config(config)
    source = open_source(str(folder), name="model")
    writer = gguf.GGUFWriter(file, config.model_type)
    _add_sizes(writer, config, name)
    writer.add_file_type(int(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]))
    writer.add_quantization_version(int(gguf.GGML_QUANT_VERSION))
    _add_tokenizer(writer, gguf, folder, config.vocab_size, end_ids)
    names = gguf.get_tensor_name_map(_arch_of(gguf, config.model_type), config.num_hidden_layers)
    plan = []
    for key, (path, shape) in source.tensors.items():
        theirs = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise _refused(f"its tensor {key} has no name in GGUF files of {config.model_type}")
        qtype = _type_of(gguf, kind, shape)
        stored = gguf.quant_shape_to_byte_shape(shape, qtype) if qtype.name in ("BF16", "Q8_0") else shape
        dtype = {"F32": np.float32, "F16": np.float16}.get(qtype.name, np.uint8)
        num_bytes = int(np.prod(stored)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(theirs, stored, np.dtype(dtype), num_bytes, raw_dtype=qtype)
        plan.append((key, path, qtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, path, qtype in plan:
        writer.write_tensor_data(_stored(gguf, key, read_tensor(path, key), qtype, config))
        advance(1)
    writer.close()
    return len(plan)


def _arch_of(gguf: Any, model_type: str) -> Any:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == model_type)


def _type_of(gguf: Any, kind: str, shape: tuple[int, ...]) -> Any:
    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType["F16" if kind == "q8_0" and shape[-1] % _BLOCK else kind.upper()]


def _stored(gguf: Any, key: str, tensor: Tensor, qtype: Any, config: Any) -> Any:
    """Return the tensor as the file holds it."""
    values = tensor.to(torch.float32)
    if config.model_type == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
        values = _interleaved(values, heads)
    if qtype.name == "F16" and values.abs().max() > torch.finfo(torch.float16).max:
        raise ModelError(f"gguf: {key} has values beyond the range of float16; give bf16, q8_0 or f32")
    return gguf.quantize(np.ascontiguousarray(values.numpy()), qtype)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Return the rows of each head in the order that llama.cpp rotates for Llama: (0, half, 1, half + 1, ...).

    transformers rotates a head's first half with its second half.
    """
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _check_config(config: Any) -> None:
    """Raise `ModelError` for an architecture, or a setting of it, that is not known to mean the same."""
    if _CLASSES.get(config.model_type) not in (config.architectures or ()):
        known = ", ".join(_CLASSES)
        raise _refused(f"its architecture is {config.model_type}, and this command knows {known}")
    for key, only in _ONLY.items():
        if (value := getattr(config, key, only)) not in (only, None):
            raise _refused(f"config.json has {key} = {value!r}, and this command knows {only!r}")
    rope = getattr(config, "rope_parameters", None) or {}
    if (scaling := rope.get("rope_type", "default")) != "default":
        raise _refused(f"config.json scales its positions by {scaling!r}")
    if float(rope.get("partial_rotary_factor") or 1) != 1:
        raise _refused("config.json rotates only a part of each head")


def _add_sizes(writer: Any, config: Any, name: str) -> None:
    rope: Mapping[str, Any] = config.rope_parameters
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(num_positions(config) or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))


# The tokenizer


def _add_tokenizer(writer: Any, gguf: Any, folder: Path, vocab_size: int, end_ids: Collection[int]) -> None:
    """Write tokens, merges, special tokens and the chat template; raises `ModelError` for another kind of tokenizer."""
    tokenizer = load_tokenizer(folder)
    try:
        described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        model = described["model"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _refused(f"its tokenizer.json cannot be read ({type(error).__name__})") from error
    words = _words_of(described)
    texts, types = _tokens(gguf, described, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id}
    ids["pad"] = tokenizer.pad_token_id
    others = sorted(set(end_ids) - {ids["eos"]})
    ids["eot"] = others[0] if len(others) == 1 else None
    for kind, value in ids.items():
        if value is not None:
            getattr(writer, f"add_{kind}_token_id")(value)
    ids_of_a = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(ids_of_a) and ids_of_a[0] == ids["bos"] is not None)
    writer.add_add_eos_token(bool(ids_of_a) and ids_of_a[-1] == ids["eos"] is not None)
    writer.add_add_space_prefix(False)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # of several names
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _words_of(described: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of how the tokenizer cuts texts into words."""
    model = described["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise _refused("its tokenizer is not a byte-level BPE")
    steps = described.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    normalizer = (described.get("normalizer") or {}).get("type")
    for name, (wanted, whole_words, normalizers) in _WORDS.items():
        same = len(steps) == len(wanted) and all(
            all(step.get(key) == value for key, value in want.items()) for step, want in zip(steps, wanted, strict=True)
        )
        if same and bool(model.get("ignore_merges")) == whole_words and normalizer in normalizers:
            return name
    raise _refused("its tokenizer cuts texts into words in a way that this command does not know")


def _tokens(gguf: Any, described: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of each id; ids of the embedding without a token are unused ones."""
    texts = [f"[PAD{place}]" for place in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for text, place in described["model"]["vocab"].items():
        texts[place], types[place] = text, int(gguf.TokenType.NORMAL)
    for token in described.get("added_tokens") or ():
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _refused(f"its token {token['content']!r} takes in the white space around it")
        if token["id"] >= size:
            raise _refused(f"its token {token['content']!r} is beyond the embedding")
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        texts[token["id"]], types[token["id"]] = token["content"], int(kind)
    return texts, types


def _refused(reason: str) -> ModelError:
    return ModelError(
        f"gguf: {reason}; nothing is guessed here: export without gguf, and run llama.cpp's "
        "convert_hf_to_gguf.py on the exported folder"
    )
