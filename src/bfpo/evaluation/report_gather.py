"""From run folders of any stage to the data of one page: what belongs together is joined, what is missing is said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bfpo.errors import BfpoError, DataError
from bfpo.evaluation.report_data import (
    Comparison,
    MethodResult,
    ReportData,
    Role,
    Sample,
    SampleAnswer,
    Suite,
    SuiteComparison,
)
from bfpo.evaluation.report_folders import Run, find_runs, model_name, read_rows, resolve, shown_path
from bfpo.evaluation.report_notes import absent_parts, notes_of, problems_of
from bfpo.evaluation.report_parts import (
    agreement_of,
    data_card_of,
    margin_spreads,
    number,
    record_of,
    scores_of,
    text,
    verdict_of,
)
from bfpo.evaluation.scores import METRICS, Judged, compare
from bfpo.evaluation.suite_table import with_suite_means
from bfpo.schema import Verdict

__all__ = ["gather"]

COMPARED = ("helpful_and_safe", "harmless_harmful", "over_refusal_benign", "over_refusal_borderline", "well_formed")
SETTINGS = ("method", "beta", "alpha", "safety_weight", "safedpo_delta", "bso_shift", "anchor_weight", "learning_rate")
ROLES: tuple[Role, ...] = ("main", "baseline", "start", "ceiling")
_CURVE_STAGES = ("train", "sft")
_Key = tuple[str, str, str]  # suite, id, completion number among those of one id


@dataclass
class _Model:
    """What the runs say about one model, while it is put together."""

    result: MethodResult
    judged: list[Judged] = field(default_factory=list)
    margin_rows: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[_Key, tuple[str, str, SampleAnswer]] = field(default_factory=dict)  # prompt, kind, answer


def gather(folders: Sequence[str | Path], *, title: str = "Report", main: str | None = None) -> ReportData:
    """Return the page's data from run folders of any stage, and from the runs below them.

    A single finished demo gives its own data back. `main` names the model that the page is about; without it that is
    the only one trained by `bfpo`, or the only model. Nothing of it depends on the time or on the order of a file
    system. Raises `DataError` for a folder that is missing or holds no run, or a `main` that no run is about.
    """
    runs = find_runs(folders)
    roots = [Path(folder) for folder in folders]
    finished = _finished_demo(runs, roots)
    if finished is not None:
        about = [method.name for method in finished.methods if method.role == "main"]
        if main is not None and main not in about:
            raise DataError(
                f"--main: got {main!r}; allowed for the page of a demo, which has its own: {', '.join(about)}"
            )
        return replace(finished, runs=finished.runs or [record_of(run, roots) for run in runs])
    models: dict[str, _Model] = {}
    suites: dict[str, Suite] = {}
    comparisons: list[SuiteComparison] = []
    for run in runs:
        if run.stage == "evaluate":
            _add_scores(run, models, suites, comparisons)
    for run in runs:
        if run.stage in _CURVE_STAGES:
            _add_training(run, models, of_methods=run.stage == "train")
    for model in models.values():
        spreads = margin_spreads(model.margin_rows, beta=number(model.result.settings.get("beta")))
        model.result = replace(model.result, margins=spreads)
    _set_roles(runs, models, main)
    shown = {run: shown_path(run.path, roots) for run in runs}
    found_agreement = [agreement_of(run, shown[run]) for run in runs if run.stage in ("judge-check", "label")]
    cards = [data_card_of(run, shown[run]) for run in runs if run.stage == "prepare"]
    data = ReportData(
        title=title,
        setting=f"from {len(runs)} run{'s' if len(runs) > 1 else ''}: {_counts(run.stage for run in runs)}",
        methods=sorted((model.result for model in models.values()), key=lambda method: ROLES.index(method.role)),
        comparisons=list(_compare(models)),
        samples=_samples(models),
        samples_note="Every judged answer that the runs hold.",
        seeds=_seeds(runs),
        confidence=_confidence(runs),
        num_prompts=_num_prompts(models),
        versions=next((run.record["versions"] for run in runs if isinstance(run.record.get("versions"), dict)), {}),
        commands=[f"bfpo report {' '.join(root.name or str(root) for root in roots)} --out page.html"],
        created=max((text(run.record.get("updated")) for run in runs), default=""),
        suites=list(suites.values()),
        suite_comparisons=comparisons,
        agreement=[found for found in found_agreement if found is not None],
        data_cards=[card for card in cards if card is not None],
        runs=[record_of(run, roots) for run in runs],
        absent=[*absent_parts(runs), *problems_of(runs), *_unlike(models)],
        notes=list(notes_of(runs, suites)),
    )
    return with_suite_means(data)


def _finished_demo(runs: Sequence[Run], roots: Sequence[Path]) -> ReportData | None:
    if len(roots) != 1 or not runs or runs[0].stage != "demo" or runs[0].record.get("status") != "finished":
        return None
    try:
        return ReportData.from_json((runs[0].path / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, BfpoError):
        runs[0].problems.append(f"{runs[0].path}/report.json: cannot be read; the page is made from the runs below it")
        return None


# ---------------------------------------------------------------------------------------------------------- evaluate


def _add_scores(
    run: Run, models: dict[str, _Model], suites: dict[str, Suite], comparisons: list[SuiteComparison]
) -> None:
    content = run.json("scores.json")
    if not isinstance(content.get("models"), list):
        _add_single(run, content, models)
        return
    for row in filter(_is_object, content["models"]):
        _model(models, text(row.get("name")) or model_name(text(row.get("model"))))
    for row in filter(_is_object, content.get("suites") or []):
        known = {key: text(row.get(key)) for key in Suite.__dataclass_fields__ if text(row.get(key))}
        if known.get("name"):
            suites[known["name"]] = Suite(**known)
    for row in filter(_is_object, content.get("scores") or []):
        name, suite, found = text(row.get("model")), text(row.get("suite")), scores_of([row])
        if name in models and found:
            result = models[name].result
            result.suite_scores.setdefault(suite, []).extend(found)
            if found[0].metric in METRICS and result.score(found[0].metric) is None:
                result.scores.extend(found)
            elif found[0].metric.startswith("accuracy_") or suites.get(suite, Suite("")).kind == "accuracy":
                result.accuracy.extend(found)
    fields = SuiteComparison.__dataclass_fields__
    for row in filter(_is_object, content.get("comparisons") or []):
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


def _add_single(run: Run, content: dict[str, Any], models: dict[str, _Model]) -> None:
    """A run over one model: scores, accuracy by pair, and verdicts whose texts lie with the generation."""
    config = run.config
    where = resolve(text(config.get("completions")), run) if config.get("completions") else None
    texts = {text(row.get("id")): row for row in read_rows(where, run.problems)} if where is not None else {}
    asked = next((text(row.get("model")) for row in texts.values()), "")
    name = model_name(text(config.get("model")) or asked or run.path.as_posix())
    model = _model(models, name, run.path)
    scores = scores_of(content.get("scores"))
    model.result.scores.extend(score for score in scores if not score.metric.startswith("accuracy"))
    model.result.accuracy.extend(score for score in scores if score.metric.startswith("accuracy"))
    model.margin_rows = run.rows("accuracy.jsonl")
    verdicts = run.rows("verdicts.jsonl")
    for row in verdicts:
        found = texts.get(text(row.get("completion_id")), {})
        prompt = _prompt_text(found.get("prompt")) or text(row.get("prompt"))
        own = {**found, "id": row.get("completion_id"), "kind": row.get("kind"), "finished": row.get("finished")}
        _add_answer(model, own if found else {**own, "text": None}, prompt, verdict_of(row))
    if verdicts and not texts:
        run.problems.append(
            f"{run.path}: the completions that were judged are not where its config says; no text of it"
        )


def _model(models: dict[str, _Model], name: str, path: Path | None = None) -> _Model:
    """Return the model of a name; for a second run over one of that name, a new one called after its folder too."""
    name = name or "model"
    if path is not None and name in models:
        seed = next((part for part in reversed(path.parts) if part.startswith("seed-")), path.name)
        name = f"{name} ({seed})"
        while name in models:
            name += "'"
    if name not in models:
        models[name] = _Model(MethodResult(name, name, "baseline"))
    return models[name]


def _add_answer(model: _Model, row: dict[str, Any], prompt: str, verdict: Verdict | None) -> None:
    suite, kind, own_id = text(row.get("suite")), text(row.get("kind")), text(row.get("id"))
    finished = row.get("finished") is not False
    place = 0
    while (key := (suite, own_id, str(place))) in model.answers:
        place += 1
    if isinstance(row.get("text"), str):
        model.answers[key] = (prompt, kind, SampleAnswer(model.result.name, row["text"], verdict, finished))
    if verdict is not None:
        scored = verdict.label != "unscored"
        model.judged.append(
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


def _prompt_text(prompt: Any) -> str:
    """Return a prompt as people read it: the one message, or the turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    turns = [row for row in prompt if isinstance(row, dict)] if isinstance(prompt, list) else []
    if len(turns) == 1:
        return text(turns[0].get("content"))
    return "\n".join(f"{text(turn.get('role'))}: {text(turn.get('content'))}" for turn in turns)


# ------------------------------------------------------------------------------------------------ training and roles


def _add_training(run: Run, models: dict[str, _Model], *, of_methods: bool) -> None:
    name = model_name(run.path.as_posix())
    if not of_methods and name not in models:
        return  # the curve of an SFT has no margins; a model that nobody scored is no row
    model = models.get(name) or _model(models, name)
    if of_methods and not model.result.curves:
        config = run.config
        settings = {key: config[key] for key in (*SETTINGS, "max_steps", "seed") if key in config}
        model.result = replace(
            model.result,
            curves=run.rows("metrics.jsonl"),
            settings=settings,
            summary=text(config.get("method")),
            seconds=number(run.record.get("seconds")),
        )


def _set_roles(runs: Sequence[Run], models: dict[str, _Model], main: str | None) -> None:
    if main is not None and main not in models:
        from bfpo.errors import DataError

        raise DataError(f"--main: got {main!r}; no run is about it; allowed: {', '.join(models) or 'none'}")
    starts = {model_name(text(run.config.get("reference"))) for run in runs if run.config.get("reference")}
    starts |= {model_name(text(run.config.get("model"))) for run in runs if run.stage == "train"}
    ours = [name for name, model in models.items() if model.result.settings.get("method") == "bfpo"]
    if main is None:
        main = ours[0] if len(ours) == 1 else next(iter(models)) if len(models) == 1 else None
    for name, model in models.items():
        role: Role = "main" if name == main else "start" if name in starts and not model.result.curves else "baseline"
        if name == "ceiling" and role == "baseline":
            role = "ceiling"
        model.result = replace(model.result, role=role)


def _compare(models: dict[str, _Model]) -> Iterator[Comparison]:
    main = next((model for model in models.values() if model.result.role == "main"), None)
    for model in models.values() if main is not None and main.judged else ():
        if model.result.role != "baseline" or not model.judged:
            continue
        assert main is not None
        for metric in COMPARED:
            found = compare(main.judged, model.judged, metric)
            yield Comparison(model.result.name, metric, found.value, found.low, found.high, found.num)


def _samples(models: dict[str, _Model]) -> list[Sample]:
    keys: dict[_Key, tuple[str, str]] = {}
    for model in models.values():
        for key, (prompt, kind, _) in model.answers.items():
            keys.setdefault(key, (prompt, kind))
    return [
        Sample(
            prompt,
            kind,
            [m.answers[key][2] for m in models.values() if key in m.answers and m.answers[key][0] == prompt],
            suite=key[0],
        )
        for key, (prompt, kind) in keys.items()
    ]


# -------------------------------------------------------------------------------------------------- facts of the runs


def _seeds(runs: Sequence[Run]) -> list[int]:
    found = {run.config.get("seed") for run in runs if run.stage == "train"}
    return sorted(seed for seed in found if isinstance(seed, int))


def _confidence(runs: Sequence[Run]) -> float:
    found = [number(run.json("scores.json").get("confidence")) for run in runs if run.stage == "evaluate"]
    return next((level for level in found if level is not None and 0 < level < 1), 0.95)


def _num_prompts(models: dict[str, _Model]) -> dict[str, int]:
    kinds: dict[str, set[str]] = {}
    for model in models.values():
        for row in model.judged:
            kinds.setdefault(row.kind or "of no kind", set()).add(row.prompt)
    return {kind: len(prompts) for kind, prompts in sorted(kinds.items())}


def _unlike(models: dict[str, _Model]) -> Iterator[str]:
    """Yield a warning where models that stand in one table were not judged alike, so that nobody ranks them."""
    judged = {name: [answer for _, _, answer in model.answers.values()] for name, model in models.items()}
    judges = {name: tuple(sorted({one.verdict.judge for one in rows if one.verdict})) for name, rows in judged.items()}
    if len({names for names in judges.values() if names}) > 1:
        who = "; ".join(f"{name}: {', '.join(names)}" for name, names in judges.items() if names)
        yield f"The models were not judged by the same judges ({who}): what stands side by side cannot be ranked."
    prompts = {name: frozenset(prompt for prompt, _, _ in model.answers.values()) for name, model in models.items()}
    if len({asked for asked in prompts.values() if asked}) > 1:
        how_many = ", ".join(f"{name} {len(asked)}" for name, asked in prompts.items() if asked)
        yield f"The models were not asked the same prompts ({how_many}): compare only what both answered."


def _counts(names: Any) -> str:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _is_object(row: Any) -> bool:
    return isinstance(row, dict)
