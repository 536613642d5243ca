"""The suites of inspect-ai of all models: one result file per model and suite, so that a stopped run goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bfpo.config import EvaluateConfig
from bfpo.config.load import read_template
from bfpo.config.suites import EvaluatedModel
from bfpo.core.errors import MissingExtraError, ModelError, first_line
from bfpo.core.runs import RunFolder
from bfpo.data.chat import DEFAULT_CHAT_TEMPLATE
from bfpo.policy.load import load_tokenizer
from bfpo.suites.catalogue import Suite
from bfpo.suites.files import UnreachableError, local_files
from bfpo.suites.inspect import InspectResult, InspectRunner

__all__ = ["run_inspect"]

_log = logging.getLogger(__name__)


def run_inspect(
    config: EvaluateConfig, suites: Sequence[Suite], folder: RunFolder
) -> tuple[dict[tuple[str, str], InspectResult], dict[str, str]]:
    """Return the results by (suite, model) and the reasons of skipped suites; one that fails for a model is skipped."""
    assert config.suites is not None
    results: dict[tuple[str, str], InspectResult] = {}
    skipped: dict[str, str] = {}
    for model in config.evaluated():
        grader, batch_size = config.suites.grader, config.suites.batch_size
        path, model_args = _settings(config, model)
        with InspectRunner(path, model_args=model_args, grader=grader, batch_size=batch_size) as runner:
            for suite in suites:
                if suite.name in skipped:
                    continue
                _log.info("%s: %s", model.name, suite.title)
                try:
                    results[suite.name, model.name] = _result(config, suite, model.name, runner, folder)
                except (UnreachableError, MissingExtraError) as error:
                    skipped[suite.name] = str(error)
    return {key: result for key, result in results.items() if key[0] not in skipped}, skipped


def _settings(config: EvaluateConfig, model: EvaluatedModel) -> tuple[str, dict[str, Any]]:
    """Return the model's folder or hub id, and what inspect-ai's provider is to load it with."""
    settings: dict[str, Any] = {"dtype": config.dtype}
    template = read_template(config.chat_template)
    if template is None and not load_tokenizer(model.model, revision=model.revision).chat_template:
        template = DEFAULT_CHAT_TEMPLATE
    if template is not None:
        settings["chat_template"] = template
    if model.revision is None or Path(model.model).is_dir():
        return model.model, settings
    from huggingface_hub import snapshot_download

    try:  # the provider would take the tokenizer of the newest revision
        return snapshot_download(model.model, revision=model.revision), settings
    except Exception as error:  # of its HTTP client too
        raise ModelError(f"{model.model}: revision {model.revision} cannot be had ({first_line(error)})") from error


def _result(
    config: EvaluateConfig, suite: Suite, model: str, runner: InspectRunner, folder: RunFolder
) -> InspectResult:
    assert config.suites is not None
    name = f"models/{model}/inspect_{suite.name}.json"
    if folder.resumed and folder.file(name).is_file():
        return InspectResult(**json.loads(folder.file(name).read_text(encoding="utf-8")))
    files = local_files(suite, config.suites.folders)
    if files:
        folder.add_data(suite.name, [str(file) for file in files])
    result = runner.run(
        suite,
        next(iter(suite.metrics)),
        file=files[0] if files else None,
        limit=config.suites.limit,
        max_tokens=config.suites.max_new_tokens,
        seed=config.seed,
        logs=folder.path / "models" / model / "inspect",
    )
    folder.write_json(name, asdict(result))
    return result
