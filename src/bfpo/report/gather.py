"""The data of one page from run folders of any stage, with notes on what is missing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from bfpo.core.console import level_text
from bfpo.core.errors import BfpoError, DataError
from bfpo.core.schema import JudgeFit
from bfpo.data.tokenize import token_notes
from bfpo.judges.records import JudgeCheckFile, RedteamFile
from bfpo.objective.methods import method_settings
from bfpo.report.data import Comparison, Experiment, MethodResult, ReportData, Role, Sample, Suite, SuiteComparison
from bfpo.report.experiments import COMPARE_MAIN, experiment_of, methods_of, prompts_of, split_experiments
from bfpo.report.gate import gate_tables
from bfpo.report.models import (
    AnswerKey,
    Model,
    add_answers,
    add_labels,
    add_margins,
    add_scores,
    inside_suites,
    model_of,
    with_basis,
)
from bfpo.report.places import place_of_model, place_of_run, run_at
from bfpo.report.read import (
    Run,
    agreement_of,
    data_card_of,
    find_runs,
    margin_spreads,
    model_name,
    people_tables,
    record_of,
    shown_path,
    with_own_titles,
)
from bfpo.report.stages import stage_results
from bfpo.report.tables import with_suite_means
from bfpo.scores.scores import COHERENCE, Judged, compare, describe_coherence
from bfpo.suites.records import SuitesFile
from bfpo.suites.scores import describe_guard

__all__ = ["gather"]

COMPARED = ("helpful_and_safe", "harmless_harmful", "over_refusal_benign", "over_refusal_borderline", "well_formed")
SETTINGS = ("method", *method_settings(), "anchor_weight", "anchor_scale", "learning_rate", "max_steps")
ROLES: tuple[Role, ...] = ("main", "baseline", "start", "ceiling")
_CURVE_STAGES = ("train", "sft")
_TITLE = "Report"
_NAMED = 4  # largest number of skipped suites that the top of the page names


def gather(folders: Sequence[str | Path], *, title: str = _TITLE, main: str | None = None) -> ReportData:
    """Return the page's data from run folders of any stage, and from the runs below them.

    A single finished demo returns its own data. `main` names the model that the page is about; by default it is the
    only one trained with the method `bfpo`, or the only model. The result does not depend on the time or the file
    system. Raises `DataError` for a folder that is missing or holds no run, or a `main` without a run.
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
        named = finished.title if title == _TITLE else title
        return replace(finished, title=named, runs=finished.runs or [record_of(run, roots) for run in runs])
    others, experiments, inside = split_experiments(runs, roots)
    parts = inside_suites(others)
    within = [run for inner in parts.values() for run in inner]
    others = [run for run in others if run not in within]
    shown = {run: shown_path(run.path, roots) for run in runs}
    models: dict[str, Model] = {}
    suites: dict[str, Suite] = {}
    comparisons: list[SuiteComparison] = []
    for run in others:
        if run.stage == "evaluate":
            add_margins(run.path, parts.get(run.path, ()), add_scores(run, models, suites, comparisons))
    if not models and not experiments:
        red = [run.path for run in others if run.stage == "redteam"]
        for run in others:
            if run.stage in ("redteam", "generate") and not any(top in run.path.parents for top in red):
                add_answers(run, models)
    for run in others:
        if run.stage == "label" and not experiments:
            add_labels(run, models, only_known=any(other.stage == "evaluate" for other in others))
    _add_trainings([run for run in others if run.stage in _CURVE_STAGES], models)
    for model in models.values():
        beta = model.result.settings.get("beta")
        spreads = margin_spreads(model.margin_rows, beta=beta if isinstance(beta, (int, float)) else None)
        model.result = replace(model.result, margins=spreads)
    found = [experiment_of(run, inside[run.path], shown[run]) for run in experiments]
    head_to_head = _head_to_head(found) if not models else None
    if head_to_head is None:
        _set_roles(others, models, main)
    elif main not in (None, COMPARE_MAIN):
        raise DataError(f"--main: got {main!r}; allowed for the page of a comparison of methods: {COMPARE_MAIN}")
    found_agreement = [agreement_of(run, shown[run]) for run in others if run.stage in ("judge-check", "label")]
    cards = [data_card_of(run, shown[run]) for run in others if run.stage == "prepare"]
    listed = [run for run in runs if run in [*others, *within, *experiments] or _in_progress(run, experiments)]
    conditions = [table for run in others if run.stage == "evaluate" for table in gate_tables(run, shown[run])]
    data = ReportData(
        title=title,
        setting=_setting([run for run in runs if run not in within]),
        methods=sorted(map(with_basis, models.values()), key=lambda method: ROLES.index(method.role)),
        samples=_samples(models),
        samples_note="Every answer that the runs hold.",
        seeds=_seeds(others),
        confidence=_confidence(others),
        versions=next((run.record.versions for run in runs if run.record.versions), {}),
        commands=[_command(roots, title, main)],
        created=max((run.record.updated for run in runs), default=""),
        suites=list(suites.values()),
        suite_comparisons=comparisons,
        agreement=with_own_titles([one for one in found_agreement if one is not None]),
        data_cards=[card for card in cards if card is not None],
        runs=[record_of(run, roots) for run in listed],
        absent=[*absent_parts(others + experiments, shown, inside), *problems_of(runs)],
        conditions=conditions,
        notes=[
            *(f"{table.title}." for table in conditions),
            *notes_of(others, suites),
            *_notes_on_skipped(others, suites, shown),
            *_note_on_levels(others, shown),
            *_notes_on_judges(others, shown),
            *_notes_on_tokens(others, shown),
            *(
                f"{model.result.name}: {shown[run]} calls this model {name}."
                for model in models.values()
                for run, name in model.other_names
            ),
            *(
                f"{one.result.name} and {other.result.name} are the same model, by its run or folder."
                for one, other in combinations(models.values(), 2)
                if None not in (one.place.inside, other.place.inside) and one.place.is_same(other.place)
            ),
        ],
        experiments=found,
        stages=stage_results(others, shown),
        people=[table for run in others if run.stage == "evaluate" for table in people_tables(run, shown[run])],
        depth={
            shown[run]: depth
            for run in others
            if run.stage == "evaluate" and (depth := getattr(run.scores, "depth", None)) is not None
        },
    )
    if head_to_head is not None:
        return _with_methods(data, head_to_head)
    data = replace(data, comparisons=list(_compare(data, models)), num_prompts=_num_prompts(data, models))
    data = with_suite_means(data)
    return replace(data, absent=[*data.absent, *_unlike(models)])


def _command(roots: Sequence[Path], title: str, main: str | None) -> str:
    """Return the command that makes this page again."""
    words = [*(root.as_posix() for root in roots), *([] if main is None else ["--main", main])]
    words += [] if title == _TITLE else ["--title", title]
    return f"bfpo report {shlex.join(words)} --out page.html"


def _head_to_head(experiments: Sequence[Experiment]) -> Experiment | None:
    """Return the comparison whose methods are the rows of the page, if there is exactly one."""
    found = [one for one in experiments if one.stage == "compare" and one.measured]
    return found[0] if len(found) == 1 else None


def _with_methods(data: ReportData, head_to_head: Experiment) -> ReportData:
    methods, differences = methods_of(head_to_head)
    return replace(
        data,
        methods=methods,
        comparisons=differences,
        seeds=head_to_head.seeds,
        confidence=head_to_head.confidence,
        num_prompts=prompts_of(methods),
    )


def _in_progress(run: Run, experiments: Sequence[Run]) -> bool:
    """Return whether a run is inside an experiment that has not ended."""
    holders = [top for top in experiments if top.path in run.path.parents]
    return any(top.record.status != "finished" for top in holders)


def _finished_demo(runs: Sequence[Run], roots: Sequence[Path]) -> ReportData | None:
    if len(roots) != 1 or not runs or runs[0].stage != "demo" or runs[0].record.status != "finished":
        return None
    try:
        return ReportData.from_json((runs[0].path / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, BfpoError):
        runs[0].problems.append(f"{runs[0].path}/report.json: cannot be read; the page is made from the runs below it")
        return None


# ------------------------------------------------------------------------------------------------ training and roles


def _add_trainings(runs: Sequence[Run], models: dict[str, Model]) -> None:
    """Add curves and settings to the models that were trained, which may have several rows; SFT adds no row."""
    places = [(run, place_of_run(run)) for run in runs]
    of_model = {name: run_at(model.place, places) for name, model in models.items()}
    for run, place in places:
        rows = [models[name] for name, found in of_model.items() if found is run]
        if not rows and run.stage == "train":  # an unscored model
            name = model_name(run.path.as_posix())
            rows = [model_of(models, name, run.path if name in models else None, place)]
        for model in rows if run.stage == "train" else ():
            config = run.record.config
            settings = {key: config[key] for key in (*SETTINGS, "seed") if key in config}
            model.result = replace(
                model.result,
                curves=run.rows(dict, "metrics.jsonl"),
                settings=settings,
                summary=run.setting("method", str) or "",
                seconds=run.record.seconds,
            )


def _set_roles(runs: Sequence[Run], models: dict[str, Model], main: str | None) -> None:
    if main is not None and main not in models:
        raise DataError(f"--main: got {main!r}; allowed: {', '.join(models) or 'none'}")
    starts = [place_of_model(path, run) for run in runs if (path := run.setting("reference", str))]
    starts += [place_of_model(run.setting("model", str), run) for run in runs if run.stage == "train"]
    starts += [place_of_model(path, run) for run in runs if run.stage == "evaluate" for path in _named_starts(run)]
    ours = [name for name, model in models.items() if model.result.settings.get("method") == "bfpo"]
    if main is None:
        main = ours[0] if len(ours) == 1 else next(iter(models)) if len(models) == 1 else None
    for name, model in models.items():
        started = not model.result.curves and any(model.place.is_same(start) for start in starts)
        role: Role = "main" if name == main else "start" if started else "baseline"
        if name == "ceiling" and role == "baseline":
            role = "ceiling"
        model.result = replace(model.result, role=role)


def _named_starts(run: Run) -> Iterator[str]:
    """Yield the start models that an evaluation of suites names: `reference` of a model, `coherence.model`."""
    named = [one for one in run.setting("models", list) or [] if isinstance(one, dict)]
    yield from (path for one in named if isinstance(path := one.get("reference"), str))
    if isinstance(start := (run.setting("coherence", dict) or {}).get("model"), str):
        yield next((str(one.get("model")) for one in named if one.get("name") == start), start)


def _compare(data: ReportData, models: dict[str, Model]) -> Iterator[Comparison]:
    """Yield the paired differences to the main model, over prompts that both answered, judged by the same judge."""
    main = data.main
    for method in data.baselines if main is not None else ():
        assert main is not None
        first, second = models[main.name], models[method.name]
        if not first.home_rows or not second.home_rows or _judges(main) != _judges(method):
            continue
        for metric in COMPARED:
            found = compare(_of_any_suite(first), _of_any_suite(second), metric, confidence=data.confidence)
            yield Comparison(method.name, metric, found.value, found.low, found.high, found.num)


def _of_any_suite(model: Model) -> list[Judged]:
    """Return the judged answers of the model's row, with ids without their suite, as in a run over one model."""
    return [replace(row, id=row.id.partition(" ")[2]) for row in model.home_rows]


def _judges(method: MethodResult) -> list[str]:
    return method.basis[method.home].judges if method.home in method.basis else []


def _samples(models: dict[str, Model]) -> list[Sample]:
    keys: dict[tuple[AnswerKey, str], str] = {}  # ids of prompt files may be line numbers: not one prompt each
    for model in models.values():
        for key, (prompt, kind, _) in model.answers.items():
            keys.setdefault((key, prompt), kind)
    return [
        Sample(
            prompt,
            kind,
            [m.answers[key][2] for m in models.values() if key in m.answers and m.answers[key][0] == prompt],
            suite=key[0],
        )
        for (key, prompt), kind in keys.items()
    ]


# -------------------------------------------------------------------------------------------------- facts of the runs


def _seeds(runs: Sequence[Run]) -> list[int]:
    found = {run.setting("seed", int) for run in runs if run.stage == "train"}
    return sorted(seed for seed in found if seed is not None)


def _levels(runs: Sequence[Run]) -> dict[Run, float]:
    found = {run: run.scores.confidence for run in runs if run.stage == "evaluate"}
    return {run: level for run, level in found.items() if 0 < level < 1}


def _confidence(runs: Sequence[Run]) -> float:
    return next(iter(_levels(runs).values()), 0.95)


def _note_on_levels(runs: Sequence[Run], shown: Mapping[Run, str]) -> Iterator[str]:
    """Yield that intervals have other levels than the one that the page names."""
    named = _confidence(runs)
    others = [f"{shown[run]} {level_text(level)}" for run, level in _levels(runs).items() if level != named]
    if others:
        yield (
            f"The page calls its intervals {level_text(named)}; those of other runs have their own level "
            f"({', '.join(others)}): evaluate with one `confidence` to compare them."
        )


def _num_prompts(data: ReportData, models: dict[str, Model]) -> dict[str, int]:
    """Return the prompts behind the table of models by kind; empty if the models answered different ones."""
    rows = {name: model.home_rows for name, model in models.items() if model.home_rows}
    asked = {method.basis[method.home or ""].prompts for method in data.methods if method.name in rows}
    kinds: dict[str, set[str]] = {}
    for row in next(iter(rows.values())) if len(asked) == 1 else ():
        kinds.setdefault(row.kind or "of no kind", set()).add(row.prompt)
    return {kind: len(prompts) for kind, prompts in sorted(kinds.items())}


def _unlike(models: dict[str, Model]) -> Iterator[str]:
    """Yield why the models of the table cannot all be ranked: different judges, different prompts."""
    judged = {name: sorted(set().union(*model.judges.values())) for name, model in models.items() if model.judges}
    if len({tuple(names) for names in judged.values()}) > 1:
        judges = "; ".join(f"{name}: {', '.join(names)}" for name, names in judged.items())
        yield f"The models were not judged by the same judges ({judges}) and cannot be ranked."
    asked = {name: set().union(*model.asked.values()) for name, model in models.items() if model.asked}
    if len({frozenset(prompts) for prompts in asked.values()}) > 1:
        counts = "; ".join(f"{name} {len(prompts)}" for name, prompts in asked.items())
        yield f"The models were not asked the same prompts ({counts}): compare them only on common prompts."


def _setting(runs: Sequence[Run]) -> str:
    return f"from {len(runs)} run{'s' if len(runs) > 1 else ''}: {_counts(run.stage for run in runs)}"


def _counts(names: Any) -> str:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def absent_parts(runs: Sequence[Run], shown: Mapping[Run, str], inside: Mapping[Path, Sequence[Run]]) -> Iterator[str]:
    """Yield what a page of scores lacks because no run has it, and the runs that did not finish.

    `inside`: the runs within experiments, by the path of the experiment.
    """
    hidden = [run for within in inside.values() for run in within]
    stages = {run.stage for run in (*runs, *hidden)}
    for stage, what in {
        "evaluate": "scores and verdicts",
        "train": "training curves",
        "judge-check": "the judge's error against people's labels",
        "prepare": "the data card",
    }.items():
        if stage not in stages and "evaluate" in stages:
            yield f"{what}: no run of bfpo {stage} was given"
    if hidden:
        yield (
            f"the answers and training curves of {len(hidden)} runs inside experiments: pass the folder of one of them "
            "to show it"
        )
    for run in runs:
        if run.record.status != "finished":
            yield f"{shown[run]} ({run.stage}) is {run.record.status or 'of unknown status'}"


def problems_of(runs: Sequence[Run]) -> list[str]:
    """Return the files that could not be read, each once."""
    return list(dict.fromkeys(problem for run in runs for problem in run.problems))


def notes_of(runs: Sequence[Run], suites: dict[str, Suite]) -> Iterator[str]:
    """Yield caveats: how coherence was read, the same judge for labels and evaluation, skipped suites."""
    scored = [run.scores for run in runs if run.stage == "evaluate" and run.scores is not None]
    read = [one for one in scored if any(score.metric in COHERENCE for score in one.scores)]
    yield from dict.fromkeys(describe_coherence(one.coherence) for one in read)
    for one in scored:
        if isinstance(one, SuitesFile) and one.guard is not None:
            yield from (f"{line}." for line in describe_guard(one.guard, one.suites))
    judged = {run.setting("completions", str) for run in runs if run.stage == "evaluate"} - {None}
    labelled = [run for run in runs if run.setting("completions", str) not in judged]  # not the evaluated answers again
    labelling = {
        json.dumps(judge, sort_keys=True) for run in labelled for judge in _judges_of(run, ("label", "redteam"))
    }
    evaluating = {json.dumps(judge, sort_keys=True) for run in runs for judge in _judges_of(run, ("evaluate",))}
    if labelling & evaluating:
        yield "The judge that labelled the training data also judged the answers: its errors favour the model."
    warnings = [text for run in runs if run.stage == "evaluate" for text in getattr(run.scores, "warnings", ())]
    yield from (f"{text}." for text in dict.fromkeys(warnings))
    skipped = [suite.title or suite.name for suite in suites.values() if suite.status == "skipped"]
    if len(skipped) > _NAMED:
        yield f"{len(skipped)} of {len(suites)} suites were skipped and are in no mean; the reasons are given below."
    elif skipped:
        yield f"Skipped, and in no mean: {'; '.join(skipped)}."


def _notes_on_skipped(runs: Sequence[Run], suites: Mapping[str, Suite], shown: Mapping[Run, str]) -> Iterator[str]:
    """Yield the suites that one run skipped and another one scored."""
    for run in runs:
        for one in getattr(run.scores, "suites", ()) if run.stage == "evaluate" else ():
            if one.status != "scored" and suites[one.name].status == "scored":
                yield f"{shown[run]} skipped {one.title or one.name}, which another run scored: {one.reason or '?'}."


def _notes_on_judges(runs: Sequence[Run], shown: Mapping[Run, str]) -> Iterator[str]:
    """Yield the warnings about judges that do not fit the texts, each once: a red-teaming has those of its labels."""
    found: dict[str, str] = {}
    for run in runs:
        for fit in _fits_of(run) or ():
            for warning in fit.warnings or ():
                found.setdefault(warning, shown[run])
    yield from (f"{name}: {warning}." for warning, name in found.items())


def _fits_of(run: Run) -> list[JudgeFit] | None:
    if run.stage in ("evaluate", "label"):
        return run.scores.judge_fit
    if run.stage == "judge-check":
        return run.load(JudgeCheckFile, "quality.json").judge_fit
    return run.load(RedteamFile, "redteam.json").judge_fit if run.stage == "redteam" else None


def _notes_on_tokens(runs: Sequence[Run], shown: Mapping[Run, str]) -> Iterator[str]:
    """Yield what the chat template and the cuts did to the rows of each training."""
    for run in runs:
        streams = run.load(dict, "data.json") if run.stage in _CURVE_STAGES else {}
        for name, facts in streams.items():
            if isinstance(facts, dict) and isinstance(row := facts.get("tokens"), dict):
                yield from (f"{shown[run]}: {note}." for note in token_notes(name, row))


def _judges_of(run: Run, stages: Sequence[str]) -> list[Any]:
    if run.stage not in stages:
        return []
    judges = run.record.config.get("judges") or run.record.config.get("judge") or []
    rows = judges if isinstance(judges, list) else [judges]
    return [{"format": row} if isinstance(row, str) else row for row in rows]
