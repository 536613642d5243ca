"""Discriminative suites run with lm-eval (an extra), on local documents or the data sets of the hub."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from bfpo.config import read_template
from bfpo.config.evaluate import SuitesJob
from bfpo.core.errors import MissingExtraError, first_line
from bfpo.core.offline import no_network_if_offline
from bfpo.core.records import load
from bfpo.core.schema import Message, Prompt
from bfpo.data.load import Hashes
from bfpo.data.split import smallest
from bfpo.data.template import ChatTemplate
from bfpo.policy.load import load_tokenizer
from bfpo.policy.trained import require_whole
from bfpo.runs.folder import RunFolder
from bfpo.suites.catalogue import FOLDER, Suite
from bfpo.suites.files import COMMITS, TRAINED, UnreachableError, local_files, read_documents
from bfpo.suites.records import TaskResult
from bfpo.training.trained_on import asked_in_training

__all__ = ["TaskRunner", "run_tasks"]

_log = logging.getLogger(__name__)
_ASKED = ("prompt", "question", "Question", "goal")  # columns with what a user asks
_TOO_LONG = "longer than the model's context leaves room for"
_NO_CHECK = (
    "a check could not be run: IFEval needs NLTK's file tokenizers/punkt_tab, which is not here (python -m "
    "nltk.downloader punkt_tab gets it; without a network, copy ~/nltk_data from a machine that has it)"
)


def run_tasks(
    config: SuitesJob, suites: Sequence[Suite], folder: RunFolder, trained: Mapping[str, Hashes]
) -> tuple[dict[tuple[str, str], TaskResult], dict[str, str], dict[str, tuple[str, str | None]]]:
    """Return the results by (suite, model), the reasons of skipped suites, and each suite's source and revision.

    `trained`: hashes of the prompts that a model was trained on, by its name. A suite that fails for one model is
    skipped for all, so that all models are compared on the same suites.
    """
    tasks: dict[str, str] = {}
    skipped: dict[str, str] = {}
    sources: dict[str, tuple[str, str | None]] = {}
    for suite in suites:
        try:
            tasks[suite.name], sources[suite.name] = _task(config, suite, folder)
        except (UnreachableError, MissingExtraError) as error:
            skipped[suite.name] = str(error)
    results: dict[tuple[str, str], TaskResult] = {}
    for model in config.with_weights():
        runner = TaskRunner(
            model.model,
            revision=model.revision,
            dtype=config.dtype_of_logps,
            batch_size=config.suites.batch_size_of_tasks,
            tasks=folder.path / "tasks",
            chat_template=read_template(config.chat_template),
            chat_template_kwargs=model.chat_template_kwargs or config.chat_template_kwargs,
            max_new_tokens=config.suites.max_new_tokens,
            trained=trained.get(model.name),
            left_out=list(trained.values()) if config.suites.trained_on == "leave_out" else (),
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


def _task(config: SuitesJob, suite: Suite, folder: RunFolder) -> tuple[str, tuple[str, str | None]]:
    """Write the task, on local documents if the folders hold them; return its name, its source and the commit."""
    files = local_files(suite, config.suites.folders)
    if not files and suite.source.hub is None:
        names = ", ".join(suite.source.files)
        raise UnreachableError(f"none of its files is in suites.folders, and it is not on the hub; put {names} there")
    if files:
        folder.add_data(suite.name, [str(file) for file in files])
        names = ", ".join(file.name for file in files)
        rows = read_documents(files)
        if not rows:
            raise UnreachableError(f"{names} in suites.folders has no row; put the documents of {suite.task} there")
        documents = folder.write_jsonl(f"tasks/{suite.name}.documents.jsonl", rows)
        return _write_task(suite, folder.path / "tasks", documents, None), (names, None)
    source = str(suite.source.hub)
    commits = folder.record.get(COMMITS, {})
    revision = suite.at(commits.get(suite.name)).source.revision or _newest(source)
    if revision is not None:
        folder.add_facts(**{COMMITS: {**commits, suite.name: revision}})
    return _write_task(suite, folder.path / "tasks", None, revision), (source, revision)


def _newest(hub_id: str) -> str | None:
    """Return the newest commit on the hub; `None` if it does not answer (cached copies may still exist)."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(hub_id, timeout=10).sha
    except Exception as error:  # also errors of the HTTP client
        _log.debug("%s: %s", hub_id, error)
        return None


def _write_task(suite: Suite, folder: Path, documents: Path | None, revision: str | None) -> str:
    """Write the task of a suite as `bfpo_NAME.yaml`, which includes the original YAML, and return the task's name.

    With `documents` (JSON lines) every split of the task reads them, else the data set of the hub at `revision`.
    The original is one of ours, of lm-eval or, last, of the working directory. Raises `UnreachableError` if none has
    it, `MissingExtraError` without lm-eval.
    """
    assert suite.task is not None
    base = FOLDER / "tasks" / suite.task
    if not base.is_file():
        base = Path(_lm_eval().__file__).parent / "tasks" / suite.task
    if not base.is_file():
        base = Path(suite.task).absolute()
    if not base.is_file():
        raise UnreachableError(f"neither lm-eval nor the working directory has the task {suite.task}")
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


def _lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise MissingExtraError(
            "discriminative suites need lm-eval, which is not installed; pip install 'bfpo[lm-eval]'"
        ) from error
    return lm_eval


def _result(
    config: SuitesJob, suite: Suite, model: str, task: str, runner: TaskRunner, folder: RunFolder
) -> TaskResult:
    name = f"models/{model}/{task}.json"
    if folder.resumed and folder.file(name).is_file():
        return load(TaskResult, folder.file(name))
    try:
        result = runner.run(
            task, next(iter(suite.metrics)), limit=config.suites.choice(suite.name).limit, seed=config.seed
        )
    except TaskDataError as error:
        own, bring = local_files(suite, config.suites.folders), " or ".join(suite.source.files)
        advice = f"or put {bring} into a folder of suites.folders" if bring else ""
        if own:
            names = ", ".join(file.name for file in own)
            advice = f"check {names} in suites.folders, whose columns the task reads, and {suite.task}"
        raise UnreachableError(f"{error}{advice and f'; {advice}'}") from error
    folder.write_json(name, result)
    return result


class TaskDataError(UnreachableError):
    """A task that cannot be loaded with its documents."""


class TaskRunner:
    """Runs the tasks of a folder on one model, which is loaded for the first task.

    Prompts of generative tasks are formatted with the chat template (`chat_template`, else the tokenizer's, else the
    default one). `max_new_tokens` lowers the length of a task's answers. `trained`: hashes of the prompts that the
    model was trained on; documents with a prompt of `left_out` are not asked.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None,
        dtype: str,
        batch_size: int,
        tasks: Path,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        trained: Hashes | None = None,
        left_out: Sequence[Hashes] = (),
    ) -> None:
        self._settings: dict[str, Any] = {
            "pretrained": model,
            "revision": revision or "main",
            "dtype": dtype,
            "batch_size": batch_size,
            "use_safetensors": True,
        }
        self._tasks = tasks
        self._chat_template, self._variables = chat_template, chat_template_kwargs
        self._max_new_tokens = max_new_tokens
        self._trained, self._left_out = trained, left_out
        self._model: Any = None
        self._manager: Any = None

    def run(self, task: str, metric: str, *, limit: int | None, seed: int) -> TaskResult:
        """Return the metric of every document (of `limit` of them, chosen by their hashes).

        Raises `TaskDataError` with the reason if the task's data set cannot be loaded, `UnreachableError` if lm-eval
        cannot run it, or if all documents are left out.
        """
        lm_eval = _lm_eval()
        if self._model is None:
            self._load()
        try:
            # NLTK prints about its downloads for IFEval.
            with no_network_if_offline(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                loaded = self._manager.load([task])["tasks"]
        except Exception as error:  # errors of data sets, the hub's client, missing extras of lm-eval
            raise TaskDataError(f"lm-eval cannot load {task}: {_advice(error)}") from error
        kinds = {each.config.output_type for each in loaded.values()}
        generates = "generate_until" in kinds
        for each in loaded.values():
            each.set_fewshot_seed(seed=seed)
            if generates:
                self._bound(each)
        kept = {name: _kept(each, self._left_out) for name, each in loaded.items()}
        whole = limit is None and not self._left_out
        samples = {name: _drawn(each, kept[name], limit, seed) for name, each in loaded.items()}
        quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())  # no progress bars in a log
        with quiet, no_network_if_offline():
            result = lm_eval.evaluate(
                lm=self._model,
                task_dict=loaded,
                samples=None if whole else samples,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=generates,
            )
        # lm-eval cuts on the left what is longer; of a choice it reads the prompt and all but its last token.
        room = self._model.max_length - self._longest(loaded[task]) if generates else self._model.max_length + 1
        room = None if "loglikelihood_rolling" in kinds else room
        found = _read_result(result["samples"][task], result["versions"].get(task), metric, self._num_tokens, room)
        left_out = len(loaded[task].eval_docs) - len(kept[task])
        return replace(
            found, trained_on=_num_known(loaded[task], samples[task], self._trained), left_out=left_out or None
        )

    def _load(self) -> None:
        import torch

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        require_whole(self._settings["pretrained"], "lm-eval")
        tokenizer = load_tokenizer(self._settings["pretrained"], revision=self._settings["revision"])
        template = ChatTemplate(tokenizer, self._chat_template, self._variables)
        template.check_time()
        tokenizer.chat_template = template.source
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = HFLM(**self._settings, tokenizer=tokenizer, device=device, trust_remote_code=False)
        self._manager = TaskManager(include_path=str(self._tasks), include_defaults=False)

    def _bound(self, task: Any) -> None:
        """Limit the length of a task's answers; raises `UnreachableError` if it leaves no room for a prompt."""
        longest = self._longest(task)
        if self._max_new_tokens is not None:
            longest = min(longest, self._max_new_tokens)
        if longest >= self._model.max_length:
            raise UnreachableError(
                f"its answers may take {longest} tokens, and the model's context is {self._model.max_length}; lower "
                "suites.max_new_tokens"
            )
        task.set_config("generation_kwargs", {"max_gen_toks": longest}, update=True)

    def _longest(self, task: Any) -> int:
        return int((task.config.generation_kwargs or {}).get("max_gen_toks", self._model.max_gen_toks))

    def _num_tokens(self, text: str) -> int:
        return len(self._model.tok_encode(text))


def _prompts_of(task: Any, doc: Mapping[str, Any]) -> list[Prompt]:
    """Return what a training may have as a prompt: the document as the task asks it, and its columns `_ASKED`."""
    texts = (task.doc_to_text(doc), *map(doc.get, _ASKED))
    return [Prompt("", (Message("user", text),)) for text in texts if isinstance(text, str) and text.strip()]


def _kept(task: Any, left_out: Sequence[Hashes]) -> list[int]:
    """Return the places of the documents without a prompt of these trainings."""
    docs = list(task.eval_docs)
    known = (
        any(asked_in_training(one, hashes) for hashes in left_out for one in _prompts_of(task, doc)) for doc in docs
    )
    kept = [place for place, is_known in enumerate(known) if not is_known]
    if docs and not kept:
        raise UnreachableError(f"all its {len(docs)} documents are left out: {TRAINED}")
    return kept


def _drawn(task: Any, kept: Sequence[int], limit: int | None, seed: int) -> list[int]:
    if limit is None:
        return list(kept)
    docs = list(task.eval_docs)
    texts = [json.dumps(docs[place], sort_keys=True, default=str) for place in kept]
    return [kept[n] for n in smallest(texts, limit, seed)]


def _num_known(task: Any, places: Sequence[int], trained: Hashes | None) -> int | None:
    """Return how many of these documents the model was trained on; `None` if no text of theirs can be looked up."""
    if trained is None:
        return None
    docs = list(task.eval_docs)
    prompts = [_prompts_of(task, docs[place]) for place in places]
    if not any(prompts):
        return None
    return sum(any(asked_in_training(one, trained) for one in some) for some in prompts)


def _advice(error: Exception) -> str:
    """Return the first line of an error, and how to install a missing package of the extra."""
    missing = isinstance(error.__cause__ or error, ModuleNotFoundError)
    return first_line(error) + ("; pip install 'bfpo[lm-eval]' installs what its tasks need" if missing else "")


def _text(request: Sequence[Any]) -> str:
    """Return the text of a request: its prompt, and the choice if there is one (not the settings of sampling)."""
    return "".join(part for part in request if isinstance(part, str))


def _read_result(
    samples: Sequence[Mapping[str, Any]],
    version: object,
    metric: str,
    num_tokens: Callable[[str], int],
    room: int | None,
) -> TaskResult:
    """Return the documents' values, of several filters by the last, such as GSM8K's flexible one.

    A prompt, with the choice that it is scored with, of more than `room` tokens was cut by lm-eval and is unscored.
    Raises `UnreachableError` for a metric that is not reported or not in [0, 1], and if no document is scored.
    """
    last = samples[-1].get("filter") if samples else None  # a sample is there once for every filter of its task
    samples = [sample for sample in samples if sample.get("filter") == last]
    by_document: dict[str, float] = {}
    reasons: dict[str, int] = {}
    for sample in samples:
        value = sample.get(metric)
        if not isinstance(value, (bool, int, float)):
            raise UnreachableError(f"lm-eval does not report {metric} per document")
        if not (math.isnan(value) or 0 <= value <= 1):
            raise UnreachableError(f"its {metric} of a document is {value:g}, not in [0, 1]; name another metric")
        reason = None
        if room is not None and max(map(num_tokens, map(_text, sample["arguments"]))) > room:
            reason = _TOO_LONG
        elif math.isnan(value):
            reason = _NO_CHECK
        if reason is None:
            by_document[str(sample["doc_id"])] = float(value)
        else:
            reasons[reason] = reasons.get(reason, 0) + 1
    if not by_document:
        counts = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
        raise UnreachableError(f"none of {len(samples)} documents is scored ({counts})")
    return TaskResult(by_document, str(version), reasons)
