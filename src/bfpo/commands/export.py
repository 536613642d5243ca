"""COMMAND `export`: a model or checkpoint -> a plain folder: adapters merged, one number type, GGUF on request."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bfpo.core.console import Outcome, show
from bfpo.core.errors import ConfigError, DiskFullError, ModelError, RunError, first_line
from bfpo.core.files import is_disk_full
from bfpo.core.hub import check_repository, open_repository, push_folder
from bfpo.core.places import without_places
from bfpo.core.progress import CountProgress
from bfpo.core.provenance import model_in, model_name
from bfpo.generation.sampling import saved_end_token_ids
from bfpo.policy.blend import open_source, read_tensor
from bfpo.policy.gguf import import_gguf, write_gguf
from bfpo.policy.load import DTYPES, load_policy, load_tokenizer
from bfpo.policy.save import save_adapted, save_policy
from bfpo.policy.source import ADAPTER, check_source, is_adapter
from bfpo.policy.trained import holds_only_trained, start_of
from bfpo.runs.folder import model_head, render_card

__all__ = ["run"]

_log = logging.getLogger(__name__)

_CARD = "README.md"
_HOW = {"adapter": "merged into", "checkpoint": "its other weights from"}  # a base


@dataclass(frozen=True, slots=True)
class _Source:
    """What is exported: a folder or hub id, and the model below an adapter or a checkpoint that lacks frozen weights.

    `kind`: what `model` is if it needs a base. `revision`: of the model that is loaded from the hub.
    """

    model: str
    base: str | None = None
    kind: Literal["", "adapter", "checkpoint"] = ""
    revision: str | None = None


def run(
    model: str,
    out: Path,
    dtype: str,
    gguf: str | None,
    revision: str | None,
    push: str | None,
    private: bool | None,
) -> Outcome:
    """Write the model to `out`, which appears when it is whole; `gguf`: also a GGUF file of this number type in it.

    `push`: the repository to which the folder is pushed then, which `private` makes private if it is new.

    Raises `ModelError` for a model that cannot be exported, `ConfigError` for a folder that is in use,
    `MissingExtraError` without the package gguf where it is needed, `RunError` if the folder cannot be written; and as
    `push_folder`, with the folder that is whole then.
    """
    _check_out(out)
    if gguf is not None:
        import_gguf()
    if push is None and private is not None:
        raise ConfigError("--private: not read without --push; leave it out")
    if push is not None:
        try:
            check_repository(push)
        except ValueError as error:
            raise ConfigError(f"--push: {error}") from error
    source = _find(model, revision)
    if push is not None:
        open_repository(push, private=private, key="--push")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        _write(source, part, dtype)
        _write_card(source, part, dtype)
        if gguf is not None:
            _write_gguf(source, part, gguf)
        if out.is_dir():  # empty
            out.rmdir()
        part.rename(out)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RunError) or not (isinstance(error, OSError) or is_disk_full(error)):
            raise
        kind = DiskFullError if is_disk_full(error) else RunError
        reason = "the disk is full" if is_disk_full(error) else first_line(error)
        raise kind(f"{out}: cannot be written ({reason}); check --out, permissions and free space") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sizes = {file.name: file.stat().st_size for file in sorted(out.iterdir())}
    for name, size in sizes.items():
        show(f"{out / name}  {size / 1e6:,.1f} MB")
    how = f", {_HOW[source.kind]} {source.base}" if source.kind else ""
    show(f"{model_name(source.model)} in {dtype}{how}: {out}")
    page = None
    if push is not None:
        again = f"push it with: {shlex.join(['hf', 'upload', push, str(out)])}"
        page = push_folder(out, push, message=f"{model_name(source.model)} in {dtype}", key="--push", again=again)
        show(f"pushed: {page}")
    facts: dict[str, Any] = {"out": str(out), "dtype": dtype, "gguf": gguf, "base": source.base, "files": sizes}
    return Outcome(0, {**facts, "pushed": page})


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {out} is a file; give a new or empty folder")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out: {out} is not empty; give a new or empty folder")


def _find(model: str, revision: str | None) -> _Source:
    """Return what a name stands for: a model, an adapter, or the run folder of either."""
    path = Path(model_in(model))
    if str(path) != model and not (path / "config.json").is_file():
        raise ModelError(f"model: {model} is a run without a model in {path}; give a finished run of train or sft")
    model = str(path) if path.is_dir() else model
    if is_adapter(path):
        try:
            facts = json.loads((path / ADAPTER).read_text(encoding="utf-8"))
            base, revision = facts["base_model_name_or_path"], revision or facts.get("revision")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ModelError(
                f"model: {path / ADAPTER} cannot be read ({type(error).__name__}: {error}); save the adapter again"
            ) from error
        if not isinstance(base, str) or not base:
            raise ModelError(f"model: {path / ADAPTER} names no base model (base_model_name_or_path); set it there")
        check_source("base_model_name_or_path", base, revision=revision)
        return _Source(model, base, "adapter", revision)
    if holds_only_trained(model):
        start, start_revision = start_of(model)
        check_source("model", start, revision=start_revision)
        return _Source(model, start, "checkpoint")
    check_source("model", model, revision=revision)
    return _Source(model, revision=revision)


def _write(source: _Source, folder: Path, dtype: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stored = DTYPES[dtype]
    assert isinstance(stored, torch.dtype)  # the command line allows no other
    if source.base is not None and source.kind == "adapter":
        save_adapted(source.base, source.model, folder, stored=stored, revision=source.revision)
    else:
        policy = load_policy(source.model, dtype=dtype, revision=source.revision)
        save_policy(policy.model, policy.tokenizer, folder)
    _check_finite(folder, dtype)


def _check_finite(folder: Path, dtype: str) -> None:
    """Raise `ModelError` for a weight that is infinite or not a number, as one beyond the range of float16 becomes."""
    with CountProgress("tensors checked", None, _log) as progress:
        for key, (file, _) in open_source(str(folder), name="model").tensors.items():
            tensor = read_tensor(file, key)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ModelError(
                    f"model: {key} holds numbers that are not finite in {dtype}; a value beyond float16 needs "
                    "--dtype bfloat16 or float32, others mean that the training diverged"
                )
            progress.advance(1)


def _write_card(source: _Source, folder: Path, dtype: str) -> None:
    """Write the card: that of the model, or of the run that it is from, else one that names where it is from."""
    own = Path(source.model)
    known = [own / _CARD, *([own.parent / _CARD] if (own.parent / "run.json").is_file() else [])]
    card = next((file for file in known if file.is_file()), None)
    if card is not None:
        text = card.read_text(encoding="utf-8", errors="replace")
    else:
        base = source.base or source.model
        facts: dict[str, str] = {"start": base}
        if source.kind:
            facts[source.kind] = source.model
        facts["number type"] = dtype
        text = render_card(model_name(source.model), {"Model": facts}, head=model_head(base))
    (folder / _CARD).write_text(without_places(text, filter(None, (source.model, source.base))), encoding="utf-8")


def _write_gguf(source: _Source, folder: Path, kind: str) -> None:
    ends = saved_end_token_ids(folder, load_tokenizer(folder))
    total = len(open_source(str(folder), name="model").tensors)
    file = folder / f"{model_name(source.model)}-{kind}.gguf"
    with CountProgress("tensors of the GGUF file", total, _log) as progress:
        write_gguf(folder, file, kind, name=model_name(source.model), end_ids=ends, advance=progress.advance)
