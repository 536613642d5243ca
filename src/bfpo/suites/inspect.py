"""Suites that are tasks of inspect-ai (an extra), run by its `eval` on local models; results are read from its logs."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

from bfpo.config.evaluate import SuitesJob
from bfpo.config.load import read_template
from bfpo.config.suites import WeightsModel
from bfpo.core.errors import MissingExtraError, ModelError, first_line
from bfpo.core.offline import no_network_if_offline
from bfpo.core.records import load
from bfpo.core.schema import Message, Prompt
from bfpo.data.load import Hashes
from bfpo.data.template import ChatTemplate
from bfpo.policy.load import load_tokenizer
from bfpo.policy.trained import require_whole
from bfpo.runs.folder import RunFolder
from bfpo.suites.catalogue import FOLDER, Suite
from bfpo.suites.files import TRAINED, UnreachableError, local_files
from bfpo.suites.records import InspectResult
from bfpo.training.trained_on import asked_in_training

__all__ = ["run_inspect"]

_log = logging.getLogger(__name__)


def run_inspect(
    config: SuitesJob, suites: Sequence[Suite], folder: RunFolder, trained: Mapping[str, Hashes]
) -> tuple[dict[tuple[str, str], InspectResult], dict[str, str]]:
    """Return the results by (suite, model) and the reasons of skipped suites; one that fails for a model is skipped.

    `trained`: hashes of the prompts that a model was trained on, by its name.
    """
    results: dict[tuple[str, str], InspectResult] = {}
    skipped: dict[str, str] = {}
    for model in config.with_weights():
        with _Runner(config, model, folder.path / "models" / model.name / "inspect", trained) as runner:
            for suite in suites:
                if suite.name in skipped:
                    continue
                _log.info("%s: %s", model.name, suite.title)
                try:
                    results[suite.name, model.name] = _result(config, suite, model.name, runner, folder)
                except (UnreachableError, MissingExtraError) as error:
                    skipped[suite.name] = str(error)
    return {key: result for key, result in results.items() if key[0] not in skipped}, skipped


def _settings(config: SuitesJob, model: WeightsModel) -> tuple[str, dict[str, Any]]:
    """Return the model's folder or hub id, and the arguments with which inspect-ai's provider `hf` loads it."""
    require_whole(model.model, "inspect-ai")
    settings: dict[str, Any] = {"dtype": config.dtype_of_logps}
    text, variables = read_template(config.chat_template), model.chat_template_kwargs or config.chat_template_kwargs
    tokenizer = load_tokenizer(model.model, revision=model.revision)
    template = ChatTemplate(tokenizer, text, variables)
    template.check_time()
    if text is not None or variables or not tokenizer.chat_template:
        settings["chat_template"] = template.source
    if model.revision is None or Path(model.model).is_dir():
        return model.model, settings
    from huggingface_hub import snapshot_download

    try:  # the provider would load the tokenizer of the newest revision
        return snapshot_download(model.model, revision=model.revision), settings
    except Exception as error:  # also errors of the HTTP client
        raise ModelError(
            f"{model.model}: revision {model.revision} cannot be downloaded ({first_line(error)})"
        ) from error


def _result(config: SuitesJob, suite: Suite, model: str, runner: _Runner, folder: RunFolder) -> InspectResult:
    name = f"models/{model}/inspect_{suite.name}.json"
    if folder.resumed and folder.file(name).is_file():
        return load(InspectResult, folder.file(name))
    files = local_files(suite, config.suites.folders)
    if files:
        folder.add_data(suite.name, [str(file) for file in files])
    grader = config.suites.grader or ""
    asks_server = suite.inspect is not None and suite.inspect.grader and not grader.startswith("hf/")
    with nullcontext() if asks_server else no_network_if_offline():
        result = runner.run(suite, files[0] if files else None)
    folder.write_json(name, result)
    return result


class _Runner:
    """Runs tasks on one model; it and the grader are loaded when first needed, and freed at the end."""

    def __init__(self, config: SuitesJob, model: WeightsModel, logs: Path, trained: Mapping[str, Hashes]) -> None:
        path, self._model_args = _settings(config, model)
        self._model, self._suites, self._seed, self._logs = f"hf/{path}", config.suites, config.seed, logs
        self._trained = trained.get(model.name)
        self._left_out = list(trained.values()) if config.suites.trained_on == "leave_out" else []
        self._loaded: dict[str, Any] = {}

    def __enter__(self) -> _Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, model in self._loaded.items():
            try:  # clients of servers are closed only here
                asyncio.run(model.__aexit__(kind, error, trace))
            except Exception as fault:  # a client whose event loop is closed; the results are not affected
                _log.debug("%s: %s", name, fault)
        self._loaded.clear()

    def run(self, suite: Suite, file: Path | None) -> InspectResult:
        """Return the metric of a suite's task, on the data of `file` if given; inspect-ai's log is kept.

        Raises `MissingExtraError` without inspect-ai, `UnreachableError` with the reason if the task, its data, its
        grader or the metric is not available, or no sample could be run.
        """
        inspect_ai = _inspect_ai()
        assert suite.inspect is not None
        grader, max_tokens = self._suites.grader, self._suites.max_new_tokens
        if suite.inspect.grader and grader is None:
            raise UnreachableError("its answers are graded by a model; name one in suites.grader")
        root = logging.getLogger()
        before = root.level, list(root.handlers)  # inspect-ai reconfigures the root logger
        try:
            roles = {"grader": self._load(grader, {})} if suite.inspect.grader and grader else {}
            given = {} if file is None else {"file": str(file.absolute())}
            found = inspect_ai.eval(
                _task(suite.inspect.task),
                model=self._load(self._model, {**self._model_args}),
                model_roles=roles,
                task_args={**suite.inspect.arguments, **given},
                limit=(limit := self._suites.choice(suite.name).limit),
                sample_shuffle=None if limit is None else self._seed + 1,  # 0 would not shuffle
                seed=self._seed,
                fail_on_error=False,
                log_samples=True,
                log_dir=str(self._logs.absolute()),
                log_level="error",
                display="none",
                max_connections=self._suites.batch_size_of_tasks,
                **({} if max_tokens is None else {"max_tokens": max_tokens}),
            )
        except Exception as error:  # errors of the task's code, of data sets, of the clients of servers
            advice = ""
            if suite.inspect.files and file is None:
                advice = f" (or put {' or '.join(suite.inspect.files)} into a folder of suites.folders)"
            reason = f"inspect-ai cannot run {suite.inspect.task}: {first_line(error)}{advice}"
            raise UnreachableError(reason) from error
        finally:
            root.setLevel(before[0])
            root.handlers[:] = before[1]
        if len(found) != 1:
            raise UnreachableError(f"{suite.inspect.task} names {len(found)} tasks of inspect-ai; name one")
        result = _read_result(found[0], next(iter(suite.metrics)), suite.inspect.largest)
        return self._checked(result, found[0].samples or [])

    def _checked(self, result: InspectResult, samples: Sequence[Any]) -> InspectResult:
        """Leave out the samples of a training, which were run too, and count those of this model's training."""
        left = {one for hashes in self._left_out for one in _of_training(samples, hashes)}
        if left:
            ids = {str(sample.id) for sample in samples} - left
            if not ids:
                raise UnreachableError(f"all its {len(left)} samples are left out: {TRAINED}")
            if result.value is not None and not result.by_sample:
                raise UnreachableError(
                    f"its metric is no mean over samples, so that {len(left)} cannot be left out ({TRAINED}); set "
                    "suites.trained_on: keep"
                )
            kept = {name: value for name, value in result.by_sample.items() if name in ids}
            value = fmean(kept.values()) if kept else None
            result = InspectResult(value, kept, len(kept), len(ids) - len(kept), result.version, left_out=len(left))
        if self._trained is None:
            return result
        return replace(result, trained_on=len(_of_training(samples, self._trained) - left))

    def _load(self, name: str, model_args: dict[str, Any]) -> Any:
        from inspect_ai.model import get_model

        if name.startswith("hf/"):
            model_args |= {"use_safetensors": True, "trust_remote_code": False}
        if name not in self._loaded:
            self._loaded[name] = get_model(name, memoize=False, **model_args)
        return self._loaded[name]


def _inspect_ai() -> Any:
    try:
        import inspect_ai
    except ImportError as error:
        raise MissingExtraError(
            "suites of inspect-ai need inspect-ai, which is not installed; pip install 'bfpo[inspect]' (Python 3.11 or "
            "newer)"
        ) from error
    return inspect_ai


def _task(name: str) -> str:
    """Return the name by which inspect-ai finds a task: for a task of this package, its path."""
    own = FOLDER / "tasks" / name.partition("@")[0]
    return f"{own.parent / name}" if own.is_file() else name


def _read_result(log: Any, metric: str, largest: float) -> InspectResult:
    samples = log.samples or []
    if log.status == "cancelled":  # by Ctrl-C, which inspect-ai's `eval` swallows
        raise KeyboardInterrupt
    if log.status != "success":
        raise UnreachableError(f"inspect-ai ended with {log.status}: {log.error.message if log.error else 'no reason'}")
    errors = [sample.error.message for sample in samples if sample.error]
    total = len({sample.id for sample in samples})
    version = str(log.eval.task_version)
    scores = log.results.scores if log.results else []  # no results if every sample ended in an error
    score = next((each for each in scores if metric in each.metrics), None)
    if errors and (score is None or not score.scored_samples):
        raise UnreachableError(f"none of {total} samples was scored; the first ended in: {first_line(errors[0])}")
    if score is None:
        known = sorted({name for each in scores for name in each.metrics})
        raise UnreachableError(f"its log has no metric {metric!r}; it has: {', '.join(known) or 'none'}")
    num = score.scored_samples
    if not num:  # some tasks then report a rate of 0
        return InspectResult(None, {}, 0, total, version)
    value = score.metrics[metric].value / largest
    if not 0 <= value <= 1:
        raise UnreachableError(f"its {metric} is {value * largest:g}, not in [0, {largest:g}]; set inspect.largest")
    by_sample = _by_sample(samples, score, largest)
    if len(by_sample) != num or not math.isclose(math.fsum(by_sample.values()) / num, value, abs_tol=1e-6):
        by_sample = {}
    return InspectResult(value, by_sample, num, total - num, version)


def _of_training(samples: Sequence[Any], hashes: Hashes) -> set[str]:
    """Return the ids of the samples whose input is a prompt of a training."""
    found = set()
    for sample in samples:
        turns = [("user", sample.input)] if isinstance(sample.input, str) else [(t.role, t.text) for t in sample.input]
        if asked_in_training(Prompt("", tuple(Message(*turn) for turn in turns)), hashes):
            found.add(str(sample.id))
    return found


def _by_sample(samples: list[Any], score: Any, largest: float) -> dict[str, float]:
    """Return the samples' scores that are numbers; repetitions of a sample are left out."""
    from inspect_ai.scorer import value_to_float

    found: dict[str, float] = {}
    for sample in samples:
        value = sample.scores[score.scorer].value if score.scorer in (sample.scores or {}) else None
        value = value.get(score.name) if isinstance(value, dict) else value
        if sample.epoch > 1 or not isinstance(value, (str, bool, int, float)):
            continue
        number = value_to_float()(value) / largest
        if 0 <= number <= 1:  # false for NaN
            found[str(sample.id)] = number
    return found
