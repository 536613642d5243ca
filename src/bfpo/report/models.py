"""The models of a report: scores, verdicts, texts, judges and prompts of each, from runs of `evaluate`; from runs of
`generate` and `redteam` the answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from bfpo.core.errors import BfpoError, DataError
from bfpo.core.files import file_digest
from bfpo.core.records import load, narrowed
from bfpo.core.schema import Completion, Message, Score, Verdict, VerdictRow
from bfpo.data.read import read_completions
from bfpo.data.split import normalised_prompt
from bfpo.data.thinking import Thinking
from bfpo.report.data import Basis, MethodResult, SampleAnswer, Suite, SuiteComparison
from bfpo.report.places import Place, place_of_model
from bfpo.report.read import Run, model_name, resolve
from bfpo.scores.records import AccuracyRow, ScoresFile
from bfpo.scores.scores import METRICS, Judged, judged_row
from bfpo.suites.records import SuiteAnswer, SuitesFile

__all__ = [
    "AnswerKey",
    "Model",
    "add_answers",
    "add_labels",
    "add_margins",
    "add_scores",
    "inside_suites",
    "model_of",
    "prompt_text",
    "read_texts",
    "texts_of",
    "with_basis",
]

AnswerKey = tuple[str, str, str]  # suite, id, completion number among those of one id

HOME_METRICS = ("helpful_and_safe", "helpfulness", "harmless_harmful", "over_refusal_benign", "over_refusal_borderline")
"""A suite with one of these can fill a row of the table of models; `harmless` alone is a column of the suites."""


@dataclass
class Model:
    """The results of the runs about one model, collected step by step; `judged` and `judges` are by suite."""

    result: MethodResult
    place: Place = field(default_factory=Place)
    given: str = ""  # its name in the runs; that of the result is unique on the page
    asked_with: str = ""  # the settings of an evaluation that change its answers
    other_names: list[tuple[Run, str]] = field(default_factory=list)  # in later runs
    judged: dict[str, list[Judged]] = field(default_factory=dict)
    judges: dict[str, set[str]] = field(default_factory=dict)
    asked: dict[str, set[str]] = field(default_factory=dict)
    margin_rows: list[AccuracyRow] = field(default_factory=list)
    answers: dict[AnswerKey, tuple[str, str, SampleAnswer]] = field(default_factory=dict)  # prompt, kind, answer

    @property
    def home_rows(self) -> list[Judged]:
        """Return the judged answers behind the model's row of the table."""
        return self.judged.get(self.result.home or "", []) if self.result.home is not None else []


def add_scores(
    run: Run, models: dict[str, Model], suites: dict[str, Suite], comparisons: list[SuiteComparison]
) -> dict[str, Model]:
    """Add the results of a run of `evaluate`, over one model, or over several models and suites.

    Returns the models of suites by their name in the run: a model that is another one than that of the same name in an
    earlier run gets a name of its own, and one that an earlier run has by another name, asked in the same way on other
    suites, keeps that one. A suite counts once for a model, as in the first run; a problem names other values.
    """
    found = run.scores
    if isinstance(found, ScoresFile):
        _add_single(run, found.scores, models)
        return {}
    here = _models_of(run, found, models)
    for facts in found.suites:
        known = {name: value for name in Suite.__dataclass_fields__ if (value := getattr(facts, name))}
        before = suites.get(facts.name, Suite("", status=""))
        if before.status != "scored" or facts.status == "scored":  # skipped here, it keeps the scores of other runs
            suites[facts.name] = Suite(**{**known, "blocked": {**before.blocked, **(facts.blocked or {})}})
    earlier = {name: {suite: list(rows) for suite, rows in m.result.suite_scores.items()} for name, m in here.items()}
    other: dict[str, set[str]] = {}
    for row in found.scores:
        if row.model in here:
            result, score = here[row.model].result, narrowed(Score, row)
            if (rows := earlier[row.model].get(row.suite)) is not None:
                if all(one.value != score.value for one in rows if one.metric == score.metric):
                    other.setdefault(result.name, set()).add(row.suite)
                continue
            result.suite_scores.setdefault(row.suite, []).append(score)
            if score.metric.startswith("accuracy_") or suites.get(row.suite, Suite("")).kind == "accuracy":
                result.accuracy.append(score)
    for model in models.values():
        _settle_home(model, suites)
    run.problems += (
        f"{run.path}: scores {name} otherwise on {', '.join(sorted(some))} than an earlier run, whose scores are "
        "shown; give one of the two runs, or the one to be shown first"
        for name, some in other.items()
    )
    names = {name: model.result.name for name, model in here.items()}
    comparisons += [
        replace(row, first=names.get(row.first, row.first), second=names.get(row.second, row.second))
        for row in found.comparisons
        if not all(row.suite in earlier.get(name, ()) for name in (row.first, row.second))
    ]
    thresholds = _thresholds(run)
    for answer in run.rows(SuiteAnswer, "answers.jsonl"):
        if answer.suite not in earlier.get(answer.model, {answer.suite}):
            asked = normalised_prompt(answer.prompt)
            _add_answer(here[answer.model], answer, prompt_text(answer.prompt), asked, thresholds=thresholds)
    for answer in run.rows(SuiteAnswer, "begun.jsonl"):  # shown, and in no rate of the model
        if answer.suite not in earlier.get(answer.model, {answer.suite}):
            text = prompt_text(answer.prompt)
            _add_answer(here[answer.model], answer, text, "", counts=False, thresholds=thresholds)
    return here


def _models_of(run: Run, found: SuitesFile, models: dict[str, Model]) -> dict[str, Model]:
    """Return the models of a run over suites by their name in it, those of earlier runs or new ones."""
    here: dict[str, Model] = {}
    # Behind a guard it is another model.
    places = {one.name: Place() if one.guard_of else place_of_model(one.model, run) for one in found.models}
    given = {one.name: one.name or model_name(one.model) for one in found.models}
    for name, place in places.items():
        for model in models.values():
            if model.given == given[name] and model.place.is_same(place):
                here.setdefault(name, model)
    scored = {facts.name for facts in found.suites if facts.status == "scored"}
    for name in [name for name in places if name not in here]:
        place, asked = places[name], _asked_with(run, name)
        same = (
            model
            for model in models.values()
            if None not in (place.inside, model.place.inside) and model.place.is_same(place)
            if model.asked_with == asked and not scored & model.result.suite_scores.keys()
            if all(model is not other for other in here.values())
        )  # fmt: skip
        if (known := next(same, None)) is not None:
            known.other_names.append((run, given[name]))
        else:
            known = model_of(models, given[name], run.path if given[name] in models else None, place)
            known.asked_with = asked
        here[name] = known
    return here


def _asked_with(run: Run, name: str) -> str:
    """Return what a run over suites sets for a model apart from its name and place, as text that can be compared."""
    own = next(
        (one for one in run.setting("models", list) or [] if isinstance(one, dict) and one.get("name") == name), {}
    )
    places = ("name", "model", "reference", "reference_revision")
    given = {key: value for key, value in own.items() if key not in places and value != "transformers"}
    given |= {key: run.record.config.get(key) for key in ("chat_template", "thinking", "dtype")}
    given["chat_template_kwargs"] = own.get("chat_template_kwargs") or run.record.config.get("chat_template_kwargs")
    return json.dumps({key: value for key, value in given.items() if value}, sort_keys=True, default=str)


@dataclass(frozen=True, slots=True)
class _Described:
    """What `judge.json` of a trained judge says of its verdicts."""

    OPEN: ClassVar[bool] = True

    name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def _thresholds(run: Run) -> dict[str, float]:
    """Return p(safe) from which on a judge says safe, by its name in verdicts, as far as config and judge tell it."""
    config, found = run.record.config, dict[str, float]()
    suites = run.setting("suites", dict) or {}
    judges = [config.get("judge"), *(config.get("judges") or ()), *(suites.get("judges") or {}).values()]
    for judge in (one for one in judges if isinstance(one, dict)):
        kind, source = judge.get("format"), str(judge.get("model") or "")
        folder = resolve(source, run) if kind == "trained" else None
        own = load(_Described, folder / "judge.json", []) if folder is not None else _Described()
        least = judge.get("threshold") or own.settings.get("threshold")
        names = [str(judge["name"])] if judge.get("name") else [own.name, f"{kind}", f"{kind}:{source}"]
        found |= {name: float(least) for name in names if name and isinstance(least, (int, float))}
    return found


def inside_suites(runs: Sequence[Run]) -> dict[Path, list[Run]]:
    """Return the runs inside each run over suites, by its path; their results are part of it."""
    tops = [run for run in runs if run.stage == "evaluate" and isinstance(run.scores, SuitesFile)]
    return {top.path: [run for run in runs if top.path in run.path.parents] for top in tops}


def add_margins(top: Path, inner: Iterable[Run], models: Mapping[str, Model]) -> None:
    """Add the margins on pairs of a run over suites, from `models/NAME/accuracy`."""
    for run in inner:
        name = run.path.relative_to(top).parts[1] if len(run.path.relative_to(top).parts) > 1 else ""
        if run.stage == "evaluate" and name in models:
            models[name].margin_rows = models[name].margin_rows or run.rows(AccuracyRow, "accuracy.jsonl")


def _settle_home(model: Model, suites: Mapping[str, Suite]) -> None:
    """Fill the row of the table from the first suite that can, so that all columns are about one set of prompts."""
    if model.result.home is not None:
        return
    for suite, scores in model.result.suite_scores.items():
        scored = suites.get(suite, Suite("")).status == "scored"
        if scored and any(score.metric in HOME_METRICS and score.value is not None for score in scores):
            model.result.scores.extend(score for score in scores if score.metric in METRICS)
            model.result = replace(model.result, home=suite)
            return


def with_basis(model: Model) -> MethodResult:
    """Return the model's result with the judges and prompts behind its scores, by suite."""
    basis = {
        suite: Basis(sorted(model.judges.get(suite, ())), _digest(prompts), len(prompts))
        for suite, prompts in sorted(model.asked.items())
    }
    return replace(model.result, basis=basis)


def _digest(prompts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(sorted(prompts)).encode("utf-8", "replace")).hexdigest()[:16]


def _add_single(run: Run, scores: Sequence[Score], models: dict[str, Model]) -> None:
    """Add a run over one model: scores, accuracy by pair, and verdicts, with texts from the run of `generate`.

    One that has got to none of these adds nothing: over suites, its model would be named after its folder.
    """
    margins, verdicts = run.rows(AccuracyRow, "accuracy.jsonl"), run.rows(VerdictRow, "verdicts.jsonl")
    if not (scores or margins or verdicts):
        return
    texts = texts_of(run)
    asked = next((completion.model for completion in texts.values()), "")
    path = run.setting("model", str) or asked
    model = model_of(models, model_name(path or run.path.as_posix()), run.path, place_of_model(path, run))
    model.result.scores.extend(score for score in scores if not score.metric.startswith("accuracy"))
    model.result.accuracy.extend(score for score in scores if score.metric.startswith("accuracy"))
    if model.result.scores:  # a run of accuracy alone fills no row
        model.result = replace(model.result, home="")
    model.margin_rows = margins
    _add_judged(model, texts, verdicts, _thresholds(run))
    if verdicts and _judged_file(run) is None:
        run.problems.append(
            f"{run.path}: the judged completions are not at the path in its config; its texts are missing"
        )


def add_answers(run: Run, models: dict[str, Model]) -> None:
    """Add the answers of a run of `generate`, or of `redteam` with their verdicts; it has no scores."""
    red = run.stage == "redteam"
    texts = read_texts(run, run.path / "generate" / "completions.jsonl" if red else run.path / "completions.jsonl")
    if not texts:
        return
    path = run.setting("model", str)
    model = model_of(models, model_name(path or run.path.as_posix()), run.path, place_of_model(path, run))
    if red:
        _add_judged(model, texts, run.rows(VerdictRow, "label/verdicts.jsonl"), _thresholds(run))
        return
    for found in texts.values():
        answer = SuiteAnswer("", "", found.id, found.kind, found.prompt, found.text, found.finished)
        answer = replace(answer, reasoning=found.reasoning, blocked=found.blocked)
        _add_answer(model, answer, prompt_text(found.prompt), "")


def add_labels(run: Run, models: dict[str, Model], *, only_known: bool) -> None:
    """Add what each judge of a run of `label` said of completions, beside the verdict of an evaluation if there is one.

    Nothing of it is measured. `only_known`: answers that are not there yet are not added.
    """
    texts, rows = texts_of(run), run.rows(VerdictRow, "verdicts.jsonl")
    places = {
        (id, answer.text): (model, (suite, id, place))
        for model in models.values()
        for (suite, id, place), (_, _, answer) in model.answers.items()
        if not suite
    }
    new: dict[str, list[VerdictRow]] = {}
    for row in rows:
        if (found := texts.get(row.completion_id)) is None:
            continue
        if (known := places.get((found.id, found.text))) is None:
            new.setdefault(found.model or "model", []).append(row)
            continue
        model, key = known
        prompt, kind, answer = model.answers[key]
        verdict, judges = answer.verdict, row.votes or [asdict(narrowed(Verdict, row))]
        if verdict is None:
            answer = replace(answer, verdict=narrowed(Verdict, row), votes=row.votes)
        else:
            own = [] if any(vote["judge"] == verdict.judge for vote in judges) else [asdict(verdict)]
            answer = replace(answer, votes=[*(answer.votes or own), *judges])
        model.answers[key] = prompt, kind, replace(answer, thresholds={**_thresholds(run), **(answer.thresholds or {})})
    for name, some in {} if only_known else new.items():
        _add_judged(model_of(models, model_name(name)), texts, some, _thresholds(run), counts=False)


def _add_judged(
    model: Model,
    texts: Mapping[str, Completion],
    verdicts: Iterable[VerdictRow],
    thresholds: dict[str, float],
    *,
    counts: bool = True,
) -> None:
    for row in verdicts:
        found = texts.get(row.completion_id)
        text, thoughts, turns = (None, "", ()) if found is None else (found.text, found.reasoning, found.prompt)
        answer = SuiteAnswer("", "", row.completion_id, row.kind, turns, text or "", row.finished, row, thoughts)
        answer = replace(answer, blocked=row.blocked, incoherent=row.incoherent, category=row.category)
        asked = row.prompt or normalised_prompt(turns)
        more: dict[str, Any] = {"has_text": text is not None, "votes": row.votes, "thresholds": thresholds}
        more["counts"] = counts
        _add_answer(model, answer, prompt_text(turns) or row.prompt, asked, **more)


def texts_of(run: Run) -> dict[str, Completion]:
    """Return the completions that a run of `evaluate` or `label` judged, by id.

    Empty if they are missing, changed since then, or unreadable; the last two are noted.
    """
    where = _judged_file(run)
    if where is not None and _digest_when_judged(run) not in (None, file_digest(where)):
        run.problems.append(f"{where}: changed since {run.path} judged it; its texts are left out")
        return {}
    return read_texts(run, where)


def _judged_file(run: Run) -> Path | None:
    file = run.setting("completions", str)
    return resolve(file, run) if file else None


def _digest_when_judged(run: Run) -> str | None:
    facts = run.record.data.get("completions", {}).get(str(Path(run.setting("completions", str) or "")))
    return facts.get("sha256") if isinstance(facts, dict) else None


def read_texts(run: Run, where: Path | None) -> dict[str, Completion]:
    """Return the completions of a file by id; a file that cannot be read is noted and gives none."""
    try:
        thinking = Thinking.model_validate(run.setting("thinking", dict) or {})
        found = read_completions(where, thinking=thinking) if where is not None and where.exists() else []
        by_id: dict[str, Completion] = {}
        for one in found:
            if by_id.setdefault(one.id, one).model != one.model:
                raise DataError.at(
                    str(where),
                    None,
                    f"id: {by_id[one.id].model!r} and {one.model!r} have answers with the id {one.id!r}, so that their "
                    "verdicts cannot be told apart; write one file for each model",
                )
        return by_id | {one.id: one for one in found}
    except (BfpoError, OSError, ValueError) as error:
        run.problems.append(str(error))
        return {}


def model_of(models: dict[str, Model], name: str, path: Path | None = None, place: Place | None = None) -> Model:
    """Return the model of a name; for a second run with that name, a new one named after its folder too."""
    given = name = name or "model"
    if path is not None and name in models:
        seed = next((part for part in reversed(path.parts) if part.startswith("seed-")), path.name)
        name = f"{name} ({seed})"
        while name in models:
            name += "'"
    if name not in models:
        models[name] = Model(MethodResult(name, name, "baseline"), place or Place(), given)
    return models[name]


def _add_answer(
    model: Model,
    answer: SuiteAnswer,
    prompt: str,
    asked: str,
    *,
    has_text: bool = True,
    counts: bool = True,
    votes: list[dict[str, Any]] | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> None:
    """Add an answer; `prompt` is the readable text, `asked` the normalised prompt, `counts` whether it is judged."""
    suite, finished = answer.suite, None if answer.blocked else answer.finished
    place = 0
    while (key := (suite, answer.id, str(place))) in model.answers:
        place += 1
    verdict = answer.verdict
    if verdict is not None:  # the page does not show partial refusals
        verdict = replace(narrowed(Verdict, verdict), partly_refused=None)
    if has_text:
        text = answer.blocked or answer.text
        judges = {verdict.judge if verdict else "", *(str(vote.get("judge")) for vote in votes or ())}
        shown = SampleAnswer(
            model.result.name,
            text,
            verdict,
            finished,
            answer.reasoning,
            answer.incoherent,
            votes,
            {name: least for name, least in (thresholds or {}).items() if name in judges} or None,
            answer.category,
        )
        model.answers[key] = (prompt, answer.kind, shown)
    if verdict is not None and counts:
        model.judges.setdefault(suite, set()).add(verdict.judge)
        model.asked.setdefault(suite, set()).add(asked or prompt)
        row = judged_row(f"{suite} {answer.id} {place}", prompt, answer.kind, verdict, finished=finished)
        model.judged.setdefault(suite, []).append(row)


def prompt_text(turns: Sequence[Message]) -> str:
    """Return a prompt as readable text: the one message, or the turns with their roles."""
    if len(turns) == 1:
        return turns[0].content
    return "\n".join(f"{turn.role}: {turn.content}" for turn in turns)
