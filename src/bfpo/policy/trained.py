"""Checkpoints that hold only what trains: the model they started from, the check of it, and their weights in it.

torch is imported where weights are read: names of models are looked up without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bfpo.core.errors import ModelError, RunError, first_line
from bfpo.core.inputs import missing_folder
from bfpo.core.provenance import RunFile, run_above
from bfpo.core.records import load

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "CHAT_TEMPLATE",
    "FACTS",
    "TRAINED",
    "TrainedFile",
    "check_start",
    "frozen_digest",
    "holds_only_trained",
    "put_trained",
    "require_whole",
    "start_of",
    "start_of_run",
]

TRAINED, FACTS = "trained.safetensors", "trained.json"
CHAT_TEMPLATE = "chat_template.jinja"  # the name that transformers reads


@dataclass(frozen=True, slots=True)
class TrainedFile:
    """The content of `trained.json`: the names of what trains, and the SHA-256 of all frozen weights."""

    trained: list[str]
    frozen_sha256: str


def frozen_digest(model: nn.Module, trained: Collection[str]) -> str:
    """Return the SHA-256 of name, shape, dtype and content of the parameters that are not in `trained`."""
    from bfpo.policy.reference.cache import describe_tensors

    frozen = {name: value.detach() for name, value in model.named_parameters() if name not in trained}
    return hashlib.sha256(json.dumps(describe_tensors(frozen)).encode()).hexdigest()


def holds_only_trained(model: str | Path) -> bool:
    """Return whether a folder is a checkpoint that left out frozen weights."""
    return (Path(model) / FACTS).is_file()


def start_of(model: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """Return the whole model, and its revision, from which a checkpoint of what trains began; of any other itself.

    It is the one that `run.json` of the checkpoint's run names. It has the checkpoint's config, tokenizer without
    the chat template, and frozen weights. Raises `ModelError` if that cannot be told.
    """
    for _ in range(20):  # a run may have started from the checkpoint of another
        if not holds_only_trained(model):
            return str(model), revision
        model, revision, _ = start_of_run(model)
    raise ModelError(f"model: {str(model)!r} is a checkpoint whose runs start from one another; give a whole model")


def start_of_run(checkpoint: str | Path) -> tuple[str, str | None, str]:
    """Return model, revision and dtype from which the run of a checkpoint started; raises as `start_of`."""
    run = run_above(checkpoint)
    if run is None:
        raise ModelError(
            f"model: {str(checkpoint)!r} is a checkpoint that holds only what trains, outside of its run folder, whose "
            "run.json names the model that has the rest; put it back there"
        )
    config = load(RunFile, run / "run.json").config
    start, revision, dtype = config.get("model"), config.get("revision"), config.get("dtype")
    if not isinstance(start, str) or not isinstance(dtype, str) or not isinstance(revision, str | None):
        raise ModelError(
            f"model: {str(checkpoint)!r} is a checkpoint that holds only what trains, and {run / 'run.json'} does not "
            "name the model that has the rest (config.model, config.dtype); restore that file"
        )
    if (problem := missing_folder(start, revision)) is not None:
        raise ModelError(
            f"model: {str(checkpoint)!r} is a checkpoint that holds only what trains, and the model that has the rest, "
            f"{start!r}, is gone: {problem}; put it back, or work in the folder in which the run was started"
        )
    return start, revision, dtype


def check_start(model: nn.Module, checkpoint: str | Path) -> None:
    """Raise `ModelError` if the frozen weights of a model are not those of a checkpoint's run, held in its dtype."""
    facts = _facts(Path(checkpoint))
    found = frozen_digest(model, set(facts.trained))
    if found != facts.frozen_sha256:
        raise ModelError(
            f"model: {str(checkpoint)!r} holds only what trains, and the other weights of {start_of(checkpoint)[0]!r} "
            f"are not those that its run started from (SHA-256 {found[:12]}, then {facts.frozen_sha256[:12]}); put "
            "that model back to what it was"
        )


def put_trained(model: nn.Module, checkpoint: str | Path) -> None:
    """Copy the weights of a checkpoint into a model, rounded to its dtype; raises `ModelError` if they do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(checkpoint) / TRAINED
    if not file.is_file():
        raise ModelError(
            f"model: {str(checkpoint)!r} is a checkpoint in parts of several processes, which is read by --resume "
            "only; end the run (--resume), then give its folder"
        )
    try:
        found = load_file(file)
        lacking = sorted({*_facts(Path(checkpoint)).trained} - found.keys())
        unexpected = [*lacking, *model.load_state_dict(found, strict=False).unexpected_keys]
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model: {file} cannot be read ({first_line(error)}); give another checkpoint") from error
    if unexpected:
        raise ModelError(
            f"model: {file} does not fit the model that its run started from: {unexpected[0]} is in one of them only; "
            "give another checkpoint"
        )


def _facts(checkpoint: Path) -> TrainedFile:
    try:
        return load(TrainedFile, checkpoint / FACTS)
    except RunError as error:
        raise ModelError(f"model: {error}; give another checkpoint") from error


def require_whole(model: str | Path, reader: str) -> None:
    """Raise `ModelError` for a checkpoint of what trains, for a reader that loads a model's folder by itself."""
    if holds_only_trained(model):
        raise ModelError(
            f"model: {str(model)!r} is a checkpoint that holds only what trains, which {reader} cannot load; make a "
            f"whole model of it: bfpo export {model} --out DIR"
        )
