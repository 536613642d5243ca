"""The discriminative suites of all models: one result file per model and task, so that a stopped run goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bfpo.config import EvaluateConfig, read_template
from bfpo.core.errors import MissingExtraError
from bfpo.core.runs import RunFolder
from bfpo.suites.catalogue import Suite
from bfpo.suites.files import UnreachableError, local_files, read_documents
from bfpo.suites.lm_eval import TaskResult, TaskRunner, write_task

__all__ = ["run_tasks"]

_log = logging.getLogger(__name__)


def run_tasks(
    config: EvaluateConfig, suites: Sequence[Suite], folder: RunFolder
) -> tuple[dict[tuple[str, str], TaskResult], dict[str, str], dict[str, tuple[str, str | None]]]:
    """Return the results by (suite, model), the reasons of skipped suites, and each suite's source and revision.

    A suite that one model cannot be asked is skipped for all, so that nothing is compared over different sets.
    """
    assert config.suites is not None
    tasks: dict[str, str] = {}
    skipped: dict[str, str] = {}
    sources: dict[str, tuple[str, str | None]] = {}
    for suite in suites:
        try:
            tasks[suite.name], sources[suite.name] = _task(config, suite, folder)
        except (UnreachableError, MissingExtraError) as error:
            skipped[suite.name] = str(error)
    results: dict[tuple[str, str], TaskResult] = {}
    for model in config.evaluated():
        runner = TaskRunner(
            model.model,
            revision=model.revision,
            dtype=config.dtype,
            batch_size=config.suites.batch_size,
            tasks=folder.path / "tasks",
            chat_template=read_template(config.chat_template),
            max_new_tokens=config.suites.max_new_tokens,
        )
        for suite in suites:
            if suite.name in skipped:
                continue
            _log.info("%s: %s", model.name, suite.title)
            try:
                results[suite.name, model.name] = _result(config, suite, model.name, tasks[suite.name], runner, folder)
            except UnreachableError as error:
                skipped[suite.name] = str(error)
    return {key: result for key, result in results.items() if key[0] not in skipped}, skipped, sources


def _task(config: EvaluateConfig, suite: Suite, folder: RunFolder) -> tuple[str, tuple[str, str | None]]:
    """Write the task, on local documents where they lie in the folders; return its name, its source and the commit."""
    assert config.suites is not None
    files = local_files(suite, config.suites.folders)
    if not files and suite.source.hub is None:
        names = ", ".join(suite.source.files)
        raise UnreachableError(
            f"no file of its names in suites.folders, and it is on no hub; put {names} into such a folder"
        )
    documents: Path | None = None
    if files:
        folder.add_data(suite.name, [str(file) for file in files])
        documents = folder.write_jsonl(f"tasks/{suite.name}.documents.jsonl", read_documents(files))
    source, revision = ", ".join(file.name for file in files), None
    if not files:
        source = str(suite.source.hub)
        revision = suite.source.revision or _newest(source)
    name = write_task(suite, folder.path / "tasks", documents, revision)
    return name, (source, revision)


def _newest(hub_id: str) -> str | None:
    """Return the commit that the hub has now; `None` where it does not answer, and copies may still be at hand."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(hub_id, timeout=10).sha
    except Exception as error:  # of its HTTP client too
        _log.debug("%s: %s", hub_id, error)
        return None


def _result(
    config: EvaluateConfig, suite: Suite, model: str, task: str, runner: TaskRunner, folder: RunFolder
) -> TaskResult:
    assert config.suites is not None
    name = f"models/{model}/{task}.json"
    if folder.resumed and folder.file(name).is_file():
        kept = json.loads(folder.file(name).read_text(encoding="utf-8"))
        return TaskResult(**kept)
    result = runner.run(task, next(iter(suite.metrics)), limit=config.suites.limit, seed=config.seed)
    folder.write_json(name, asdict(result))
    return result
