"""One model of an evaluation that exists: its values item by item, and what they are bound to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bfpo.core.errors import BfpoError, DataError
from bfpo.core.files import file_digest
from bfpo.core.provenance import RunFile, run_above
from bfpo.core.records import load, load_lines
from bfpo.core.schema import Score, Verdict, VerdictRow
from bfpo.data.files import iter_rows
from bfpo.data.messages import messages_of
from bfpo.data.rejects import RowError
from bfpo.data.split import normalised_prompt
from bfpo.scores.records import CoherenceBound, ScoresFile
from bfpo.scores.scores import Judged, judged_row
from bfpo.suites.catalogue import known_suites, load_suites
from bfpo.suites.records import GatedModel, InspectResult, ModelFacts, SuiteAnswer, SuiteFacts, SuitesFile, TaskResult
from bfpo.suites.scores import SUITE_METRICS

__all__ = ["COMPLETIONS", "TASK", "Evaluated", "Items", "Measured", "read_categories", "read_evaluation"]

COMPLETIONS = "completions"
"""The suite of an evaluation of completions, which has none."""
TASK = "task"
"""The metric of a task of lm-eval or inspect-ai: its only one."""


@dataclass(frozen=True, slots=True)
class Items:
    """One metric of one suite: item -> value in [0, 1], `None` if unscored; the prompt and the kind of each item.

    `num_more`: unscored items of which no more is known. `categories`: of each item, "" without one.
    """

    values: Mapping[str, float | None]
    prompts: Mapping[str, str]
    kinds: Mapping[str, str]
    num_more: int = 0
    categories: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measured:
    """A suite of one model: its items by metric, and hashes that must agree with the other model's.

    `reason`: why it was not scored. `metrics`: those that it would measure. `ranker`: the version of what gave its win
    rates ("": not recorded), `baseline`: the model that they compare with.
    """

    name: str
    title: str
    items: dict[str, Items] = field(default_factory=dict)
    prompts: str = ""
    judge: str = ""
    judge_version: str = ""
    reason: str = ""
    metrics: frozenset[str] = frozenset()
    num_too_long: int = 0
    ranker: str = ""
    baseline: GatedModel | None = None

    def has(self, metric: str) -> bool:
        """Return whether an item has a value of a metric."""
        return metric in self.items and any(value is not None for value in self.items[metric].values.values())


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One model of an evaluation, in `folder`; `reader`: what read the coherence; `longest`: of an answer, tokens."""

    folder: Path
    model: GatedModel
    suites: dict[str, Measured]
    reader: str = ""
    longest: str = ""


def read_evaluation(path: Path) -> Evaluated:
    """Return one model of the evaluation in `path`; one of several models is FOLDER/models/NAME.

    Raises `DataError` for a folder without a finished evaluation, with several models, without this model, or whose
    answers do not give its scores; `RunError` for files that cannot be read.
    """
    inside = path.parent.name == "models" and not (path / "scores.json").is_file()
    folder, name = (path.parents[1], path.name) if inside else (path, None)
    if not (folder / "scores.json").is_file() or not (folder / "run.json").is_file():
        raise DataError.at(path, None, "holds no evaluation; needed: the --out of `bfpo evaluate`, or its models/NAME")
    run = load(RunFile, folder / "run.json")
    if run.stage != "evaluate" or run.status != "finished":
        done = (
            f"is a run of {run.stage}" if run.stage != "evaluate" else f"its evaluation has the status {run.status!r}"
        )
        raise DataError.at(path, None, f"{done}; a finished run of `bfpo evaluate` is needed (--resume continues one)")
    if "suites" in run.config:
        return _of_suites(folder, name, run)
    if "completions" not in run.config:
        raise DataError.at(path, None, "is an evaluation of pairs alone; one of suites or completions is needed")
    return _of_completions(folder, run)


def read_categories(file: str) -> dict[str, str]:
    """Return the category of each normalised prompt; the rows have `prompt`, text or messages, and `category`.

    Raises `DataError`, with the line, for a row without these, or two categories of one prompt.
    """
    found: dict[str, str] = {}
    for row in iter_rows(Path(file)):
        category = row.columns.get("category")
        try:
            prompt = normalised_prompt(messages_of(row.columns.get("prompt"), "prompt"))
        except RowError as error:
            raise DataError.at(file, row.line, str(error)) from error
        if not isinstance(category, str) or not category.strip():
            raise DataError.at(file, row.line, f"category: got {category!r:.80}; a text is needed")
        if found.setdefault(prompt, category) != category:
            raise DataError.at(
                file, row.line, f"category: got {category!r}, and {found[prompt]!r} for the same prompt before"
            )
    return found


# --------------------------------------------------------------------------------------------------- completions


def _of_completions(folder: Path, run: RunFile) -> Evaluated:
    file = load(ScoresFile, folder / "scores.json")
    rows = load_lines(VerdictRow, folder / "verdicts.jsonl")
    read = _coherence_was_read(file.scores, rows)
    judged = [
        judged_row(
            row.completion_id,
            row.prompt,
            row.kind,
            row,
            finished=None if row.blocked else row.finished,
            category=row.category,
            coherent=None if not read or row.blocked else not row.incoherent,
        )
        for row in rows
    ]
    items = {score.metric: found for score in file.scores if (found := _items(score.metric, judged)) is not None}
    for score in file.scores:
        _check_score(folder, COMPLETIONS, score, items)
    prompts = _digest(sorted([row.id, row.kind, row.prompt] for row in judged))
    judges = ", ".join(sorted({row.judge for row in rows}))
    suite = Measured(COMPLETIONS, "Completions", items, prompts, judges, run.judges.get(COMPLETIONS, ""))
    source = run_above(str(run.config["completions"]))
    made = RunFile() if source is None else load(RunFile, source / "run.json", [])
    name = str(made.config.get("model", run.config["completions"]))
    longest = made.config.get("max_new_tokens")
    return Evaluated(
        folder,
        GatedModel(name, name, _optional(made.config.get("revision")), _run_of(made, name), made.weights.get(name)),
        {COMPLETIONS: replace(suite, metrics=frozenset(filter(suite.has, items)))},
        _reader(file.coherence),
        "" if longest is None else str(longest),
    )


# -------------------------------------------------------------------------------------------------------- suites


def _of_suites(folder: Path, name: str | None, run: RunFile) -> Evaluated:
    file = load(SuitesFile, folder / "scores.json")
    names = [model.name for model in file.models]
    if name is None and len(names) != 1:
        places = " or ".join(str(folder / "models" / one) for one in names)
        raise DataError.at(folder, None, f"has {len(names)} models; name one: {places}")
    name = names[0] if name is None else name
    if name not in names:
        raise DataError.at(folder, None, f"has no model {name}; allowed: {', '.join(names)}")
    models = {facts.name: _model(run, facts) for facts in file.models}
    rows = [row for row in load_lines(SuiteAnswer, folder / "answers.jsonl") if row.model == name]
    metrics = _metrics_of(run)
    suites: dict[str, Measured] = {}
    for suite in file.suites:
        own = [score for score in file.scores if (score.suite, score.model) == (suite.name, name)]
        found = Measured(
            suite.name,
            suite.title or suite.name,
            judge=suite.judge or "",
            judge_version=run.judges.get(suite.name, ""),
            metrics=metrics.get(suite.name, frozenset(score.metric.partition("[")[0] for score in own)),
            ranker=run.judges.get("ranker", ""),
            baseline=models.get(run.config["suites"].get("baseline")),
        )
        if suite.status != "scored":
            suites[suite.name] = replace(found, reason=f"skipped: {' '.join(str(suite.reason).split())}")
        elif suite.kind == "generative":
            suites[suite.name] = _generative(
                folder, found, suite, own, [row for row in rows if row.suite == suite.name], run
            )
        elif suite.kind in ("discriminative", "inspect") and suite.ideal == "higher":
            suites[suite.name] = _task(folder, found, suite, name)
    settings = run.config["suites"]
    longest = [settings.get("max_new_tokens"), settings.get("max_prompt_length"), run.config.get("thinking")]
    return Evaluated(folder, models[name], suites, _reader(file.coherence), json.dumps(longest))


def _model(run: RunFile, facts: ModelFacts) -> GatedModel:
    config = next((one for one in run.config.get("models") or [] if one.get("name") == facts.name), run.config)
    revision, weights = _optional(config.get("revision")), run.weights.get(facts.model)
    return GatedModel(facts.name, facts.model, revision, _run_of(run, facts.model), weights, facts.url)


def _generative(
    folder: Path,
    found: Measured,
    facts: SuiteFacts,
    scores: Sequence[Score],
    rows: Sequence[SuiteAnswer],
    run: RunFile,
) -> Measured:
    read = _coherence_was_read(scores, [row.verdict for row in rows if row.verdict])
    judged = [
        judged_row(
            row.id,
            normalised_prompt(row.prompt),
            row.kind,
            row.verdict,
            finished=None if row.blocked else row.finished,
            category=row.category,
            coherent=None if not read or row.blocked else not row.incoherent,
        )
        for row in rows
        if row.verdict is not None
    ]
    names = {score.metric for score in scores} | {"helpfulness"}  # which a judge may give beside any metric
    items = {name: one for name in names if (one := _items(name, judged)) is not None}
    for score in scores:
        _check_score(folder, found.name, score, items)
    baseline = run.config["suites"].get("baseline")
    for name in sorted(name for name in names if name.startswith("winrate[")):
        own = baseline is not None and facts.name and baseline == (rows[0].model if rows else None)
        won = {row.id: 0.5 if own else (row.wins or {}).get(name) for row in rows}
        if any(value is not None for value in won.values()):
            items["winrate"] = Items(won, {row.id: row.prompt for row in judged}, dict.fromkeys(won, ""))
    found = replace(found, items=items)
    return replace(
        found,
        prompts=facts.prompts_sha256 or "",
        metrics=found.metrics.union(filter(found.has, items)),
        num_too_long=(facts.too_long or {}).get(rows[0].model if rows else "", 0),
    )


def _task(folder: Path, found: Measured, facts: SuiteFacts, model: str) -> Measured:
    """Return the values of a task by document; its documents are those of a local file or of a commit of the hub."""
    place = folder / "models" / model
    if facts.kind == "discriminative":
        result = load(TaskResult, place / f"bfpo_{facts.name.replace('-', '_')}.json")
        values, version = result.by_document, result.version
        unscored = result.unscored
    else:
        sample = load(InspectResult, place / f"inspect_{facts.name}.json")
        values, version, unscored = sample.by_sample, sample.version, sample.unscored
    documents = folder / "tasks" / f"{facts.name}.documents.jsonl"
    own = file_digest(documents) if documents.is_file() else None
    # Documents have numbers, which are other documents in another task.
    texts = {item: f"{facts.name} {item}" for item in values}
    items = Items(values, texts, dict.fromkeys(values, ""), unscored)
    prompts = _digest([facts.source, facts.revision, own])
    return replace(
        found, items={TASK: items} if values else {}, prompts=prompts, judge_version=version, metrics=frozenset({TASK})
    )


def _metrics_of(run: RunFile) -> dict[str, frozenset[str]]:
    """Return the metrics that each suite of a run would measure, as far as its suites are known here."""
    use = run.config["suites"].get("use") or []
    try:
        suites: Iterable[Any] = load_suites(use)
    except (BfpoError, OSError):
        suites = known_suites().values()
    return {
        suite.name: frozenset(
            suite.metrics if suite.kind == "generative" else {TASK} if "higher" in suite.metrics.values() else ()
        )
        for suite in suites
    }


# -------------------------------------------------------------------------------------------------------- shared


def _items(metric: str, judged: Sequence[Judged]) -> Items | None:
    """Return the items that a metric is about; `None` if there are none."""
    if metric not in SUITE_METRICS:
        return None
    asked = [row for row in judged if SUITE_METRICS[metric].asks(row)]
    if not asked:
        return None
    values = {row.id: None if (value := SUITE_METRICS[metric].value(row)) is None else float(value) for row in asked}
    prompts, kinds = ({row.id: getattr(row, name) for row in asked} for name in ("prompt", "kind"))
    return Items(values, prompts, kinds, categories={row.id: row.category for row in asked})


def _check_score(folder: Path, suite: str, score: Score, items: Mapping[str, Items]) -> None:
    """Raise `DataError` if the answers do not give the mean that is in `scores.json`."""
    if score.metric not in SUITE_METRICS:
        return
    known = (
        [value for value in items[score.metric].values.values() if value is not None] if score.metric in items else []
    )
    mean = sum(known) / len(known) if known else None
    if (mean is None) != (score.value is None) or (
        mean is not None and score.value is not None and abs(mean - score.value) > 1e-9
    ):
        raise DataError.at(
            folder,
            None,
            f"{suite}, {score.metric}: the answers give {mean}, scores.json has {score.value}; a file was changed, "
            "or written by another version; run `bfpo evaluate` again",
        )


def _coherence_was_read(scores: Sequence[Score], verdicts: Sequence[Verdict]) -> bool:
    """Return whether the text was read for coherence: not where a judge reads the form."""
    return any(score.metric == "coherent" for score in scores) and all(row.well_formed is None for row in verdicts)


def _reader(bound: CoherenceBound | None) -> str:
    return (
        "the text"
        if bound is None or bound.bound is None
        else f"the text and {bound.model_key} above {bound.bound:.6g}"
    )


def _run_of(run: RunFile, model: str) -> str | None:
    return run.model_runs.get(model)


def _optional(value: Any) -> str | None:
    return None if value is None else str(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
