"""Checkpoints that are whole: marked when every file is on the disk, and only then is an older one removed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bfpo.core.files import write_text_whole

__all__ = ["WholeCheckpoints", "half_checkpoints", "last_whole_checkpoint"]

_MARK, _STATE = "complete.json", "trainer_state.json"


class WholeCheckpoints(TrainerCallback):
    """Marks every checkpoint once all processes have written it, and keeps the `keep` newest (`None`: all).

    The trainer's own `save_total_limit` must be off. It removes older checkpoints before the other processes are known
    to have written theirs, and orders them by the time of the file system.

    `marked` is called with the step of each checkpoint that has become whole, in the first process.
    """

    def __init__(self, keep: int | None, marked: Callable[[int], None]) -> None:
        self._keep = keep
        self._marked = marked

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Wait for the other processes, mark the checkpoint of this step, and remove older ones."""
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        _mark(folder / f"checkpoint-{state.global_step}")
        self._marked(state.global_step)
        if self._keep is not None:
            older = [path for path in _checkpoints(folder) if _step(path) < state.global_step and _is_whole(path)]
            for path in older[: max(0, len(older) + 1 - max(self._keep, 1))]:
                shutil.rmtree(path, ignore_errors=True)


def last_whole_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the latest whole checkpoint in a folder, with its trainer state; `None` where there is none."""
    whole = [path for path in _checkpoints(folder) if _is_whole(path)]
    if not whole:
        return None
    state: dict[str, Any] = json.loads((whole[-1] / _STATE).read_text(encoding="utf-8"))
    return whole[-1], state


def half_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder that were not written to their end, or not removed to theirs."""
    return [path for path in _checkpoints(folder) if not _is_whole(path)]


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("checkpoint-*") if _step(path) >= 0), key=_step)


def _step(path: Path) -> int:
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _files(checkpoint: Path) -> dict[str, Path]:
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != _MARK)
    return {path.relative_to(checkpoint).as_posix(): path for path in files}


def _mark(checkpoint: Path) -> None:
    files = _files(checkpoint)
    for path in files.values():  # a power cut after this leaves every byte
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sizes = {name: path.stat().st_size for name, path in files.items()}
    write_text_whole(checkpoint / _MARK, json.dumps({"bytes": sizes}, indent=2) + "\n")


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / _MARK).read_text(encoding="utf-8"))["bytes"]
        return _STATE in sizes and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False
