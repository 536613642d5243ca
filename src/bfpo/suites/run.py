"""`bfpo evaluate` over suites: accuracy on pairs, answers, verdicts, tasks of lm-eval and inspect-ai, scores.

Every step leaves its files in the run folder: `models/NAME/accuracy/` and `models/NAME/answers-*/` are run folders,
verdicts are in the cache, results of tasks in `models/NAME/bfpo_*.json` and `models/NAME/inspect_*.json`. A resumed
run does only what is missing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bfpo.config import read_template
from bfpo.config.evaluate import SuitesAndPairsJob, SuitesJob
from bfpo.config.suites import EvaluatedModel, ServedModel, WeightsModel
from bfpo.core.console import show
from bfpo.core.errors import BfpoError, ConfigError, DataError
from bfpo.core.inputs import check_files
from bfpo.core.records import load, load_lines
from bfpo.core.schema import JudgeFit, Message, Prompt, Score
from bfpo.data.annotations import LabelRow, read_labels
from bfpo.data.load import Hashes
from bfpo.judges.fit import log_fit
from bfpo.judges.judges import check_judge, check_opinions, check_requests
from bfpo.judges.settings import FINDS_NO_HARM
from bfpo.policy.source import check_source
from bfpo.runs.folder import RunFolder
from bfpo.runs.stages import run_stage
from bfpo.scores.people import GroupAnswers, people_results
from bfpo.scores.records import AccuracyRow, CoherenceBound, PeopleFile, ScoresFile
from bfpo.scores.scores import join_verdicts
from bfpo.suites.answers import SuiteAnswers, answer_suites, chat_of, context_of
from bfpo.suites.catalogue import Suite, load_suites, own_suites
from bfpo.suites.coherence import CoherenceReader, Reading, judged_answer, make_reader
from bfpo.suites.depth import check_divergence, measure_depth
from bfpo.suites.files import (
    COMMITS,
    TRAINED,
    SuitePrompts,
    UnreachableError,
    check_own_files,
    find_prompts,
    local_files,
    prompts_digest,
)
from bfpo.suites.guarded import Guarded, guard_answers, guard_warnings
from bfpo.suites.inspect import run_inspect
from bfpo.suites.judging import JudgedSuites, judge_of, judge_suites
from bfpo.suites.lm_eval import run_tasks
from bfpo.suites.prefill import check_harmful, check_prefill
from bfpo.suites.records import (
    DepthFile,
    InspectResult,
    ModelFacts,
    SuiteAnswer,
    SuiteFacts,
    SuiteScore,
    SuitesFile,
    TaskResult,
)
from bfpo.suites.score_tables import scores_text
from bfpo.suites.scores import (
    BLOCKED,
    SUITE_METRICS,
    WIN_RATES,
    Values,
    compare_values,
    labelling_judges,
    score_values,
    values_of,
)
from bfpo.suites.wins import alpaca_eval, check_ranked, win_rates
from bfpo.training.trained_on import asked_in_training, has_no_record, trained_prompts

__all__ = ["preview_suites", "run_suites"]

_ACCURACY = "accuracy"


@dataclass(slots=True)
class _Collected:
    """The results of the steps so far."""

    facts: dict[str, SuiteFacts] = field(default_factory=dict)
    scores: list[SuiteScore] = field(default_factory=list)
    last_scores: list[SuiteScore] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    answers: list[SuiteAnswer] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    bound: CoherenceBound | None = None
    fits: list[JudgeFit] = field(default_factory=list)
    groups: list[GroupAnswers] = field(default_factory=list)
    guarded: Guarded | None = None
    depth: DepthFile | None = None


def run_suites(config: SuitesJob, folder: RunFolder) -> None:
    """Write `scores.json`, `scores.md` and `answers.jsonl` of all models on all suites.

    A suite that is not available is skipped with the reason. Raises `ConfigError` for an unknown suite, `DataError`
    for a local file that cannot be read, for a missing file of the user's own suite and, after all files are written,
    if nothing could be scored, `ModelError` for a model that is not there, and what the steps raise.
    """
    folder.kept = "answers, verdicts and results so far are kept"
    suites = load_suites(config.suites.use)
    _check_config(config, suites)
    if not folder.resumed:  # what has answered is not needed again
        _check_models(config, suites)
    labels = [] if config.labels is None else read_labels(config.labels)
    for model in config.with_weights():
        folder.add_weights(model.model)
    found = _Collected()
    _accuracy(config, folder, found)
    trained = _trained_prompts(config, found) if suites else {}
    for kind, step in (("generative", _generative), ("discriminative", _discriminative), ("inspect", _inspect)):
        step(config, folder, [suite for suite in suites if suite.kind == kind], trained, found)
    found.warnings += _asked_what_was_trained(found.facts)
    versions = folder.record.get("judges", {})
    found.warnings += [*_same_judges(config, suites, found), *guard_warnings(config, suites, found.facts, versions)]
    people: PeopleFile | None = None
    if config.labels is not None:
        folder.add_data("labels", config.labels)
        try:
            people = _people(config, config.labels, suites, labels, found)
        except DataError:
            _aggregate(config, folder, suites, found, None)
            raise
    _aggregate(config, folder, suites, found, people)
    primary = any(values.by_item for values in found.values if values.compared)
    if suites and not primary and all(score.value is None for score in found.scores):
        raise _nothing_scored(config, suites, found.facts, found.answers)


def preview_suites(config: SuitesJob) -> list[str]:
    """Return what would be evaluated, without asking the hub."""
    lines = [f"models: {', '.join(model.name for model in config.evaluated())}"]
    suites = load_suites(config.suites.use)
    _check_config(config, suites)
    _check_templates(config, suites, [model for model in config.with_weights() if Path(model.model).is_dir()])
    if config.labels is not None:
        lines.append(f"labels by people: {len(read_labels(config.labels))}")
    for suite in suites:
        judge = judge_of(config, suite)
        judged = "" if judge is None else f", judged by {judge.title}"
        origin = _origin(config, suite)
        lines.append(f"{suite.name}: {suite.title} ({suite.kind}, licence {suite.licence}){judged}; {origin}")
    if config.guard is not None:
        lines.append(f"guard: {config.guard.judge.title}, {config.guard.filter}")
    if (start := config.start()) is not None:
        lines.append(f"coherence: unlikely answers are found by {start[0]}")
    if config.depth is not None and (prefill := config.depth.prefill) is not None:
        source = f"{config.depth.start}'s own answers" if prefill.file is None else prefill.file
        assisted = "" if prefill.assist is None else f", assisted by {prefill.assist}"
        lines.append(f"begun answers: {', '.join(map(str, prefill.tokens))} tokens of {source}{assisted}")
    if config.depth is not None and (divergence := config.depth.divergence) is not None:
        lines.append(f"KL to {config.depth.start} at {divergence.positions} positions of {divergence.answers} answers")
    return lines


def _origin(config: SuitesJob, suite: Suite) -> str:
    """Return where a suite's prompts or documents would come from, in words."""
    if suite.source.world is not None:
        return "generated"
    if files := local_files(suite, config.suites.folders):
        return f"from {', '.join(file.name for file in files)}"
    if suite.kind == "inspect":
        return "from the source of its task"
    return "skipped: no local file" if suite.source.hub is None else f"from the hub, {suite.source.hub}"


def _check_config(config: SuitesJob, suites: Sequence[Suite]) -> None:
    """Raise `ConfigError` for a judge of an unknown role or suite, a run to reuse that does not exist, bad metrics.

    Raises `SettingError` for an unknown format of a judge or ranker, `DataError` for missing files.
    """
    for suite in suites:
        _check_metrics(suite)
    roles = {suite.judge.role for suite in suites if suite.judge is not None}
    allowed = sorted({"refusal", *roles - {"ranker"}}) + [suite.name for suite in suites]
    for name, judge in config.suites.judges.items():
        if name not in allowed:
            raise ConfigError(f"suites.judges.{name}: not a role or suite of this run; allowed: {', '.join(allowed)}")
        check_judge(judge.format, f"suites.judges.{name}")
        if judge.format == "refusal-phrases" and name != "refusal":
            raise ConfigError(f"suites.judges.{name}: {FINDS_NO_HARM}, or judges: {{refusal: refusal-phrases}}")
    prompted = {suite.name for suite in suites if suite.kind == "generative"}
    for name, choice in config.suites.each.items():
        if name not in (names := [suite.name for suite in suites]):
            raise ConfigError(f"suites.each.{name}: not a suite of this run; allowed: {', '.join(names)}")
        if choice.split is not None and name not in prompted:
            raise ConfigError(f"suites.each.{name}.split: only suites that ask prompts are split, and it is a task")
    check_opinions([], config.suites.ranker)
    if config.guard is not None:
        check_judge(config.guard.judge.format, "guard.judge")
        if config.guard.filter != "output":
            check_requests(config.guard.judge)
    check_prefill(config, suites)
    check_own_files(own_suites(config.suites.use), config.suites.folders)
    if isinstance(config, SuitesAndPairsJob):
        check_files(config.data.files)
    if config.suites.reuse is not None and not Path(config.suites.reuse).is_dir():
        raise ConfigError(f"suites.reuse: got {config.suites.reuse!r}; needed: the folder of an earlier run")


def _check_models(config: SuitesJob, suites: Sequence[Suite]) -> None:
    """Raise the error of a model that is not there, or cannot be asked, before the first one has answered."""
    for model in config.with_weights():
        check_source(f"model of {model.name}", model.model, revision=model.revision)
    if (start := config.start()) is not None:
        check_source("coherence.model", start[0], revision=start[1])
    check_divergence(config)
    _check_templates(config, suites, config.with_weights())


def _check_templates(config: SuitesJob, suites: Sequence[Suite], models: Sequence[WeightsModel]) -> None:
    """Raise the error of a model whose tokenizer cannot render the prompts of suites, if there are any."""
    if not any(suite.kind == "generative" for suite in suites):
        return
    for model in models:
        try:
            chat_of(config, model)
        except BfpoError as error:
            raise type(error)(f"model of {model.name}: {error}") from error


def _check_metrics(suite: Suite) -> None:
    """Raise `ConfigError` for metrics that are not measured, or that are better in the other direction."""
    where = f"suite {suite.name}: metrics: got {', '.join(map(repr, suite.metrics))}"
    if suite.kind != "generative":
        if len(suite.metrics) != 1:
            raise ConfigError(f"{where}; a suite of kind {suite.kind} has one metric")
        return
    allowed = SUITE_METRICS | dict.fromkeys(WIN_RATES)
    if unknown := [name for name in suite.metrics if name not in allowed]:
        raise ConfigError(f"{where}; {unknown[0]!r} is not measured; allowed: {', '.join(sorted(allowed))}")
    for name, direction in suite.metrics.items():
        metric = allowed[name]
        right = "higher" if metric is None or metric.higher_is_better else "lower"
        if direction != right:
            raise ConfigError(f"{where}; {name} is better {right}, got {direction!r}")


# ------------------------------------------------------------------------------------------------ the steps


def _accuracy(config: SuitesJob, folder: RunFolder, found: _Collected) -> None:
    if not isinstance(config, SuitesAndPairsJob):
        return
    source = ", ".join(config.data.files)
    found.facts[_ACCURACY] = SuiteFacts(_ACCURACY, "Implicit-reward accuracy", "accuracy", source=source)
    for name, job in config.on_pairs().items():
        out = folder.path / "models" / name / "accuracy"
        run = run_stage("evaluate", job, out, resume=out.exists())
        rows = load_lines(AccuracyRow, run.file("accuracy.jsonl"))
        right = {row.pair_id: credit for row in rows if (credit := row.credit) is not None}
        prompts = {row.pair_id: row.prompt for row in rows if row.pair_id in right}
        found.values.append(Values(_ACCURACY, name, "accuracy", right, prompts, len(rows) - len(right)))
        scores = load(ScoresFile, run.file("scores.json")).scores
        found.scores += [SuiteScore(suite=_ACCURACY, model=name, **asdict(score)) for score in scores]


def _generative(
    config: SuitesJob, folder: RunFolder, suites: list[Suite], trained: Mapping[str, Hashes], found: _Collected
) -> None:
    prompts: dict[str, SuitePrompts] = {}
    seen: dict[str, str] = {}
    for suite in suites:
        try:
            _check_not_twice(config, suite, seen)
            check_ranked(config, suite)
            choice = config.suites.choice(suite.name)
            prompts[suite.name] = each = find_prompts(
                suite.at(folder.record.get(COMMITS, {}).get(suite.name)),
                config.suites.folders,
                limit=choice.limit,
                seed=config.seed,
                split=choice.split,
                trained_on=list(trained.values()) if config.suites.trained_on == "leave_out" else (),
            )
        except UnreachableError as error:
            found.facts[suite.name] = _facts(suite, "skipped", reason=str(error))
            continue
        if each.files:
            folder.add_data(suite.name, [str(file) for file in each.files])
        if each.revision:
            folder.add_facts(**{COMMITS: {**folder.record.get(COMMITS, {}), suite.name: each.revision}})
    asked = [suite for suite in suites if suite.name in prompts]
    by_suite = {name: each.prompts for name, each in prompts.items()}
    check_harmful(config, asked, by_suite)
    answers = {model.name: answer_suites(config, model, asked, by_suite, folder) for model in config.evaluated()}
    own = {model: each.completions for model, each in answers.items()}
    found.guarded = guarded = guard_answers(config, asked, answers)
    answers |= {} if guarded is None else guarded.answers
    texts = {model: each.completions for model, each in answers.items()}
    judged = judge_suites(config, asked, texts)
    if guarded is not None:
        guarded.settle(judged)
        found.warnings += guarded.warnings
    reader = _reader(config, [prompt.messages for name in by_suite for prompt in by_suite[name]])
    found.bound = reader.bound
    found.fits = [fit for fit in judged.fits if fit.model in own]
    with reader:
        _of_suites(config, asked, prompts, answers, judged, reader, trained, found)
    wins = win_rates(config, [suite for suite in asked if WIN_RATES & suite.metrics.keys()], texts, found.facts)
    versions = {"guard": "" if guarded is None else guarded.facts.version, "ranker": wins.ranker}
    folder.add_facts(judges=judged.versions | {role: version for role, version in versions.items() if version})
    for won in (wins, alpaca_eval(config, asked, own, found.facts, folder)):
        found.values += won.values
        found.last_scores += won.at_equal_length
        found.warnings += won.warnings
        _add_wins(found.answers, won.values)
    found.depth = measure_depth(config, folder, asked, by_suite, answers, judged, reader)


def _of_suites(
    config: SuitesJob,
    asked: Sequence[Suite],
    prompts: Mapping[str, SuitePrompts],
    answers: Mapping[str, SuiteAnswers],
    judged: JudgedSuites,
    reader: CoherenceReader,
    trained: Mapping[str, Hashes],
    found: _Collected,
) -> None:
    """Collect the facts, values and answers of each suite."""
    guarded = found.guarded
    for suite in asked:
        each = prompts[suite.name]
        known: dict[str, Any] = {
            "source": each.source,
            "revision": each.revision,
            "prompts_sha256": prompts_digest(each.prompts),
            "num_prompts": len(each.prompts),
            "left_out": each.left_out or None,
            "trained_on": _num_trained(each.prompts, trained) or None,
            "guarded": None if guarded is None else guarded.counts(suite.name),
        }
        if suite.name in judged.skipped:
            found.facts[suite.name] = _facts(suite, "skipped", reason=judged.skipped[suite.name], **known)
            continue
        left_out = {model: each.left_out[suite.name] for model, each in answers.items() if each.left_out[suite.name]}
        blocked = {model: sum(bool(c.blocked) for c in each.completions[suite.name]) for model, each in answers.items()}
        known |= {"too_long": left_out, "blocked": {model: num for model, num in blocked.items() if num} or None}
        found.facts[suite.name] = _facts(suite, "scored", judge=judged.judges.get(suite.name), **known)
        _collect_verdicts(config, suite, answers, judged, reader, found)


def _add_wins(answers: list[SuiteAnswer], wins: Sequence[Values]) -> None:
    """Add to the answers how they fare against the baseline's."""
    for values in wins:
        for place, row in enumerate(answers):
            better = values.by_item.get(row.id) if (row.suite, row.model) == (values.suite, values.model) else None
            if better is not None and not values.defined:
                answers[place] = replace(row, wins={**(row.wins or {}), values.metric: better})


def _reader(config: SuitesJob, prompts: Sequence[tuple[Message, ...]]) -> CoherenceReader:
    return make_reader(
        config.start(),
        prompts,
        config.executor,
        threads=config.threads,
        dtype=config.dtype or "auto",
        chat_template=read_template(config.chat_template),
        chat_template_kwargs=config.chat_template_kwargs,
    )


def _trained_prompts(config: SuitesJob, found: _Collected) -> dict[str, Hashes]:
    """Return the hashes of the prompts that each model was trained on, by name, as far as run folders have them."""
    trained = {}
    for model in config.with_weights():
        if (hashes := trained_prompts(model.model)) is not None:
            trained[model.name] = hashes
        elif has_no_record(model.model):
            found.warnings.append(
                f"{model.name}: its run folder does not record the prompts that it was trained on; it is not known "
                "whether the suites ask them"
            )
    return trained


def _asked_what_was_trained(facts: Mapping[str, SuiteFacts]) -> list[str]:
    """Return a warning for each model and suite that asks prompts of its training."""
    return [
        f"{model}: {num} of the {fact.num_prompts} prompts of {fact.title} are prompts that it was trained on; "
        "suites.trained_on: leave_out asks none of them"
        for fact in facts.values()
        for model, num in (fact.trained_on or {}).items()
    ]


def _known_of_task(results: Mapping[str, TaskResult | InspectResult], num_prompts: int) -> dict[str, Any]:
    """Return the facts of a task on what the models were trained on, from its results by model."""
    left_out = max(result.left_out or 0 for result in results.values())
    counts = {model: result.trained_on for model, result in results.items() if result.trained_on}
    return {
        "num_prompts": num_prompts,
        "trained_on": counts or None,
        "left_out": {TRAINED: left_out} if left_out else None,
    }


def _num_trained(prompts: Sequence[Prompt], trained: Mapping[str, Hashes]) -> dict[str, int]:
    counts = {name: sum(asked_in_training(one, hashes) for one in prompts) for name, hashes in trained.items()}
    return {name: num for name, num in counts.items() if num}


def _check_not_twice(config: SuitesJob, suite: Suite, seen: dict[str, str]) -> None:
    """Raise `UnreachableError` for a second suite that differs only in its default judge, which the user replaced."""
    judge = judge_of(config, suite)
    own = suite.model_dump(exclude={"name", "title", "summary", "licence", "judge"})
    same = [own, None if judge is None else judge.model_dump(), config.suites.choice(suite.name).model_dump()]
    first = seen.setdefault(json.dumps(same, sort_keys=True), suite.name)
    if first != suite.name:
        raise UnreachableError(f"has the same prompts and, by suites.judges, the same judge as {first}")


def _collect_verdicts(
    config: SuitesJob,
    suite: Suite,
    answers: Mapping[str, SuiteAnswers],
    judged: JudgedSuites,
    reader: CoherenceReader,
    found: _Collected,
) -> None:
    metrics = [name for name in suite.metrics if name not in WIN_RATES]
    read: dict[str, list[Reading]] = {}
    for model, each in answers.items():
        completions, verdicts = each.completions[suite.name], judged.verdicts[suite.name, model]
        states, behind = [""] * len(completions), None if found.guarded is None else found.guarded.of.get(model)
        if found.guarded is None or behind is None:
            readings = read[model] = reader.read(completions, verdicts)
        else:  # the same answers as before the guard, except those that it blocks
            states, own = found.guarded.states[suite.name, model], read[behind]
            refusal = Reading(True if any(one.coherent is not None for one in own) else None)
            readings = [refusal if state in BLOCKED else one for one, state in zip(own, states, strict=True)]
        rows = join_verdicts(completions, verdicts, coherent=[one.coherent for one in readings])
        counts = Counter(reason for one in readings for reason in one.incoherent or ())
        if any(one.coherent is not None for one in readings):
            counts["cut"] = sum(not one.finished for one in completions)
        if +counts:
            fact = found.facts[suite.name]
            fact.incoherent = {**(fact.incoherent or {}), model: dict(sorted((+counts).items()))}
        if behind is None:
            names = frozenset({model, *(one.model for one in config.evaluated() if one.name == model)})
            found.groups.append(GroupAnswers(suite.name, model, names, completions, verdicts))
        found.values += values_of(suite.name, model, metrics, rows, each.left_out[suite.name])
        found.answers += [
            replace(judged_answer(suite.name, model, completion, verdict, reading), guarded=state)
            for completion, verdict, reading, state in zip(completions, verdicts, readings, states, strict=True)
        ]


def _discriminative(
    config: SuitesJob, folder: RunFolder, suites: list[Suite], trained: Mapping[str, Hashes], found: _Collected
) -> None:
    if not suites or _skip_served(config, suites, "lm-eval", found):
        return
    results, skipped, sources = run_tasks(config, suites, folder, trained)
    for suite in suites:
        if suite.name in skipped:
            found.facts[suite.name] = _facts(suite, "skipped", reason=skipped[suite.name])
            continue
        metric, direction = next(iter(suite.metrics.items()))
        source, revision = sources[suite.name]
        known = {"source": source, "revision": revision, "judge": "lm-eval", "ideal": direction}
        own = {model.name: results[suite.name, model.name] for model in config.evaluated()}
        num_asked = max(len(result.by_document) + result.unscored for result in own.values())
        found.facts[suite.name] = _facts(suite, "scored", **known, **_known_of_task(own, num_asked))
        found.warnings += [
            f"{model}: it is not known whether {suite.title} asks prompts that it was trained on: no text of its "
            "documents was looked up"
            for model in trained
            if own[model].trained_on is None
        ]
        for model in config.evaluated():
            result = own[model.name]
            items = {item: item for item in result.by_document}
            higher = direction == "higher"
            found.values.append(
                Values(suite.name, model.name, metric, result.by_document, items, result.unscored, higher)
            )
            if result.reasons:
                facts = found.facts[suite.name]
                facts.unscored = {**(facts.unscored or {}), model.name: result.reasons}


def _inspect(
    config: SuitesJob, folder: RunFolder, suites: list[Suite], trained: Mapping[str, Hashes], found: _Collected
) -> None:
    if not suites or _skip_served(config, suites, "inspect-ai", found):
        return
    results, skipped = run_inspect(config, suites, folder, trained)
    for suite in suites:
        assert suite.inspect is not None
        files = local_files(suite, config.suites.folders)
        known: dict[str, Any] = {"source": ", ".join([suite.inspect.task, *(file.name for file in files)])}
        if suite.name in skipped:
            found.facts[suite.name] = _facts(suite, "skipped", reason=skipped[suite.name], **known)
            continue
        own = [(model.name, results[suite.name, model.name]) for model in config.evaluated()]
        judge = config.suites.grader if suite.inspect.grader else "inspect-ai"
        metric, direction = next(iter(suite.metrics.items()))
        known |= {"revision": own[0][1].version, "judge": judge, "ideal": direction}
        known |= _known_of_task(dict(own), max(result.num + result.unscored for _, result in own))
        found.facts[suite.name] = _facts(suite, "scored", **known)
        higher = direction == "higher"
        for model, result in own:
            if result.by_sample or result.value is None:
                items = {item: item for item in result.by_sample}
                found.values.append(Values(suite.name, model, metric, result.by_sample, items, result.unscored, higher))
            else:  # not a mean over samples: the value of the log, without an interval
                score = Score(metric, result.value, None, None, result.num, result.unscored, higher)
                found.scores.append(SuiteScore(suite=suite.name, model=model, **asdict(score)))


def _skip_served(config: SuitesJob, suites: list[Suite], package: str, found: _Collected) -> bool:
    """Skip the suites for all models if one is behind a server, so that all models answer the same suites."""
    served = [model.name for model in config.evaluated() if isinstance(model, ServedModel)]
    for suite in suites if served else []:
        source = suite.source.hub if suite.inspect is None else suite.inspect.task
        reason = (
            f"{', '.join(served)} is behind a server, and {package} needs the weights; evaluate such models "
            "separately to score the others"
        )
        found.facts[suite.name] = _facts(suite, "skipped", reason=reason, source=source)
    return bool(served)


def _facts(suite: Suite, status: str, **known: Any) -> SuiteFacts:
    """Return the facts of a suite; the source is that of the catalogue unless `known` has another."""
    named = {"source": suite.source.hub, "revision": suite.source.revision}
    return SuiteFacts(
        name=suite.name, title=suite.title, kind=suite.kind, status=status, licence=suite.licence, **{**named, **known}
    )


def _same_judges(config: SuitesJob, suites: list[Suite], found: _Collected) -> list[str]:
    """Return a warning for each judge that evaluates a model whose training data it labelled."""
    warnings = []
    for model in config.evaluated():
        labelled = [(judge.get("format"), judge.get("model")) for judge in labelling_judges(model.model)]
        judged: dict[str, list[str]] = {}
        for suite in suites:
            judge = judge_of(config, suite)
            scored = found.facts[suite.name].status == "scored"
            if judge is not None and scored and (judge.format, judge.source) in labelled:
                judged.setdefault(judge.title, []).append(suite.title)
        warnings += [
            f"{model.name}: the judge {title} labelled its training data and judges it on {', '.join(titles)}; "
            "evaluate with a judge of another family too"
            for title, titles in judged.items()
        ]
    return warnings


def _people(
    config: SuitesJob, file: str, suites: Sequence[Suite], labels: Sequence[LabelRow], found: _Collected
) -> PeopleFile:
    metrics = {
        suite.name: [
            SUITE_METRICS[name]
            for name in dict.fromkeys(values.metric for values in found.values if values.suite == suite.name)
            if name in SUITE_METRICS
        ]
        for suite in suites
    }
    return people_results(file, labels, found.groups, metrics, confidence=config.confidence)


def _aggregate(
    config: SuitesJob, folder: RunFolder, suites: list[Suite], found: _Collected, people: PeopleFile | None
) -> None:
    own = [values for values in found.values if values.suite != _ACCURACY]
    rates = [score_values(values, confidence=config.confidence) for values in own]
    scores = [*found.scores, *rates, *found.last_scores]
    order = [_ACCURACY, *(suite.name for suite in suites)]
    result = SuitesFile(
        confidence=config.confidence,
        models=_all_models(config, found.guarded),
        suites=[found.facts[name] for name in order if name in found.facts],
        scores=scores,
        comparisons=compare_values(found.values, confidence=config.confidence),
        warnings=found.warnings,
        coherence=found.bound,
        judge_fit=found.fits or None,
        people=people,
        guard=None if found.guarded is None else found.guarded.facts,
        depth=found.depth,
    )
    folder.write_jsonl("answers.jsonl", found.answers)
    folder.write_json("scores.json", result)
    text = scores_text(result)
    folder.write_text("scores.md", text + "\n")
    folder.write_card("Scores", {"Scores": text})
    show(text)
    log_fit(found.fits)


def _all_models(config: SuitesJob, guarded: Guarded | None) -> list[ModelFacts]:
    own = {model.name: _model_facts(model) for model in config.evaluated()}
    behind = [] if guarded is None else [replace(own[of], name=name, guard_of=of) for name, of in guarded.of.items()]
    return [*own.values(), *behind]


def _model_facts(model: EvaluatedModel) -> ModelFacts:
    facts = ModelFacts(model.name, model.model, getattr(model, "reference", None))
    if model.engine == "transformers":
        return facts
    return replace(facts, engine=model.engine, url=getattr(model, "url", None))


# ------------------------------------------------------------------------------------------------ errors


def _nothing_scored(
    config: SuitesJob,
    suites: Sequence[Suite],
    facts: Mapping[str, SuiteFacts],
    answers: Sequence[SuiteAnswer],
) -> DataError:
    """Return the error for a run without a score: the most common reason, with its first suite.

    `facts` and `answers` are those of `scores.json` and `answers.jsonl`.
    """
    reasons = {suite.name: _reason(config, suite, facts[suite.name], answers) for suite in suites}
    kinds = Counter(kind for kind, _ in reasons.values())
    commonest = kinds.most_common(1)[0][0]
    name, text = next((name, text) for name, (kind, text) in reasons.items() if kind == commonest)
    others = kinds[commonest] - 1
    alike = f" ({others} more: {commonest})" if others else ""
    return DataError(
        f"nothing was scored; suite {name}: {text}{alike}. The files are kept: continue with --resume when the cause "
        "is removed, or start in a new --out with other settings"
    )


def _reason(config: SuitesJob, suite: Suite, fact: SuiteFacts, answers: Sequence[SuiteAnswer]) -> tuple[str, str]:
    """Return why a suite has no score: the kind of reason, and the reason with what to do."""
    if fact.status == "skipped":
        reason = " ".join(str(fact.reason).split())
        return "skipped", f"skipped, {reason}"
    too_long = fact.too_long or {}
    verdicts = [row.verdict for row in answers if row.suite == suite.name and row.verdict is not None]
    unscored = Counter(verdict.reason for verdict in verdicts if verdict.label == "unscored")
    if too_long and sum(too_long.values()) >= unscored.total():
        return "prompts too long", _too_long(config, suite, too_long, fact.num_prompts or 0)
    blocked = sum((fact.blocked or {}).values())
    if blocked and blocked >= unscored.total() - blocked:
        return "prompts blocked", f"{blocked} of {len(verdicts)} prompts are blocked by the servers of the models"
    if unscored and suite.judge is not None and suite.judge.role == "harm":  # else the refusal judge's reasons
        reason, count = unscored.most_common(1)[0]
        return "answers unscored", (
            f"{count} of {len(verdicts)} answers are unscored by {fact.judge}: {reason}; set another judge in "
            "suites.judges, or test this one with `bfpo judge-check`"
        )
    return "no value", f"{fact.judge} gave no value for any answer; {len(verdicts)} are in answers.jsonl"


def _too_long(config: SuitesJob, suite: Suite, too_long: Mapping[str, int], num_prompts: int) -> str:
    """Return how many tokens are left for a prompt, and which setting leaves more."""
    assert suite.sampling is not None  # only generative suites have prompts that are too long
    name, count = max(too_long.items(), key=lambda item: item[1])
    head = f"{count} of {num_prompts} prompts are too long for {name}"
    context = next(context_of(model) for model in config.evaluated() if model.name == name)
    longest = config.suites.max_new_tokens or suite.sampling.max_new_tokens
    if context - longest >= config.suites.max_prompt_length:
        return f"{head}: they have more than suites.max_prompt_length = {config.suites.max_prompt_length} tokens"
    whose = "suites.max_new_tokens" if config.suites.max_new_tokens else "the suite's max_new_tokens"
    return (
        f"{head}: its context is {context} tokens, {whose} reserves {longest} of them for the answer, and "
        f"{max(context - longest, 0)} are left for a prompt; set suites.max_new_tokens lower, or use a model with a "
        "longer context"
    )
