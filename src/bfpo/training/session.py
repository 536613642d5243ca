"""What both stages do around `Trainer.train()` in a run folder: arguments, resume, metrics, and the saved model."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from bfpo.config import read_template
from bfpo.config.train import TrainingKeys
from bfpo.core.errors import ConfigError, DiskFullError, RunError
from bfpo.core.files import is_disk_full
from bfpo.core.hub import open_repository, push_folder
from bfpo.core.provenance import Remark
from bfpo.core.records import as_json
from bfpo.data.chat import ChatEncoder
from bfpo.policy.devices import runs_on_cpu, use_threads
from bfpo.policy.precision import EMULATED, emulates
from bfpo.policy.recompute import Recompute
from bfpo.policy.save import save_policy
from bfpo.runs.folder import RunFolder
from bfpo.training.best import HeldOutBest
from bfpo.training.callbacks import (
    InterruptCallback,
    MetricsCallback,
    ProgressCallback,
    ProgressFile,
    WholeCheckpoints,
    half_checkpoints,
    last_whole_checkpoint,
    set_apart_damaged,
)
from bfpo.training.checkpoint import only_trained, resumable
from bfpo.training.probe import PROBE_SHOWN, Probe, ProbeCallback
from bfpo.training.records import PROBE_FILE
from bfpo.training.remarks import remarks_on
from bfpo.training.sharding import whole_state
from bfpo.training.trackers import PROJECT, check_trackers, open_trackers
from bfpo.training.trainer_args import check_launcher, check_trainer_args

__all__ = [
    "CHECKPOINTS",
    "common_arguments",
    "open_hub",
    "prepare_process",
    "push_run",
    "save_model_folder",
    "train_in_folder",
]

logger = logging.getLogger(__name__)

CHECKPOINTS, MODEL, PROGRESS = "checkpoints", "model", "progress.json"


def prepare_process(threads: int | None) -> None:
    """Set the CPU threads of torch and tokenizers, if a number is given; keep progress bars of loading out of logs."""
    use_threads(threads)
    if threads is not None:
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # read by tokenizers at its first use of threads
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


# Training


def common_arguments(config: TrainingKeys, output_dir: str | Path, *, unit: str, per_step: int) -> dict[str, Any]:
    """Return the keyword arguments of `TrainingArguments` that both stages share.

    `per_step` counts rows per optimizer step over all processes; a batch is the process' share of it. Raises
    `ConfigError` if the processes cannot share a step evenly.
    """
    processes = _num_processes()
    if per_step % processes:
        raise ConfigError(
            f"{unit}_per_step: got {per_step}; with {processes} processes it must be a multiple of {processes}"
        )
    on_cpu = runs_on_cpu()
    evaluates = config.eval_steps is not None
    if emulates(config.dtype):
        logger.warning("dtype: bfloat16: %s; set dtype: float32", EMULATED)
    check_trackers(config)
    check_launcher(config.dtype)
    check_trainer_args(config.trainer_args, preference=unit == "pairs")
    if config.trainer_args.get("eval_on_start") and getattr(config, "eval_data", None) is None:
        raise ConfigError("trainer_args.eval_on_start: got true without eval_data; give eval_data, or leave it out")
    if (noise := config.trainer_args.get("neftune_noise_alpha")) and config.attention != "padded":
        raise ConfigError(
            f"trainer_args.neftune_noise_alpha: got {noise:g} with attention: {config.attention}; its noise is divided "
            "by the root of the tokens of a row, and a packed row holds many texts; set attention: padded, or leave it "
            "out"
        )
    names = ("optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed")
    return {
        **{name: getattr(config, name) for name in names},
        **({"warmup_steps": 0} if config.lr_scheduler_type == "constant" else {}),
        "output_dir": str(output_dir),
        "per_device_train_batch_size": per_step // processes,
        "per_device_eval_batch_size": per_step // processes,
        "gradient_accumulation_steps": 1,
        "max_steps": config.max_steps or -1,
        "num_train_epochs": config.num_train_epochs,
        "data_seed": config.seed,
        "logging_steps": config.logging_steps,
        "save_steps": config.save_steps,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": config.eval_steps,
        "bf16": config.dtype == "bfloat16",
        **_recompute_activations(config.gradient_checkpointing),
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "report_to": "none",  # `open_trackers` adds them
        "run_name": config.run_name or Path(output_dir).absolute().parent.name,
        "project": config.project or PROJECT,  # which trackio reads
        **config.trainer_args,
    }


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def _recompute_activations(wanted: Recompute) -> dict[str, Any]:
    """Return the arguments to recompute activations, under the name in this version of transformers.

    None for "selective": they must be JSON, and its settings hold a function. `load_start` switches it on.
    """
    if wanted is not True:
        return {}
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def train_in_folder(
    trainer: Trainer,
    folder: RunFolder,
    *,
    title: str,
    shown: Mapping[str, str],
    evaluates: bool,
    save_total_limit: int | None = None,
    probe: Probe | None = None,
    config: TrainingKeys | None = None,
    at_end: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Train from the start or the last complete checkpoint, save `model/`, and return the metrics of the end.

    Metrics go to `metrics.jsonl`, progress to the log or a bar and, until the end, to `progress.json`; the
    `save_total_limit` newest checkpoints are kept. `probe`: is asked during training; by its rules a checkpoint before
    the last step may become `model/`. `config`: that with `report_to`, whose trackers get the rows too, `best`,
    by which an earlier checkpoint may be kept, and the chat template, which is saved with model and checkpoints.
    `at_end`: called after the last step, before that checkpoint is read. What there is to remark on the run goes to
    `run.json`.
    Raises `KeyboardInterrupt` after a Ctrl-C and `StopRequest` after a SIGTERM, with a checkpoint of the step it came
    in, `DiskFullError` if the disk is full, and `RunError` for a checkpoint that holds other than tensors and numbers.
    """
    if config is not None:
        _keep_template(trainer, config)
    trainer.remove_callback(PrinterCallback)
    rows = MetricsCallback(folder.append_metrics, folder.restore_metrics)
    trainer.add_callback(rows)
    progress = ProgressCallback(title, {**shown, **PROBE_SHOWN} if probe else shown)
    trainer.add_callback(progress)
    trainer.add_callback(ProgressFile(lambda now: folder.write_json(PROGRESS, now)))
    with _readable(folder):
        start = _resume_point(folder)
    watch = None
    if probe is not None:
        watch = ProbeCallback(probe, trainer, lambda now: folder.write_json(PROBE_FILE, now))
    held_out = None if config is None or config.best is None else HeldOutBest(config.best)
    resumes_at = None if start is None else start[1]["global_step"]
    name = str(trainer.args.run_name)
    trackers = None if config is None else open_trackers(config, folder, name=name, resumes_at=resumes_at)
    for callback in (trackers, watch, held_out):  # in this order: the probe logs when training begins
        if callback is not None:
            trainer.add_callback(callback)
    keeper = held_out or watch  # a config has one rule for the model that is kept
    trainer.add_callback(
        WholeCheckpoints(
            save_total_limit,
            lambda step: _note_kept(folder, step),
            best=lambda: None if keeper is None else keeper.seen.best_step,
        )
    )
    try:
        with _readable(folder), only_trained(trainer):
            _train(trainer, folder, start)
            _put_result(trainer)
            at_end()
            metrics, log = _last_metrics(trainer), list(trainer.state.log_history)
            found: list[Remark] = []
            if trainer.is_world_process_zero():  # before an earlier checkpoint is read, which knows of no stop
                found = [remark for one in (watch, held_out) if one is not None for remark in one.remarks()]
            if keeper is not None and keeper.seen.best_step not in (None, trainer.state.global_step):
                trainer.remove_callback(progress)
                _take_best(trainer, folder, keeper, [rows, *([] if trackers is None else [trackers])])
                if watch is not None and watch is not keeper:
                    watch.ask_kept(trainer.state, trainer.control)
                metrics = {name: value for name, value in metrics.items() if not name.startswith("eval_")}
        if evaluates and not any(name.startswith("eval_") for name in metrics):
            metrics |= trainer.evaluate()
    except Exception as error:
        if isinstance(error, DiskFullError) or not is_disk_full(error):
            raise
        raise _disk_full(folder) from error
    finally:
        progress.close()
        if trackers is not None:
            trackers.close()
        if folder.is_writer:  # metrics and status say how far a run that has ended came
            folder.file(PROGRESS).unlink(missing_ok=True)
    state = whole_state(trainer)
    if trainer.is_world_process_zero():
        save_model_folder(folder, trainer.model, trainer.processing_class, state_dict=state)
        _remark(folder, log, watch, found)
    return metrics


def _keep_template(trainer: Trainer, config: TrainingKeys) -> None:
    """Let the trainer save the chat template of the training, which the start may not have."""
    tokenizer: Any = trainer.processing_class
    chat = ChatEncoder(tokenizer, read_template(config.chat_template), config.chat_template_kwargs)
    trainer.processing_class = chat.saved_tokenizer


@contextmanager
def _readable(folder: RunFolder) -> Iterator[None]:
    """Say that a checkpoint which cannot be decoded is damaged."""
    try:
        yield
    except (UnpicklingError, RecursionError) as error:
        raise RunError(
            f"{folder.path / CHECKPOINTS}: the last checkpoint is damaged, or holds something other than tensors and "
            "plain values, which is not read; remove it to continue from an earlier one"
        ) from error


def _remark(folder: RunFolder, log: list[dict[str, Any]], watch: ProbeCallback | None, of_rules: list[Remark]) -> None:
    """Write what there is to remark, and the cost of the probe, to `run.json`."""
    if watch is not None:
        folder.add_facts(probe_seconds=round(watch.seen.seconds, 3))
    found = of_rules + remarks_on(log, folder.config, None if watch is None else watch.of_the_end())
    if found:
        folder.add_facts(remarks=as_json(found))


def _take_best(
    trainer: Trainer, folder: RunFolder, keeper: ProbeCallback | HeldOutBest, idle: list[TrainerCallback]
) -> None:
    """Restore the weights of the best checkpoint; its state does not count as the run's. `idle`: not called for it."""
    best = folder.path / CHECKPOINTS / f"checkpoint-{keeper.seen.best_step}"
    if not best.is_dir():
        raise RunError(f"{best}: the checkpoint of the best step is missing; start the run again")
    seen: Any = keeper.seen
    for callback in idle:
        trainer.remove_callback(callback)
    _restore(trainer, best)
    _put_result(trainer)
    keeper.seen = seen
    trainer.remove_callback(keeper)
    for callback in idle:
        trainer.add_callback(callback)


def _resume_point(folder: RunFolder) -> tuple[Path, dict[str, Any]] | None:
    """Return the last complete checkpoint of a resumed run, and log where it continues; remove incomplete ones."""
    folder.kept = "no checkpoint was written yet, so the run would start again"
    with PartialState().main_process_first():  # one process reads the whole files
        for damage in set_apart_damaged(folder.path / CHECKPOINTS) if folder.resumed and folder.is_writer else ():
            logger.warning("%s", damage)
    if not folder.resumed:
        folder.add_facts(processes=_num_processes())
        return None
    checkpoint = last_whole_checkpoint(folder.path / CHECKPOINTS)
    if checkpoint is not None:
        _note_kept(folder, checkpoint[1]["global_step"])
    if folder.is_writer:
        _check_processes(folder, checkpoint is not None)
        for half in half_checkpoints(folder.path / CHECKPOINTS):
            logger.info("%s: is incomplete; removed", half)
            shutil.rmtree(half, ignore_errors=True)
        if checkpoint is None:
            logger.info("no complete checkpoint in %s: starting again from the beginning", folder.path / CHECKPOINTS)
        else:
            logger.info("continuing from step %d", checkpoint[1]["global_step"])
    return checkpoint


def _check_processes(folder: RunFolder, resumes: bool) -> None:
    """Warn if a run continues with another number of processes, and record the new number."""
    now = _num_processes()
    before = folder.record.get("processes", now)
    if resumes and before != now:
        logger.warning(
            "this run had %d process%s and continues with %d: every step still has the same number of rows, but a "
            "process gets another share of them and other random numbers, and sums are rounded in another order, so "
            "the result will differ from that of an uninterrupted run; to avoid that, resume with %d",
            before,
            "es" * (before > 1),
            now,
            before,
        )
    folder.add_facts(processes=now)


def _note_kept(folder: RunFolder, step: int) -> None:
    folder.kept = f"the checkpoint of step {step} is complete"


def _train(trainer: Trainer, folder: RunFolder, checkpoint: tuple[Path, dict[str, Any]] | None) -> None:
    if checkpoint is not None and (
        checkpoint[1]["global_step"] >= checkpoint[1]["max_steps"] or _was_stopped(checkpoint[1])
    ):
        _repeat_end(trainer, checkpoint[0])
        return
    interrupt = InterruptCallback()
    trainer.add_callback(interrupt)
    with interrupt:
        if checkpoint is None:
            trainer.train()
        else:
            trainer.args.eval_on_start = False  # the start was evaluated then
            with resumable(trainer, checkpoint[0]) as place:
                trainer.train(resume_from_checkpoint=str(place))
    interrupt.raise_if_requested()


def _was_stopped(state: Mapping[str, Any]) -> bool:
    """Return whether a rule had stopped the run whose `trainer_state.json` this is."""
    held = state.get("stateful_callbacks", {})
    names = (ProbeCallback.__name__, HeldOutBest.__name__)
    return any(held.get(name, {}).get("attributes", {}).get("stopped") for name in names)


def _repeat_end(trainer: Trainer, checkpoint: Path) -> None:
    """Restore a trainer to the end of training from the checkpoint of the last step, and log the end again."""
    _restore(trainer, checkpoint)
    trainer.log({"train_runtime": 0.0, "total_flos": trainer.state.total_flos, "train_loss": math.nan})
    trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)


def _restore(trainer: Trainer, checkpoint: Path) -> None:
    """Load a checkpoint into a trainer.

    `Trainer.train` can load a checkpoint into a model however it is wrapped, but would then run one step too many.
    """
    if trainer.is_deepspeed_enabled:
        wrapped: Any = trainer.model  # to be wrapped again: an engine that has trained would get no optimizer
        trainer.model_wrapped = wrapped
    stop = _StopAtBegin()
    trainer.add_callback(stop)  # last, so the others' `on_train_begin` has run
    try:
        with resumable(trainer, checkpoint) as place:
            trainer.train(resume_from_checkpoint=str(place))
    except _BegunError:
        pass
    finally:
        trainer.is_in_train = False
        trainer.remove_callback(stop)


def _put_result(trainer: Trainer) -> None:
    """Put the weights in place that the optimizer gives: those that a schedule-free one trains are others."""
    optimizer: Any = trainer.optimizer  # as accelerate wraps it
    optimizer.eval()


class _StopAtBegin(TrainerCallback):
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        raise _BegunError


class _BegunError(Exception):
    """Training is about to begin: the model is wrapped and the checkpoint loaded."""


def _last_metrics(trainer: Trainer) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for row in trainer.state.log_history:
        if row.get("step") == trainer.state.global_step:
            metrics.update(row)
    return metrics


def _disk_full(folder: RunFolder) -> DiskFullError:
    """Return the error for a checkpoint that did not fit on the disk, and remove what was written of it."""
    half = half_checkpoints(folder.path / CHECKPOINTS)
    files = [path for checkpoint in half for path in checkpoint.rglob("*") if path.is_file()]
    last = max(files, key=lambda path: path.stat().st_mtime_ns, default=folder.path / CHECKPOINTS)
    error = folder.disk_full(last)
    if folder.is_writer:
        for checkpoint in half:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return error


def open_hub(config: TrainingKeys, folder: RunFolder) -> None:
    """Open the repository of `push_to_hub`, if it is set; raises as `open_repository`, before the work begins."""
    if config.push_to_hub is not None and folder.is_writer:
        open_repository(config.push_to_hub, private=config.hub_private_repo, key="push_to_hub")


def push_run(config: TrainingKeys, folder: RunFolder) -> None:
    """Push `model/` with its card to `push_to_hub`, if it is set, and record the page.

    Raises `ConfigError` or `ServerError` if it cannot be pushed.
    """
    repository = config.push_to_hub
    if repository is None or not folder.is_writer:
        return
    again = f"repeat with --resume, or with: bfpo export {folder.path} --out DIR --push {repository}"
    message = f"Model of bfpo {folder.stage}"
    page = push_folder(folder.path / "model", repository, message=message, key="push_to_hub", again=again)
    folder.add_facts(pushed=page)


def save_model_folder(
    folder: RunFolder, model: Any, tokenizer: Any, *, state_dict: Mapping[str, Tensor] | None = None
) -> Path:
    """Write `model/` (safetensors and tokenizer) whole: under another name first, then renamed. Returns its path.

    `state_dict`: the whole weights of a model that is sharded. Raises `DiskFullError` or `RunError`; what was written
    is then removed.
    """
    target, part = folder.file(MODEL), folder.file(f".{MODEL}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        save_policy(model, tokenizer, part, state_dict=state_dict)
        if target.exists():
            shutil.rmtree(target)
        part.replace(target)
    except Exception as error:
        full = folder.disk_full(target) if is_disk_full(error) else None
        shutil.rmtree(part, ignore_errors=True)
        if full is not None:
            raise full from error
        if isinstance(error, OSError):
            raise RunError(f"{target}: cannot be written ({error}); check permissions and free space") from error
        raise
    return target
