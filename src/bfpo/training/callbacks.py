"""Callbacks of both training stages: epochs, metrics.jsonl, progress, a stop that leaves a checkpoint, and checkpoints
that count only once all of their files are written.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bfpo.core.console import one_line
from bfpo.core.errors import StopRequest
from bfpo.core.files import file_digest, write_text_whole
from bfpo.core.progress import TrainingProgress
from bfpo.policy.source import num_embeddings

__all__ = [
    "EpochCallback",
    "InterruptCallback",
    "MetricsCallback",
    "PaddingCallback",
    "ProgressCallback",
    "ProgressFile",
    "WholeCheckpoints",
    "half_checkpoints",
    "last_whole_checkpoint",
    "set_apart_damaged",
    "set_epoch_everywhere",
]

logger = logging.getLogger(__name__)

_MARK, _STATE = "complete.json", "trainer_state.json"  # ours, with size and hash of each file; the trainer's own
_THREADS = 8  # that compute hashes, which takes no lock of the interpreter


def set_epoch_everywhere(loader: Any, epoch: int) -> None:
    """Call `set_epoch` on the data set and every sampler inside a data loader, however deeply they are wrapped."""
    waiting, seen = [loader], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if hasattr(node, "set_epoch"):
            node.set_epoch(epoch)
        waiting += [getattr(node, name, None) for name in ("dataset", "sampler", "batch_sampler")]


class EpochCallback(TrainerCallback):
    """Sets the epoch of data set and samplers before it starts.

    Data loaders of accelerate pass the epoch on to a data set or to a sampler, not to both, and with several processes
    a resumed run reaches neither; then the order of the pairs, or the buffer, would be that of the first epoch again.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch, also after a resume; it is a whole number unless the run resumes inside an epoch."""
        set_epoch_everywhere(kwargs["train_dataloader"], int(state.epoch or 0))


class PaddingCallback(TrainerCallback):
    """Takes a padding token that the embedding lacks out of the model's config again.

    `Trainer` copies the tokenizer's to it as training begins. A model that is saved with it could not be loaded.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove it from the configs of the model and of its generation."""
        model = kwargs["model"]
        rows = num_embeddings(model.config)
        configs: list[Any] = [model.config.get_text_config(), getattr(model, "generation_config", None)]
        for config in configs:
            pad = getattr(config, "pad_token_id", None)
            if rows is not None and isinstance(pad, int) and pad >= rows:
                config.pad_token_id = None


class MetricsCallback(TrainerCallback):
    """Hands every log to `append` as one flat row that starts with its step.

    `restore` is called at the start with the rows up to the checkpoint that the run resumes from, so that none is
    missing or repeated.
    """

    def __init__(
        self, append: Callable[[Mapping[str, Any]], None], restore: Callable[[Sequence[Mapping[str, Any]]], None]
    ) -> None:
        self._append = append
        self._restore = restore

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop what an interrupted run wrote after the checkpoint; the checkpoint holds every row before it."""
        if state.is_world_process_zero:
            self._restore([{"step": row["step"], **row} for row in state.log_history])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one row."""
        if state.is_world_process_zero and logs:
            self._append({"step": state.global_step, **logs})


class ProgressCallback(TrainerCallback):
    """Shows a bar on a terminal and logs one plain line per log elsewhere.

    `title` names the run; `shown` maps a metric to the word it is shown by.
    """

    def __init__(self, title: str, shown: Mapping[str, str], console: Console | None = None) -> None:
        self._title = one_line(title)
        self._shown = shown
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._started = 0.0
        self._latest: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self._started = time.monotonic()
        if state.is_world_process_zero and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                console=self._console,
            )
            self._progress.add_task(self._title, total=state.max_steps, completed=state.global_step, figures="")
            self._progress.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the figures of this log."""
        found = {
            word: f"{word} {value:.4g}"
            for name, word in self._shown.items()
            if (value := (logs or {}).get(name)) is not None
        }
        if not state.is_world_process_zero or not found:
            return
        self._latest |= found
        if self._progress is not None:  # logs of the loss and of probes take turns
            latest = "  ".join(self._latest[word] for word in self._shown.values() if word in self._latest)
            self._progress.update(self._progress.task_ids[0], completed=state.global_step, figures=latest)
        else:
            figures = "  ".join(found.values())
            seconds = time.monotonic() - self._started
            logger.info(
                "%s: step %d/%d  %s  (%.0f s)", self._title, state.global_step, state.max_steps, figures, seconds
            )

    def close(self) -> None:
        """Close the bar; safe to call at any time."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()


class ProgressFile(TrainerCallback):
    """Hands the step and the time left to `write`, at most every `seconds_between`.

    The time left is that of the steps so far in this process, evaluations and checkpoints included.
    """

    def __init__(self, write: Callable[[TrainingProgress], object], *, seconds_between: float = 5.0) -> None:
        self._write, self._between = write, seconds_between
        self._first_step, self._started, self._written = 0, 0.0, -math.inf

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the first step and the time."""
        self._first_step, self._started, self._written = state.global_step, time.monotonic(), -math.inf

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the progress if the last time is long enough ago."""
        now, done = time.monotonic(), state.global_step - self._first_step
        if not state.is_world_process_zero or done < 1 or now - self._written < self._between:
            return
        self._written = now
        left = (now - self._started) / done * (state.max_steps - state.global_step)
        updated = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        self._write(TrainingProgress(state.global_step, state.max_steps, round(left, 1), updated))


class InterruptCallback(TrainerCallback):
    """On the first Ctrl-C or SIGTERM: finish this step, save a checkpoint, stop. A second one acts at once.

    Use it as a context around `train()`, then call `raise_if_requested`. It works in the main thread only, and not for
    signals that the process was started to ignore.

    Several processes stop at the end of the same step, even if the signal reached one of them. There a further signal
    within `same_within` seconds counts as the first one: launchers forward signals that the terminal or the scheduler
    has already sent to all processes.
    """

    def __init__(self, same_within: float = 5.0) -> None:
        self.requested = 0
        self._same_within = same_within if int(os.environ.get("WORLD_SIZE") or 1) > 1 else 0.0
        self._asked = 0.0
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> InterruptCallback:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                earlier = signal.getsignal(number)
                if earlier != signal.SIG_IGN:
                    self._earlier[number] = earlier or signal.SIG_DFL
                    signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._asked = number, now
        elif now - self._asked >= self._same_within:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._earlier:
            signal.signal(*self._earlier.popitem())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the trainer for a checkpoint and to stop, in all processes if one of them got a signal."""
        if args.world_size > 1:
            any_request = torch.tensor([self.requested], device=args.device)
            torch.distributed.all_reduce(any_request, op=torch.distributed.ReduceOp.MAX)
            self.requested = int(any_request)
        if self.requested:
            if state.is_world_process_zero:
                name = signal.Signals(self.requested).name
                logger.info("%s: saving a checkpoint of step %d, then stopping", name, state.global_step)
            control.should_save = True
            control.should_training_stop = True

    def raise_if_requested(self) -> None:
        """Raise `KeyboardInterrupt` after a Ctrl-C, `StopRequest` after a SIGTERM."""
        if self.requested:
            raise StopRequest if self.requested == signal.SIGTERM else KeyboardInterrupt


# Whole checkpoints


class WholeCheckpoints(TrainerCallback):
    """Marks every checkpoint once all processes have written it, and keeps the `keep` newest (`None`: all).

    The checkpoint of the step that `best` returns is kept too.

    The trainer's own `save_total_limit` must be off. It removes older checkpoints before the other processes are known
    to have written theirs, and orders them by the time of the file system.

    `marked` is called with the step of each checkpoint when it is complete, in the first process.
    """

    def __init__(
        self, keep: int | None, marked: Callable[[int], None], best: Callable[[], int | None] = lambda: None
    ) -> None:
        self._keep = keep
        self._marked = marked
        self._best = best

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
                if _step(path) != self._best():
                    shutil.rmtree(path, ignore_errors=True)


def last_whole_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the latest complete checkpoint in a folder, with its trainer state; `None` if there is none."""
    whole = [path for path in _checkpoints(folder) if _is_whole(path)]
    if not whole:
        return None
    state: dict[str, Any] = json.loads((whole[-1] / _STATE).read_text(encoding="utf-8"))
    return whole[-1], state


def set_apart_damaged(folder: Path) -> list[str]:
    """Rename checkpoints whose files have changed since they were complete, from the newest to the first sound one.

    Returns what was found, one text for each. A checkpoint that an earlier version marked has no hashes and counts as
    sound.
    """
    found = []
    for path in reversed([path for path in _checkpoints(folder) if _is_whole(path)]):
        changed = _changed_files(path)
        if not changed:
            break
        apart = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(apart, ignore_errors=True)
        path.rename(apart)
        found.append(f"{path}: {', '.join(changed)} changed since the checkpoint was written; kept as {apart.name}")
    return found


def half_checkpoints(folder: Path) -> list[Path]:
    """Return the incomplete checkpoints in a folder: not fully written, or not fully removed."""
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
    for path in files.values():  # so that a power cut loses nothing
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    mark = {"bytes": {name: path.stat().st_size for name, path in files.items()}, "sha256": _digests(files)}
    write_text_whole(checkpoint / _MARK, json.dumps(mark, indent=2) + "\n")


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(files, pool.map(file_digest, files.values()), strict=True))


def _changed_files(checkpoint: Path) -> list[str]:
    """Return the files of a complete checkpoint that do not have the hash of its mark."""
    mark = json.loads((checkpoint / _MARK).read_text(encoding="utf-8"))
    digests = mark.get("sha256") or {}
    found = _digests({name: checkpoint / name for name in mark["bytes"] if name in digests})
    return [name for name, digest in found.items() if digests[name] != digest]


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / _MARK).read_text(encoding="utf-8"))["bytes"]
        return _STATE in sizes and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False
