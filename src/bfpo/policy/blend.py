"""The weights between two models: `(1 - w) A + w B`, one tensor at a time, from safetensors to safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bfpo.core.errors import ModelError, first_line
from bfpo.policy.load import load_tokenizer
from bfpo.policy.source import cannot_load, read_config
from bfpo.policy.trained import require_whole

__all__ = ["BlendSource", "blend_weights", "open_source", "read_tensor", "require_same_kind"]

_INDEX, _ADAPTER, _SUFFIX = "model.safetensors.index.json", "adapter_config.json", ".safetensors"
# Keys of a config.json that do not change what the weights mean, beside those that begin with an underscore. A trainer
# sets the special tokens to those of the tokenizer.
_OF_NO_EFFECT = frozenset(
    {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
    | {"bos_token_id", "eos_token_id", "pad_token_id"}
)
_GENERATION = "generation_config.json"
_COPIED = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.txt")


@dataclass(frozen=True, slots=True)
class BlendSource:
    """A model's folder, its safetensors files, and where each tensor is: name -> (file, shape)."""

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, tuple[Path, tuple[int, ...]]]


def open_source(model: str, *, name: str) -> BlendSource:
    """Return the files of a model: a folder, or a hub id, whose safetensors are then downloaded.

    Reads headers only. `name` is the setting that an error names. Raises `ModelError` for a model that does not exist,
    has no safetensors, or is an adapter.
    """
    require_whole(model, name)
    folder = Path(model) if Path(model).is_dir() else _from_hub(model, name)
    if (folder / _ADAPTER).exists():
        raise ModelError(
            f"{name}: {model} is an adapter without its base; allowed: whole weights, as bfpo train writes to model/ "
            "(there the adapter is merged)"
        )
    files = _weight_files(folder)
    if not files:
        raise ModelError(f"{name}: {model} holds no safetensors file; allowed: the folder of a model saved as such")
    tensors = {
        key: (file, tuple(facts["shape"])) for file in files for key, facts in _tensors_of(_header(file)).items()
    }
    return BlendSource(folder, files, tensors)


def require_same_kind(first: BlendSource, second: BlendSource) -> None:
    """Raise `ModelError` if the two differ in tensors, shapes, settings or tokens: a mean of them has no meaning."""
    lacking = sorted(first.tensors.keys() ^ second.tensors.keys())
    if lacking:
        where = first if lacking[0] in first.tensors else second
        raise ModelError(
            f"{second.folder}: {len(lacking)} tensors are in one of the two models only, such as {lacking[0]} (in "
            f"{where.folder}); allowed: two models of one architecture, trained from the same start"
        )
    for key, (_, shape) in first.tensors.items():
        other = second.tensors[key][1]
        if shape != other:
            raise ModelError(f"{second.folder}: {key} has shape {other}, in {first.folder} {shape}; allowed: the same")
    ours, theirs = _config(first), _config(second)
    if ours != theirs:  # versions of transformers write one config under other names: rope_theta, rope_parameters
        ours, theirs = (_effective(read_config(source.folder).to_dict()) for source in (first, second))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise ModelError(
                f"{second.folder}: config.json has {key} = {theirs.get(key)!r}, {first.folder} {ours.get(key)!r}; "
                "allowed: the same for both"
            )
    mine, others = load_tokenizer(first.folder), load_tokenizer(second.folder)
    templates = filter(None, (mine.chat_template, others.chat_template))
    if mine.get_vocab() != others.get_vocab() or any(one != other for one, other in pairwise(templates)):
        raise ModelError(
            f"{second.folder}: its tokenizer or chat template differs from that of {first.folder}; allowed: the "
            "same for both, or a chat template in one of them only"
        )


def blend_weights(
    first: BlendSource,
    second: BlendSource,
    weight: float,
    folder: Path,
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write `(1 - weight) first + weight second` to a new folder, with the first model's other files.

    Tokenizer and generation config are the second model's if only that has a chat template: what was trained from a
    start without one.
    Memory is a few times that of the largest tensor: the output has the files, the order and the dtypes of `first`,
    whose headers are copied as they are. Sums are taken in float32 (float64 for float64) and rounded once. Tensors of
    whole numbers must be equal. `advance` is called after each tensor.

    Raises `ModelError` for tensors that cannot be read or blended, and `OSError` for a folder that cannot be written.
    """
    folder.mkdir(parents=True)
    mine, others = load_tokenizer(first.folder), load_tokenizer(second.folder)
    only_there = bool(others.chat_template) and not mine.chat_template
    for source, patterns in ((first, _COPIED), *([(second, [_GENERATION])] if only_there else [])):
        for file in (file for pattern in patterns for file in source.folder.glob(pattern)):
            place = folder / file.relative_to(source.folder)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)
    if only_there:
        others.save_pretrained(folder)
    for file in first.files:
        header = _header(file)
        tensors = _tensors_of(header)
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        with (folder / file.name).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for key in sorted(tensors, key=lambda name: tuple(tensors[name]["data_offsets"])):
                blended = _blend(key, read_tensor(file, key), read_tensor(second.tensors[key][0], key), weight)
                out.write(blended.reshape(-1).view(torch.uint8).numpy().tobytes())
                advance(1)


def _blend(key: str, first: Tensor, second: Tensor, weight: float) -> Tensor:
    if not first.is_floating_point():
        if not torch.equal(first, second):
            raise ModelError(f"{key}: holds {first.dtype}, which cannot be blended, and differs between the two models")
        return first
    if weight in (0.0, 1.0):  # bit for bit
        return (first if weight == 0.0 else second.to(first.dtype)).contiguous()
    wide = torch.promote_types(first.dtype, torch.float32)
    return torch.lerp(first.to(wide), second.to(wide), weight).to(first.dtype).contiguous()


def read_tensor(file: Path, key: str) -> Tensor:
    """Return one tensor of a safetensors file; raises `ModelError` if it cannot be read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            value: Tensor = tensors.get_tensor(key)
            return value
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: {key} cannot be read ({error}); copy or save the model again") from error


def _header(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt"):  # validates the header
            pass
        with file.open("rb") as stream:
            header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{file}: is not a safetensors file ({error}); copy or save the model again") from error
    return header


def _tensors_of(header: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts for key, facts in header.items() if key != "__metadata__"}


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the files with weights. Raises `ModelError` for an index that is damaged or names a file elsewhere."""
    if (folder / _INDEX).exists():
        try:
            names = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            if all(Path(name).name == name for name in names):
                return tuple(folder / name for name in names)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(
                f"{folder / _INDEX}: cannot be read ({first_line(error)}); copy the model again"
            ) from error
        raise ModelError(f"{folder / _INDEX}: names a file outside its folder; copy or save the model again")
    return tuple(file for file in [folder / f"model{_SUFFIX}"] if file.exists())


def _config(source: BlendSource) -> dict[str, Any]:
    try:
        return _effective(json.loads((source.folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise cannot_load("model", source.folder, error) from error


def _effective(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without what does not change the meaning of the weights, also in its parts."""
    return {
        key: _effective(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _OF_NO_EFFECT and not str(key).startswith("_")
    }


def _from_hub(model: str, name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=[f"*{_SUFFIX}", *_COPIED]))
    except Exception as error:  # the hub has its own error classes
        raise cannot_load(name, model, error) from error
