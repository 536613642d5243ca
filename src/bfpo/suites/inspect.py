"""Tasks of inspect-ai (an extra), run by its `eval` on a local model; what their logs say becomes a result."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from bfpo.config.evaluate import SuitesJob
from bfpo.config.load import read_template
from bfpo.config.suites import WeightsModel
from bfpo.core.errors import MissingExtraError, ModelError, first_line
from bfpo.core.records import load
from bfpo.data.chat import DEFAULT_CHAT_TEMPLATE
from bfpo.policy.load import load_tokenizer
from bfpo.runs.folder import RunFolder
from bfpo.suites.catalogue import FOLDER, Suite
from bfpo.suites.files import UnreachableError, local_files

__all__ = [
    "InspectResult",
    "InspectRunner",
    "run_inspect",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InspectResult:
    """One metric of one model: `value` as the log has it, over `InspectTask.largest`, `None` where none was scored.

    `by_sample` has the samples' own values where the metric is their mean, else nothing; `num` samples were scored,
    `unscored` were not: their score has no value, or they ended in an error.
    """

    value: float | None
    by_sample: dict[str, float]
    num: int
    unscored: int
    version: str


class InspectRunner:
    """One model for all tasks; it and the grader are loaded when the first task is asked for, and freed at the end.

    `model_args` goes to inspect-ai's provider `hf`; `grader` is a model by inspect-ai's name (`openai/gpt-4o`).
    """

    def __init__(self, model: str, *, model_args: Mapping[str, Any], grader: str | None, batch_size: int) -> None:
        self._model, self._model_args, self._grader, self._batch_size = f"hf/{model}", model_args, grader, batch_size
        self._loaded: dict[str, Any] = {}

    def __enter__(self) -> InspectRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, model in self._loaded.items():
            try:  # models of servers have no other end
                asyncio.run(model.__aexit__(kind, error, trace))
            except Exception as fault:  # of a client whose event loop is gone: what was measured stays
                _log.debug("%s: %s", name, fault)
        self._loaded.clear()

    def run(
        self,
        suite: Suite,
        metric: str,
        *,
        file: Path | None = None,
        limit: int | None,
        max_tokens: int | None,
        seed: int,
        logs: Path,
    ) -> InspectResult:
        """Return the metric of a suite's task on its first `limit` samples; the log itself is left in `logs`.

        `file` is the task's data, where it takes a file of the user's.

        Raises `MissingExtraError` where there is no inspect-ai, `UnreachableError` with the reason where the task, its
        data, its grader or the metric cannot be had, or no sample could be run.
        """
        inspect_ai = _inspect_ai()
        assert suite.inspect is not None
        if suite.inspect.grader and self._grader is None:
            raise UnreachableError("its answers are graded by a model; name one in suites.grader")
        root = logging.getLogger()
        before = root.level, list(root.handlers)  # inspect-ai sets up the root logger as its own
        try:
            roles = {"grader": self._load(self._grader, {})} if suite.inspect.grader and self._grader else {}
            given = {} if file is None else {"file": str(file.absolute())}
            found = inspect_ai.eval(
                _task(suite.inspect.task),
                model=self._load(self._model, {**self._model_args}),
                model_roles=roles,
                task_args={**suite.inspect.arguments, **given},
                limit=limit,
                seed=seed,
                fail_on_error=False,
                log_samples=True,
                log_dir=str(logs.absolute()),
                log_level="error",
                display="none",
                max_connections=self._batch_size,
                **({} if max_tokens is None else {"max_tokens": max_tokens}),
            )
        except Exception as error:  # of the task's own code, of data sets, of the clients of servers
            bring = f" (or put {' or '.join(suite.inspect.files)} into a folder of suites.folders)"
            advice = bring if suite.inspect.files and file is None else ""
            reason = f"inspect-ai cannot run {suite.inspect.task}: {first_line(error)}{advice}"
            raise UnreachableError(reason) from error
        finally:
            root.setLevel(before[0])
            root.handlers[:] = before[1]
        if len(found) != 1:
            raise UnreachableError(f"{suite.inspect.task} is {len(found)} tasks of inspect-ai; name one")
        return _read_result(found[0], metric, suite.inspect.largest)

    def _load(self, name: str, model_args: dict[str, Any]) -> Any:
        from inspect_ai.model import get_model

        if name not in self._loaded:
            self._loaded[name] = get_model(name, memoize=False, **model_args)
        return self._loaded[name]


def _task(name: str) -> str:
    """Return a task by the name that inspect-ai finds it by: of ours with its folder."""
    own = FOLDER / "tasks" / name.partition("@")[0]
    return f"{own.parent / name}" if own.is_file() else name


def _inspect_ai() -> Any:
    try:
        import inspect_ai
    except ImportError as error:
        raise MissingExtraError(
            "suites of inspect-ai need it, and it is not installed; pip install 'bfpo[inspect]' (Python 3.11 or newer)"
        ) from error
    return inspect_ai


def _read_result(log: Any, metric: str, largest: float) -> InspectResult:
    samples = log.samples or []
    if log.status == "cancelled":  # by Ctrl-C, which its `eval` does not pass on
        raise KeyboardInterrupt
    if log.status != "success":
        raise UnreachableError(f"inspect-ai ended with {log.status}: {log.error.message if log.error else 'no reason'}")
    errors = [sample.error.message for sample in samples if sample.error]
    total = len({sample.id for sample in samples})
    version = str(log.eval.task_version)
    scores = log.results.scores if log.results else []  # without results where every sample ended in an error
    score = next((each for each in scores if metric in each.metrics), None)
    if errors and (score is None or not score.scored_samples):
        raise UnreachableError(f"none of {total} samples was scored; the first ended in: {first_line(errors[0])}")
    if score is None:
        known = sorted({name for each in scores for name in each.metrics})
        raise UnreachableError(f"its log has no metric {metric!r}; it has: {', '.join(known) or 'none'}")
    num = score.scored_samples
    if not num:  # a rate of nothing is 0 in some tasks, which would read as a finding
        return InspectResult(None, {}, 0, total, version)
    value = score.metrics[metric].value / largest
    if not 0 <= value <= 1:
        raise UnreachableError(f"its {metric} is {value * largest:g}, not in [0, {largest:g}]; set inspect.largest")
    by_sample = _by_sample(samples, score, largest)
    if len(by_sample) != num or not math.isclose(math.fsum(by_sample.values()) / num, value, abs_tol=1e-6):
        by_sample = {}
    return InspectResult(value, by_sample, num, total - num, version)


def _by_sample(samples: list[Any], score: Any, largest: float) -> dict[str, float]:
    """Return the number that each sample was scored, where it is one; repeated samples have none of their own."""
    from inspect_ai.scorer import value_to_float

    found: dict[str, float] = {}
    for sample in samples:
        value = sample.scores[score.scorer].value if score.scorer in (sample.scores or {}) else None
        value = value.get(score.name) if isinstance(value, dict) else value
        if sample.epoch > 1 or not isinstance(value, (str, bool, int, float)):
            continue
        number = value_to_float()(value) / largest
        if 0 <= number <= 1:  # not so of what is not a number
            found[str(sample.id)] = number
    return found


def run_inspect(
    config: SuitesJob, suites: Sequence[Suite], folder: RunFolder
) -> tuple[dict[tuple[str, str], InspectResult], dict[str, str]]:
    """Return the results by (suite, model) and the reasons of skipped suites; one that fails for a model is skipped."""
    results: dict[tuple[str, str], InspectResult] = {}
    skipped: dict[str, str] = {}
    for model in config.with_weights():
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


def _settings(config: SuitesJob, model: WeightsModel) -> tuple[str, dict[str, Any]]:
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


def _result(config: SuitesJob, suite: Suite, model: str, runner: InspectRunner, folder: RunFolder) -> InspectResult:
    name = f"models/{model}/inspect_{suite.name}.json"
    if folder.resumed and folder.file(name).is_file():
        return load(InspectResult, folder.file(name))
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
    folder.write_json(name, result)
    return result
