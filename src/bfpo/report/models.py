"""From the runs of `evaluate` to models: scores, verdicts and texts of each, and what its scores rest on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bfpo.core.errors import BfpoError
from bfpo.core.schema import Message, Verdict
from bfpo.data.split import normalised_prompt
from bfpo.report.data import Basis, MethodResult, SampleAnswer, Suite, SuiteComparison
from bfpo.report.read import Run, model_name, number, read_rows, resolve, scores_of, text, verdict_of
from bfpo.scores.scores import METRICS, Judged

__all__ = [
    "HOME_METRICS",
    "AnswerKey",
    "Model",
    "add_margins",
    "add_scores",
    "inside_suites",
    "is_object",
    "model_of",
    "with_basis",
]

AnswerKey = tuple[str, str, str]  # suite, id, completion number among those of one id

HOME_METRICS = ("helpful_and_safe", "helpfulness", "harmless_harmful", "over_refusal_benign", "over_refusal_borderline")
"""A suite with one of these can fill a row of the table of models; `harmless` alone is a column of the suites."""


@dataclass
class Model:
    """What the runs say about one model, while it is put together; `judged` and `judges` are by suite."""

    result: MethodResult
    judged: dict[str, list[Judged]] = field(default_factory=dict)
    judges: dict[str, set[str]] = field(default_factory=dict)
    asked: dict[str, set[str]] = field(default_factory=dict)
    margin_rows: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[AnswerKey, tuple[str, str, SampleAnswer]] = field(default_factory=dict)  # prompt, kind, answer

    @property
    def home_rows(self) -> list[Judged]:
        """Return the judged answers that the model's row of the table is made from."""
        return self.judged.get(self.result.home or "", []) if self.result.home is not None else []


def add_scores(
    run: Run, models: dict[str, Model], suites: dict[str, Suite], comparisons: list[SuiteComparison]
) -> None:
    """Add what a run of `evaluate` says: of one model, or of several over suites."""
    content = run.json("scores.json")
    if not isinstance(content.get("models"), list):
        _add_single(run, content, models)
        return
    for row in filter(is_object, content["models"]):
        model_of(models, text(row.get("name")) or model_name(text(row.get("model"))))
    for row in filter(is_object, content.get("suites") or []):
        known = {key: text(row.get(key)) for key in Suite.__dataclass_fields__ if text(row.get(key))}
        if known.get("name"):
            suites[known["name"]] = Suite(**known)
    for row in filter(is_object, content.get("scores") or []):
        name, suite, found = text(row.get("model")), text(row.get("suite")), scores_of([row])
        if name in models and found:
            result = models[name].result
            result.suite_scores.setdefault(suite, []).extend(found)
            if found[0].metric.startswith("accuracy_") or suites.get(suite, Suite("")).kind == "accuracy":
                result.accuracy.extend(found)
    for model in models.values():
        _settle_home(model, suites)
    fields = SuiteComparison.__dataclass_fields__
    for row in filter(is_object, content.get("comparisons") or []):
        words = ("suite", "metric", "first", "second", "test")
        values: dict[str, Any] = {key: text(row.get(key)) for key in words}
        numbers: dict[str, Any] = {key: number(row.get(key)) for key in fields if key not in (*words, "num")}
        comparisons.append(SuiteComparison(**values, **numbers, num=int(number(row.get("num")) or 0)))
    for row in run.rows("answers.jsonl"):
        if text(row.get("model")) in models:
            verdict = verdict_of(row["verdict"]) if isinstance(row.get("verdict"), dict) else None
            _add_answer(models[row["model"]], row, _prompt_text(row.get("prompt")), verdict)
    for name, model in models.items():
        rows = [row for row in run.rows("accuracy.jsonl") if row.get("model", name) == name]
        model.margin_rows = model.margin_rows or rows


def inside_suites(runs: Sequence[Run]) -> dict[Path, list[Run]]:
    """Return the runs that a run over suites made for itself, by its path: their models are rows of it already."""
    tops = [run for run in runs if run.stage == "evaluate" and isinstance(run.json("scores.json").get("models"), list)]
    return {top.path: [run for run in runs if top.path in run.path.parents] for top in tops}


def add_margins(top: Path, inner: Iterable[Run], models: dict[str, Model]) -> None:
    """Add the margins on pairs that a run over suites measured of its models, in `models/NAME/accuracy`."""
    for run in inner:
        name = run.path.relative_to(top).parts[1] if len(run.path.relative_to(top).parts) > 1 else ""
        if run.stage == "evaluate" and name in models:
            models[name].margin_rows = models[name].margin_rows or run.rows("accuracy.jsonl")


def _settle_home(model: Model, suites: Mapping[str, Suite]) -> None:
    """Take the row of the table from one suite, the first that can fill it, so that its columns are of one set."""
    if model.result.home is not None:
        return
    for suite, scores in model.result.suite_scores.items():
        scored = suites.get(suite, Suite("")).status == "scored"
        if scored and any(score.metric in HOME_METRICS and score.value is not None for score in scores):
            model.result.scores.extend(score for score in scores if score.metric in METRICS)
            model.result = replace(model.result, home=suite)
            return


def with_basis(model: Model) -> MethodResult:
    """Return the model's result with what its scores rest on: by suite, who judged and which prompts."""
    basis = {
        suite: Basis(sorted(model.judges.get(suite, ())), _digest(prompts), len(prompts))
        for suite, prompts in sorted(model.asked.items())
    }
    return replace(model.result, basis=basis)


def _digest(prompts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(sorted(prompts)).encode("utf-8", "replace")).hexdigest()[:16]


def _add_single(run: Run, content: dict[str, Any], models: dict[str, Model]) -> None:
    """A run over one model: scores, accuracy by pair, and verdicts whose texts lie with the generation."""
    config = run.config
    where = resolve(text(config.get("completions")), run) if config.get("completions") else None
    texts = {text(row.get("id")): row for row in read_rows(where, run.problems)} if where is not None else {}
    asked = next((text(row.get("model")) for row in texts.values()), "")
    name = model_name(text(config.get("model")) or asked or run.path.as_posix())
    model = model_of(models, name, run.path)
    scores = scores_of(content.get("scores"))
    model.result.scores.extend(score for score in scores if not score.metric.startswith("accuracy"))
    model.result.accuracy.extend(score for score in scores if score.metric.startswith("accuracy"))
    if model.result.scores:  # a run of accuracy alone fills no row
        model.result = replace(model.result, home="")
    model.margin_rows = run.rows("accuracy.jsonl")
    verdicts = run.rows("verdicts.jsonl")
    for row in verdicts:
        found = texts.get(text(row.get("completion_id")), {})
        prompt = _prompt_text(found.get("prompt")) or text(row.get("prompt"))
        own = {**found, "id": row.get("completion_id"), "kind": row.get("kind"), "finished": row.get("finished")}
        _add_answer(model, own if found else {**own, "text": None}, prompt, verdict_of(row), text(row.get("prompt")))
    if verdicts and not texts:
        run.problems.append(
            f"{run.path}: the completions that were judged are not where its config says; no text of it"
        )


def model_of(models: dict[str, Model], name: str, path: Path | None = None) -> Model:
    """Return the model of a name; for a second run over one of that name, a new one called after its folder too."""
    name = name or "model"
    if path is not None and name in models:
        seed = next((part for part in reversed(path.parts) if part.startswith("seed-")), path.name)
        name = f"{name} ({seed})"
        while name in models:
            name += "'"
    if name not in models:
        models[name] = Model(MethodResult(name, name, "baseline"))
    return models[name]


def _add_answer(model: Model, row: dict[str, Any], prompt: str, verdict: Verdict | None, asked: str = "") -> None:
    """Add an answer; `asked` is its prompt in the normalised form, where the row of the verdict has it."""
    suite, kind, own_id = text(row.get("suite")), text(row.get("kind")), text(row.get("id"))
    finished = row.get("finished") is not False
    place = 0
    while (key := (suite, own_id, str(place))) in model.answers:
        place += 1
    if isinstance(row.get("text"), str):
        model.answers[key] = (prompt, kind, SampleAnswer(model.result.name, row["text"], verdict, finished))
    if verdict is not None:
        model.judges.setdefault(suite, set()).add(verdict.judge)
        model.asked.setdefault(suite, set()).add(asked or _normalised(row.get("prompt")) or prompt)
        scored = verdict.label != "unscored"
        model.judged.setdefault(suite, []).append(
            Judged(
                id=f"{suite} {own_id} {place}",
                prompt=prompt,
                kind=kind,
                safe=verdict.label == "safe" if scored else None,
                helpful=verdict.helpful if scored else None,
                helpful_and_safe=verdict.helpful_and_safe if scored else None,
                well_formed=verdict.well_formed,
                refused=verdict.refused,
                finished=finished,
            )
        )


def _normalised(prompt: Any) -> str:
    """Return the messages of a prompt as text that is the same wherever it was asked; nothing where there are none."""
    turns = [row for row in prompt if isinstance(row, dict)] if isinstance(prompt, list) else []
    try:
        return normalised_prompt([Message(text(turn.get("role")), text(turn.get("content"))) for turn in turns])  # type: ignore[arg-type]  # checked by the class
    except BfpoError:
        return ""


def _prompt_text(prompt: Any) -> str:
    """Return a prompt as people read it: the one message, or the turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    turns = [row for row in prompt if isinstance(row, dict)] if isinstance(prompt, list) else []
    if len(turns) == 1:
        return text(turns[0].get("content"))
    return "\n".join(f"{text(turn.get('role'))}: {text(turn.get('content'))}" for turn in turns)


def is_object(row: Any) -> bool:
    """Return whether a value is a JSON object."""
    return isinstance(row, dict)
