"""Trackers of a training: those that transformers integrates, with the run's project, name and tags.

Nothing is sent unless `report_to` names a tracker. Each one gets the rows of `metrics.jsonl` under the names that
transformers gives them (docs/tracking.md). TensorBoard and the local files of W&B are in the run folder; a resumed run
goes on with the same run of W&B, MLflow or Trackio.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from bfpo.config.train import TrainingKeys
from bfpo.core.errors import ConfigError, MissingExtraError, first_line
from bfpo.core.secrets import hide_secrets
from bfpo.core.yaml_text import dump_yaml
from bfpo.runs.folder import RunFolder

__all__ = ["PROJECT", "TENSORBOARD", "Trackers", "check_trackers", "open_trackers"]

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"
_EXTRAS = ("mlflow", "tensorboard", "trackio", "wandb")
_READ_BY = {"run_name": (*_EXTRAS, "comet_ml", "dagshub", "swanlab"), "run_tags": _EXTRAS}  # the keys not all can take
PROJECT = "bfpo"
_IDS = "tracker_runs"  # key of run.json


def check_trackers(config: TrainingKeys) -> None:
    """Raise `MissingExtraError` for a tracker that is not installed; `ConfigError` for one that transformers lacks."""
    for name in config.report_to:
        _callback(name)


def _callback(name: str) -> TrainerCallback:
    if name not in INTEGRATION_TO_CALLBACK:
        raise ConfigError(
            f"report_to: got {name!r}; the installed transformers has {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
        )
    try:
        made: TrainerCallback = INTEGRATION_TO_CALLBACK[name]()
    except (RuntimeError, ImportError, AssertionError) as error:
        package = f"'bfpo[{name}]'" if name in _EXTRAS else f"its package ({hide_secrets(first_line(error))})"
        raise MissingExtraError(
            f"report_to: {name} is not installed; install it with: pip install {package}"
        ) from error
    return made


def open_trackers(config: TrainingKeys, folder: RunFolder, *, name: str, resumes_at: int | None) -> Trackers | None:
    """Return the callback of the trackers of a config, `None` for none.

    `name`: of the run; `resumes_at`: step of the checkpoint.

    Raises as `check_trackers`.
    """
    if not config.report_to:
        return None
    ids = dict(folder.record.get(_IDS, {}))
    project, tags = config.project, list(config.run_tags)
    for key, takers in _READ_BY.items():
        without = [tracker for tracker in config.report_to if tracker not in takers]
        if getattr(config, key) and without and folder.is_writer:
            logger.warning("%s: not passed on to %s; set it in that tracker's own settings", key, ", ".join(without))
    found: dict[str, TrainerCallback] = {}
    closers: list[Callable[[], None]] = []
    for tracker in config.report_to:
        callback: Any = _callback(tracker)
        found[tracker] = callback
        if not folder.is_writer:
            continue
        try:
            if tracker == TENSORBOARD:
                _open_tensorboard(callback, folder, name, tags, resumes_at)
            elif tracker == "wandb":
                closers += _open_wandb(folder, project, name, tags, ids)
            elif tracker == "mlflow":
                closers += _open_mlflow(folder, project, name, tags, ids)
            elif tracker == "trackio":  # which goes on with any run of the same name
                ids.setdefault("trackio", name if folder.resumed else f"{name}-{uuid4().hex[:6]}")
        except Exception as error:  # of another package: no login, no server, a damaged store
            _close(closers)
            raise _not_started(tracker, error) from error
    if ids:
        folder.add_facts(**{_IDS: ids})
    return Trackers(found, closers, trackio_name=ids.get("trackio"), tags=tags)


def _not_started(tracker: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"report_to: {tracker} cannot start ({hide_secrets(first_line(error))}); log in to it, set it to work offline, "
        "or leave it out of report_to"
    )


def _open_tensorboard(callback: Any, folder: RunFolder, name: str, tags: list[str], resumes_at: int | None) -> None:
    """Write to `tensorboard/` of the run; what an interrupted run wrote after its checkpoint is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    callback.logging_dir = str(folder.folder(TENSORBOARD))
    purge = (0 if resumes_at is None else resumes_at + 1) if folder.resumed else None
    callback.tb_writer = SummaryWriter(callback.logging_dir, purge_step=purge)
    callback.tb_writer.add_text("config", f"```\n{dump_yaml(folder.config)}```")
    callback.tb_writer.add_text("run_name", name)
    if tags:
        callback.tb_writer.add_text("tags", ", ".join(tags))


def _open_wandb(
    folder: RunFolder, project: str | None, name: str, tags: list[str], ids: dict[str, str]
) -> list[Callable[[], None]]:
    """Start, or go on with, a run of W&B, unless one is active already."""
    import wandb

    if wandb.run is not None:
        return []
    ids.setdefault("wandb", os.environ.get("WANDB_RUN_ID") or uuid4().hex[:12])
    wandb.init(
        project=project or os.environ.get("WANDB_PROJECT") or PROJECT,
        name=name,
        tags=tags or None,
        dir=str(folder.path),
        id=ids["wandb"],
        resume="allow" if folder.resumed else None,
        config={"bfpo": folder.config},
    )
    return [wandb.finish]


def _open_mlflow(
    folder: RunFolder, project: str | None, name: str, tags: list[str], ids: dict[str, str]
) -> list[Callable[[], None]]:
    """Start, or go on with, a run of MLflow, unless one is active already; tags are keys with the value true."""
    import mlflow

    if mlflow.active_run() is not None:
        return []
    given = {f"bfpo.{key}": str(value)[:5000] for key, value in folder.config.items()} | dict.fromkeys(tags, "true")
    if "mlflow" in ids:
        mlflow.start_run(run_id=ids["mlflow"])
    else:
        mlflow.set_experiment(project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT)
        ids["mlflow"] = str(mlflow.start_run(run_name=name, tags=given).info.run_id)
    return [mlflow.end_run]


def _close(closers: list[Callable[[], None]]) -> None:
    for close in closers:
        try:
            close()
        except Exception as error:
            logger.warning("a tracker could not be closed: %s", hide_secrets(first_line(error)))


class Trackers(TrainerCallback):
    """Passes the events of a training to trackers; they learn of its end in `close`, since evaluations may follow.

    A tracker that fails before the first step stops the run; one that fails later is dropped with a warning.
    `trackio_name` is the name of the run there, `tags` go into its config.
    """

    def __init__(
        self,
        callbacks: Mapping[str, TrainerCallback],
        closers: list[Callable[[], None]],
        *,
        trackio_name: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        self._callbacks, self._closers = dict(callbacks), closers
        self._trackio_name, self._tags = trackio_name, tags or []
        self._end: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the trackers."""
        for name, callback in self._callbacks.items():
            given = args
            if name == "trackio":
                given = copy.copy(args)
                given.run_name = self._trackio_name
            try:
                callback.on_init_end(
                    given, state, control, **kwargs
                )  # where codecarbon and azure_ml make their trackers
                callback.on_train_begin(given, state, control, **kwargs)
                if name == "trackio" and self._tags and state.is_world_process_zero:
                    import trackio

                    trackio.config["tags"] = self._tags  # its runs have no tags
            except Exception as error:
                raise _not_started(name, error) from error

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on a row of the log."""
        self._tell("on_log", args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on that a step has ended."""
        self._tell("on_step_end", args, state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on that a checkpoint is written."""
        self._tell("on_save", args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the end, which `close` passes on."""
        self._end = ((args, state, control), kwargs)

    def _tell(self, event: str, *given: Any, **kwargs: Any) -> None:
        for name, callback in list(self._callbacks.items()):
            try:
                getattr(callback, event)(*given, **kwargs)
            except Exception as error:
                del self._callbacks[name]
                logger.warning(
                    "report_to: %s failed and gets no more rows; metrics.jsonl has them all: %s",
                    name,
                    hide_secrets(first_line(error)),
                )

    def close(self) -> None:
        """Tell the trackers the end, if there was one, and close what was opened; safe to call at any time."""
        if self._end is not None:
            given, kwargs = self._end
            self._end = None
            self._tell("on_train_end", *given, **kwargs)
        closers, self._closers = self._closers, []
        _close(closers)
