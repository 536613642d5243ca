"""Discriminative suites through lm-eval (an extra): our tasks, prefixed `bfpo_`, on local documents or the hub's."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from bfpo.errors import MissingExtraError, first_line
from bfpo.evaluation.suite_files import UnreachableError
from bfpo.evaluation.suites import FOLDER, Suite

__all__ = ["TaskResult", "TaskRunner", "write_task"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The value of one metric per document, in [0, 1], and what the task ran on."""

    by_document: dict[str, float]
    version: str


def write_task(suite: Suite, folder: Path, documents: Path | None, revision: str | None = None) -> str:
    """Write the task of a suite as `bfpo_NAME.yaml` into a folder and return its name; our YAML includes the base's.

    With `documents` (JSON lines) the task reads them as every split it has, in place of the hub's data set at
    `revision`. Raises `UnreachableError` where the installed lm-eval has no such task, `MissingExtraError` where there
    is no lm-eval.
    """
    assert suite.task is not None
    own = FOLDER / "tasks" / suite.task
    base = own if own.is_file() else _built_in() / suite.task
    if not base.is_file():
        raise UnreachableError(f"the installed lm-eval has no task {suite.task}")
    name = f"bfpo_{suite.name.replace('-', '_')}"
    lines = [f"include: {json.dumps(str(base))}", f"task: {name}", "tag: null"]
    if documents is not None:
        files = json.dumps(
            {"data_files": {split: str(documents.absolute()) for split in ("train", "validation", "test", "default")}}
        )
        lines += ["dataset_path: json", "dataset_name: null", f"dataset_kwargs: {files}"]
    elif revision is not None:
        lines.append(f"dataset_kwargs: {json.dumps({'revision': revision})}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def _built_in() -> Path:
    return Path(_lm_eval().__file__).parent / "tasks"


def _lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise MissingExtraError(
            "discriminative suites need lm-eval, which is not installed; pip install 'bfpo[lm-eval]'"
        ) from error
    return lm_eval


class TaskRunner:
    """One model for all tasks of a folder; it is loaded when the first task is asked for."""

    def __init__(self, model: str, *, revision: str | None, dtype: str, batch_size: int, tasks: Path) -> None:
        self._settings = {"pretrained": model, "revision": revision or "main", "dtype": dtype, "batch_size": batch_size}
        self._tasks = tasks
        self._model: Any = None
        self._manager: Any = None

    def run(self, task: str, metric: str, *, limit: int | None, seed: int) -> TaskResult:
        """Return the metric of every document (of the first `limit`).

        Raises `UnreachableError` with the reason where the task's data set cannot be had or lm-eval cannot run it.
        """
        lm_eval = _lm_eval()
        if self._model is None:
            import torch

            logging.getLogger("lm_eval").setLevel(logging.ERROR)
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager

            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._model = HFLM(**self._settings, device=device)
            self._manager = TaskManager(include_path=str(self._tasks), include_defaults=False)
        try:
            loaded = self._manager.load([task])
        except Exception as error:  # of data sets, the hub's client, or an extra of lm-eval's own
            raise UnreachableError(f"lm-eval cannot load {task}: {first_line(error)}") from error
        for each in loaded["tasks"].values():
            each.set_fewshot_seed(seed=seed)
        quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())  # its bars know no log
        with quiet:
            result = lm_eval.evaluate(
                lm=self._model, task_dict=loaded["tasks"], limit=limit, bootstrap_iters=0, log_samples=True
            )
        return _result(result["samples"][task], result["versions"].get(task), metric)


def _result(samples: Sequence[Mapping[str, Any]], version: object, metric: str) -> TaskResult:
    by_document = {}
    for sample in samples:
        value = sample.get(metric)
        if not isinstance(value, (bool, int, float)):
            raise UnreachableError(f"lm-eval gives no {metric} per document")
        by_document[str(sample["doc_id"])] = float(value)
    return TaskResult(by_document, str(version))
