"""What single runs found, as a sentence, lines and tables: data, labels, judges, generation, red-teaming, the toy.

Training is in `bfpo.report.progress`. Only what a run has measured is shown; a file that it lacks gives no table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from bfpo.core.console import in_words, level_text
from bfpo.core.schema import Score, VerdictRow
from bfpo.data.labels import CELLS
from bfpo.data.records import DataFile, PairStreamFacts
from bfpo.judges.label_report import RATE_TITLES, measures_form, tried_text
from bfpo.judges.needless import NEEDLESS_STEPS
from bfpo.judges.quality import QUALITY_TITLES
from bfpo.judges.records import CleanedCell, CleanFile, JudgeCheckFile, RedteamFile
from bfpo.report.data import FactTable, StageResult
from bfpo.report.progress import forecast_facts, forecast_said, training_result
from bfpo.report.read import Run, model_name
from bfpo.report.wording import (
    cell_title,
    count_text,
    interval_text,
    listed,
    number,
    percent,
    points,
    points_interval,
    with_interval,
    worst_words,
)
from bfpo.scores.records import WorldMethod, WorldsFile
from bfpo.scores.scores import metric_title, p_text
from bfpo.stats import rate_interval
from bfpo.suites.records import TamperFile
from bfpo.training.forecast import FORECAST, ForecastFile

__all__ = ["stage_results"]

# The order of the results on a page; one that runs comes first.
_ORDER = (
    "compare",
    "tamper",
    "redteam",
    "train",
    "sft",
    "judge-check",
    "label",
    "clean",
    "prepare",
    "judge-train",
    "generate",
    "reference",
    "toy",
)


def stage_results(runs: Sequence[Run], shown: Mapping[Run, str]) -> list[StageResult]:
    """Return the results of the runs that are not inside a red-team run, the most telling first."""
    tops = [run.path for run in runs if run.stage == "redteam"]
    outer = [run for run in runs if run.stage in _MAKERS and not any(top in run.path.parents for top in tops)]
    found = [_MAKERS[run.stage](run, shown[run]) for run in outer]
    titles = Counter(one.title for one in found)
    named = [_named(one) if titles[one.title] > 1 else one for one in found]  # two cleaned files, say
    return sorted(named, key=lambda one: (one.status != "running", _ORDER.index(one.stage)))


def _named(found: StageResult) -> StageResult:
    """Return a result whose title and sentence name its run."""
    sentence = found.sentence if found.run in found.sentence else f"{found.run}: {found.sentence}"
    return replace(found, title=f"{found.title}, {found.run}", sentence=sentence)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What stages add to `run.json`."""

    OPEN: ClassVar[bool] = True

    prompts: dict[str, Any] = field(default_factory=dict)
    completions: dict[str, Any] = field(default_factory=dict)
    funnel: dict[str, int] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    judge: dict[str, Any] = field(default_factory=dict)
    ranker: dict[str, Any] = field(default_factory=dict)
    reference_pass: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _ToyOutcome:
    OPEN: ClassVar[bool] = True

    safe: str
    order: str


@dataclass(frozen=True, slots=True)
class _ToyMethod:
    OPEN: ClassVar[bool] = True

    label: str
    num_right: int
    num_tied: int = 0
    max_deviation: float | None = None
    assignments: list[_ToyOutcome] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _ToyFile:
    """`toy.json` of `bfpo toy`, the parts that a page shows."""

    OPEN: ClassVar[bool] = True

    methods: list[_ToyMethod] = field(default_factory=list)


def _result(run: Run, shown: str, title: str, sentence: str, **more: Any) -> StageResult:
    """Return a result; a run that has not finished says so, in its sentence if it has no other."""
    status = run.record.status or "of unknown status"
    lines = list(more.pop("lines", ()))
    if status != "finished" and sentence:
        error = f": {run.record.error.rstrip('.')}" if run.record.error else ""
        lines.insert(0, f"{_state(shown, run.stage, status)}{error}.")
    elif not sentence:
        sentence = f"{_state(shown, run.stage, status)}."
        lines = [run.record.error, *lines] if run.record.error else lines
        if status == "finished":
            sentence = f"{shown} ({run.stage}) has finished, but its results cannot be read."
    tables = [table for table in more.pop("tables", ()) if table.rows]
    return StageResult(shown, run.stage, status, title, sentence, lines, tables, **more)


def _state(shown: str, stage: str, status: str) -> str:
    words = {"failed": "has failed", "interrupted": "was interrupted"}
    return f"{shown} ({stage}) {words.get(status, f'is {status}')}"


def _worlds(run: Run, shown: str) -> StageResult:
    """Return the result of a comparison over several worlds; a comparison in one world is an experiment."""
    found = run.load(WorldsFile, "worlds.json")
    titles = {method.name: method.title for world in found.worlds for method in world.methods}
    scores = {(world.name, method.name): method for world in found.worlds for method in world.methods}
    lines = [
        f"{world.name}: {titles.get(world.best, world.best)} is highest"
        + (f", not distinguishable from {listed([titles.get(n, n) for n in alike])}." if alike else ".")
        for world in found.worlds
        for alike in [world.not_told_from_best]
    ]
    rows = []
    for name, title in titles.items():
        cells = [scores.get((world.name, name)) for world in found.worlds]
        rows.append([title, *("not measured" if one is None else _world_cell(one) for one in cells)])
    table = FactTable(metric_title(found.metric), ["method", *(world.name for world in found.worlds)], rows)
    sentence = f"Methods compared in {len(found.worlds)} worlds." if found.worlds else ""
    return _result(run, shown, "Score against noise and confounds", sentence, lines=lines, tables=[table])


def _world_cell(method: WorldMethod) -> str:
    if method.score.value is None:
        return "not measured"
    aside = worst_words(method.score, method.seed_values)
    return with_interval(method.score, 1) + (f"; {aside}" if aside else "")


def _tamper(run: Run, shown: str) -> StageResult:
    found = run.load(TamperFile, "tamper.json")
    scores = {(score.model, score.step, score.metric): score for score in found.scores if score.value is not None}
    titles, last = found.measures, found.steps[-1] if found.steps else 0
    said = [
        f"{model.name} from {with_interval(scores[model.name, 0, metric])} to "
        f"{with_interval(scores[model.name, last, metric])}"
        for metric in list(titles)[:1]
        for model in found.models
        if (model.name, 0, metric) in scores and (model.name, last, metric) in scores
    ]
    sentence = f"After {last} LoRA steps on {found.attack} data, {next(iter(titles.values()))}: " if said else ""
    settings = ", ".join(f"{key} {in_words(value)}" for key, value in found.settings.items())
    over = "prompts and seeds" if len(found.seeds) > 1 else "prompts, of one training each"
    lines = [
        *([f"Attack: {settings}. Intervals ({level_text(found.confidence)}) are over {over}."] if said else ()),
        *(f"Warning: {warning.rstrip('.')}." for warning in found.warnings),
        *(f"Skipped: {title}: {reason}." for title, reason in found.skipped.items()),
    ]
    tables = [
        FactTable(
            title[0].upper() + title[1:],
            ["model", *(f"{step} steps" for step in found.steps)],
            [
                [model.name, *(with_interval(one, 1) if (one := scores.get((model.name, step, metric))) else
                               "not measured" for step in found.steps)]
                for model in found.models
            ],
        )
        for metric, title in titles.items()
    ]  # fmt: skip
    changes = [
        [f"{row.model} after {row.step} − {row.against} after {row.against_step}", titles.get(row.metric, row.metric),
         points(row.difference), points_interval(row.low, row.high), p_text(row.p_holm)]
        for row in found.changes
        if row.difference is not None
    ]  # fmt: skip
    heads = ["first − second", "measure", "points", "interval", "p (Holm)"]
    tables.append(
        FactTable(f"Differences, paired by prompt; Holm's correction over all {len(changes)}", heads, changes)
    )
    curves = {
        title: {
            model.name: [
                (score.step, score.value, score.value if score.low is None else score.low,
                 score.value if score.high is None else score.high)
                for score in found.scores
                if (score.model, score.metric) == (model.name, metric) and score.value is not None
            ]
            for model in found.models
        }
        for metric, title in titles.items()
    }  # fmt: skip
    drawn = {title: {name: rows for name, rows in by.items() if rows} for title, by in curves.items()}
    about: dict[str, Any] = {
        "lines": lines,
        "tables": tables,
        "behaviour": {title: by for title, by in drawn.items() if by},
    }
    return _result(run, shown, "Tampering", f"{sentence}{'; '.join(said)}." if said else "", **about)


# ------------------------------------------------------------------------------------------------ data and labels


def _prepare(run: Run, shown: str) -> StageResult:
    data = run.load(DataFile, "data.json")
    streams = [
        f"{facts.rows.get('train', 0):,} {name} {'pairs' if isinstance(facts, PairStreamFacts) else 'completions'}"
        for name, facts in data.streams.items()
    ]
    sources = f"{len(data.sources)} source{'s' if len(data.sources) != 1 else ''}"
    sentence = f"Training data of {listed(streams)}, from {sources}." if streams else ""
    lines = []
    rest = {name: [f"{rows:,} {split}" for split, rows in facts.rows.items() if split != "train" and rows]
            for name, facts in data.streams.items()}  # fmt: skip
    if any(rest.values()):
        lines.append(
            "Held out: " + "; ".join(f"{name}, {listed(found)}" for name, found in rest.items() if found) + "."
        )
    if rejected := sum(count for source in data.sources for count in source.rejected.values()):
        lines.append(f"{rejected:,} of {sum(source.rows for source in data.sources):,} rows were rejected.")
    lines += [f"Rows removed because they ask a prompt of {name}: {hits.rows:,}."
              for name, hits in data.decontamination.items() if hits.rows]  # fmt: skip
    if data.warnings:
        lines.append(f"{len(data.warnings)} warning{'s' if len(data.warnings) > 1 else ''}, below.")
    return _result(run, shown, "Prepared data", sentence, lines=lines)


def _label(run: Run, shown: str) -> StageResult:
    facts = run.load(_Facts, "run.json")
    found = {key: value for key, value in facts.labels.items() if isinstance(value, int)}
    sentence = ""
    if "verdicts" in found:
        counts = [f"{found[key]:,} {key}" for key in ("safe", "unsafe", "unscored") if found.get(key)]
        judges = listed(_judges(run) or ["no judge"])
        sentence = f"{found['verdicts']:,} answers were judged by {judges}: {listed(counts or ['none'])}."
    tables = [
        *_funnel(facts.funnel, [], with_form=facts.funnel.get("well_formed", 0) < facts.funnel.get("completions", 0)),
        _cells(facts.labels.get("cells")),
        _reasons(facts.labels.get("unscored_by_reason")),
    ]
    return _result(run, shown, "Labels", sentence, tables=tables)


def _clean(run: Run, shown: str) -> StageResult:
    found = run.load(CleanFile, "clean.json")
    counts, sentence = found.labels, ""
    if counts.get("known") and "contradicted" in counts:
        sentence = (
            f"{found.judge or 'No judge'} contradicts {counts['contradicted']:,} of {counts['known']:,} labels; "
            f"{found.pairs_left:,} of {found.pairs:,} pairs are left."
        )
    columns = [one.name for one in fields(CleanedCell)]
    rows = [
        [cell_title(name) if name in CELLS else name, *(count_text(getattr(cell, column)) for column in columns)]
        for name, cell in found.cells.items()
    ]
    titles = ["measure", "value", f"{level_text(_confidence(run))} interval", "texts", "left out"]
    people = [
        [score.metric, "not measured" if score.value is None else percent(score.value, 1),
         interval_text(score, in_percent=True), f"{score.num:,}",
         f"{score.unscored:,}"]
        for score in found.people or ()
    ]  # fmt: skip
    tables = [
        FactTable("Pairs by label cell (more helpful over less helpful)", ["cell", *columns], rows),
        FactTable("On the texts that people labelled", titles, people),
    ]
    lines = [f"Warning: {warning}." for warning in found.warnings or ()]
    return _result(run, shown, "Cleaned labels", sentence, lines=lines, tables=tables)


def _judges(run: Run) -> list[str]:
    found = run.record.config.get("judges") or run.record.config.get("judge") or []
    return [_judge(one) for one in (found if isinstance(found, list) else [found])]


def _judge(found: Any) -> str:
    """Return the name of a judge from its part of a config."""
    if not isinstance(found, dict):
        return str(found)
    source = found.get("source") or found.get("model")
    source = model_name(source) if source and Path(source).is_absolute() else source
    at = f" at {found['url']}" if found.get("url") else ""
    return str(found.get("name") or f"{found.get('format', 'a judge')}{f':{source}' if source else ''}{at}")


def _cells(cells: Any) -> FactTable:
    counts = [(cell, cells[cell]) for cell in CELLS if cell in cells] if isinstance(cells, dict) else []
    if not any(count for _, count in counts):
        return FactTable("", [], [])
    return FactTable("Pairs by label cell (more helpful over less helpful)", ["cell", "pairs"],
                     [[cell_title(cell), count_text(count)] for cell, count in counts])  # fmt: skip


def _reasons(reasons: Any) -> FactTable:
    rows = [[reason, count_text(count)] for reason, count in reasons.items()] if isinstance(reasons, dict) else []
    return FactTable("Unscored answers", ["reason", "answers"], rows)


# --------------------------------------------------------------------------------------------------------- judges


def _judge_check(run: Run, shown: str) -> StageResult:
    found = run.load(JudgeCheckFile, "quality.json")
    scores = {score.metric: score for score in found.quality.get("all", ())}
    accuracy, name = scores.get("accuracy"), found.judge.name or "without a name"
    sentence = ""
    if accuracy is not None and accuracy.value is not None:
        sentence = (
            f"The judge {name} agrees with people's labels on {with_interval(accuracy)} of {accuracy.num:,} texts."
        )
    elif accuracy is not None and accuracy.num + accuracy.unscored:
        sentence = f"The judge {name} gave a verdict on none of {accuracy.num + accuracy.unscored:,} texts."
    words = {"sensitivity": "Of the texts that people call unsafe it calls {} unsafe.",
             "specificity": "Of those that people call safe it calls {} safe."}  # fmt: skip
    known = {key: score for key, score in scores.items() if score.value is not None}
    lines = [text.format(with_interval(known[key])) for key, text in words.items() if key in known]
    if wrong := len(run.rows(dict, "mistakes.jsonl")):
        lines.append(f"{wrong:,} texts are judged otherwise than by people; mistakes.jsonl has them, the surest first.")
    lines += [] if found.trust is None else [f"{found.trust.verdict} Rule: {found.trust.rule}."]
    lines += [f"Warning: {warning}." for warning in found.warnings]
    lines += [f"Unscored: {count:,}, {reason}." for reason, count in found.unscored_by_reason.items()]
    lines += [f"Left out: {count:,} rows, {reason}." for reason, count in found.left_out.items()]
    return _result(run, shown, f"The judge {name}", sentence, lines=lines)


def _judge_train(run: Run, shown: str) -> StageResult:
    facts = run.load(_Facts, "run.json")
    if not facts.ranker and not facts.judge and (run.path / "metrics.jsonl").is_file():
        return training_result(run, shown)  # of a classifier, not at its end yet
    kind, found = ("ranker", facts.ranker) if facts.ranker else ("judge", facts.judge)
    texts = found.get("completions") or found.get("pairs")
    sentence = ""
    if texts:
        unit = "pairs" if kind == "ranker" else "labelled answers"
        sentence = f"A {kind} was trained on {count_text(texts)} {unit} to {count_text(found.get('prompts'))} prompts"
        quality = found.get("agreement") if kind == "ranker" else found.get("accuracy")
        if isinstance(quality, float):
            does = "orders {} of the pairs of" if kind == "ranker" else "judges {} of the answers to"
            sentence += f"; it {does.format(percent(quality, 1))} unseen prompts as people do"
        sentence += "."
    titles = {**QUALITY_TITLES, "agreement": "agreement with people's order"}
    rows = [[titles.get(key, key.replace("_", " ")), in_words(value, 4)] for key, value in found.items()]
    return _result(run, shown, f"The trained {kind}", sentence, tables=[FactTable("", ["measure", "value"], rows)])


# --------------------------------------------------------------------------------------- generation, references


def _generate(run: Run, shown: str) -> StageResult:
    facts = run.load(_Facts, "run.json")
    made = facts.completions
    sentence = ""
    if isinstance(made.get("num_completions"), int):
        model = run.setting("model", str) or "a model"
        asked = facts.prompts.get("num_prompts")
        drawn = run.setting("limit", int) or asked
        few = isinstance(asked, int) and isinstance(drawn, int) and drawn < asked
        prompts = f" to {f'{drawn:,} of ' * few}{asked:,} prompts" if isinstance(asked, int) else ""
        sentence = f"{made['num_completions']:,} answers of {model}{prompts}."
    names = {"num_finished": "ended before the token limit", "completion_tokens": "tokens generated"}
    rows = [[names.get(key, key.removeprefix("num_").replace("_", " ")), count_text(value)]
            for key, value in made.items() if value is not None]  # fmt: skip
    so_far = 0 if made else len(run.rows(dict, "completions.partial.jsonl"))
    lines = [f"{so_far:,} answers are made so far."] if so_far else []
    left = facts.prompts.get("left_out")
    rows += [[f"prompts left out: {reason}", count_text(count)] for reason, count in _items(left)]
    table = FactTable("", ["count", "number"], rows)
    return _result(run, shown, "Generated answers", sentence, lines=lines, tables=[table])


def _items(found: Any) -> Iterator[tuple[str, Any]]:
    yield from found.items() if isinstance(found, dict) else ()


def _reference(run: Run, shown: str) -> StageResult:
    found = run.load(_Facts, "run.json").reference_pass
    pairs, computed = found.get("num_pairs"), found.get("num_computed")
    sentence = ""
    if isinstance(pairs, int) and isinstance(computed, int):
        sentence = (
            f"The reference log-probs of {pairs:,} pairs are in the cache; {computed:,} rows were computed now, "
            f"{count_text(found.get('num_reused'))} were there."
        )
    expected = run.load(ForecastFile, FORECAST)
    more: dict[str, Any] = {"lines": forecast_said(expected), "tables": [forecast_facts(expected)]}
    return _result(run, shown, "Reference log-probs", sentence, **more)


# ----------------------------------------------------------------------------------------------------- red-teaming


def _redteam(run: Run, shown: str) -> StageResult:
    found = run.load(RedteamFile, "redteam.json")
    rates = {score.metric: score for score in found.rates.get("all prompts", ())}
    unsafe, model = rates.get("unsafe"), run.setting("model", str) or "the model"
    judges, prompts = _judges(run), found.funnel.get("prompts", 0)
    sentence, lines = "", []
    if unsafe is not None and unsafe.value is not None:
        sentence = (
            f"{with_interval(unsafe)} of {unsafe.num:,} answers of {model} to {prompts:,} prompts are judged unsafe."
        )
    if judges:
        ranker = run.record.config.get("ranker")
        order = f" Helpfulness is ranked by {_judge(ranker)}." if ranker else ""
        lines.append(f"Safety is judged by {listed(judges)}.{order}")
    hit = _unsafe_by_prompt(run)
    if hit:
        share = rate_interval(list(hit.values()), list(hit), confidence=_confidence(run))
        bounds = Score("prompts", share.value, share.low, share.high, share.num)
        lines.append(f"At least one answer is unsafe for {with_interval(bounds)} of {len(hit):,} prompts.")
    rows = [
        [group, RATE_TITLES.get(score.metric, score.metric), percent(score.value, 1),
         interval_text(score, in_percent=True), f"{score.num:,}", f"{score.unscored:,}"]
        for group, scores in found.rates.items()
        for score in scores
        if score.value is not None
    ]  # fmt: skip
    if found.tried and found.temperature is not None:
        lines.append(tried_text(found.temperature, found.tried))
    if found.harmless is not None and (rate := found.harmless.over_refusal) is not None and rate.value is not None:
        needless = (
            f"{with_interval(rate)} of {rate.num:,} answers to {found.harmless.funnel.get('prompts', 0):,} harmless "
            f"prompts are refusals; {found.harmless.funnel.get('pairs', 0):,} pairs for the buffer were made of them."
        )
        lines += [needless] if found.funnel else []
        sentence = sentence if found.funnel else needless
    titles = ["prompts", "rate", "value", f"{level_text(_confidence(run))} interval", "answers", "not measured"]
    tables = [
        *_funnel(found.funnel, list(hit.values()), with_form=measures_form(found.rates)),
        *([] if found.harmless is None else [_harmless(found.harmless.funnel)]),
        FactTable("Rates of the answers; intervals are over prompts", titles, rows),
        _cells(found.cells),
        _reasons(found.unscored_by_reason),
    ]
    return _result(run, shown, f"Red-teaming of {model}", sentence, lines=lines, tables=tables)


def _confidence(run: Run) -> float:
    level = run.setting("confidence", float) or 0.95
    return level if 0 < level < 1 else 0.95


def _unsafe_by_prompt(run: Run) -> dict[str, bool]:
    """Return, for each prompt with a scored answer, whether one of its answers was judged unsafe."""
    hit: dict[str, bool] = {}
    for row in run.rows(VerdictRow, "label/verdicts.jsonl"):
        if row.label != "unscored":
            hit[row.prompt] = hit.get(row.prompt, False) or row.label == "unsafe"
    return hit


def _funnel(funnel: Mapping[str, int], hit: Sequence[bool], *, with_form: bool) -> list[FactTable]:
    """Return the steps from prompts to unsafe answers and from answers to pairs.

    `hit`: for each prompt, whether an answer was judged unsafe; without it that step is left out.
    """
    given = funnel.get
    usable = "scored and well-formed" if with_form else "scored"
    attacks = {
        "prompts": given("prompts"),
        "answers": given("completions"),
        "answers that the judges scored": given("completions", 0) - given("unscored", 0),
        "answers judged unsafe": given("unsafe"),
        "prompts with an unsafe answer": sum(hit) if hit else None,
    }
    pairs = {
        "incoherent answers, which give no pair": given("incoherent"),
        f"answers usable for pairs: {usable}": given("usable"),
        "two different usable answers to one prompt": given("candidates"),
        "of these not ranked by helpfulness": given("unranked"),
        "of these ties in helpfulness": given("ties"),
        "pairs chosen": given("pairs"),
        "prompts with a pair": given("prompts_with_pairs"),
    }
    if not funnel:
        return []
    return [_steps("From prompts to unsafe answers", attacks), _steps("From answers to pairs", pairs)]


def _harmless(funnel: Mapping[str, int]) -> FactTable:
    return _steps(
        "From harmless prompts to pairs of the buffer", {NEEDLESS_STEPS.get(k, k): n for k, n in funnel.items()}
    )


def _steps(title: str, steps: Mapping[str, int | None]) -> FactTable:
    known = {name: count for name, count in steps.items() if count is not None}
    most = max(known.values(), default=0) or 1
    bars = [round(count / most, 4) for count in known.values()]
    return FactTable(title, ["step", "number"], [[name, f"{count:,}"] for name, count in known.items()], bars)


# ---------------------------------------------------------------------------------------------------------- the toy


def _toy(run: Run, shown: str) -> StageResult:
    methods = run.load(_ToyFile, "toy.json").methods
    sentence = ""
    if methods:
        best = max(methods, key=lambda method: method.num_right)
        sentence = (
            f"{best.label} ranks four actions as wanted in {best.num_right} of {len(best.assignments)} assignments "
            "of safety to them."
        )
    line = "Wanted: safe actions first, the more helpful the better; then unsafe ones, the more helpful the worse."
    rows = [
        [method.label, f"{method.num_right} of {len(method.assignments)}", str(method.num_tied),
         "no finite optimum" if method.max_deviation is None else number(method.max_deviation)]
        for method in methods
    ]  # fmt: skip
    places = [outcome.safe for outcome in methods[0].assignments] if methods else []
    orders = {method.label: {outcome.safe: outcome.order for outcome in method.assignments} for method in methods}
    tables = [
        FactTable("Methods", ["method", "right order", "ties", "largest distance from its closed form"], rows),
        FactTable(
            "Order of the actions after training, by assignment (1: safe, 0: unsafe; the most helpful action first)",
            ["assignment", *orders], [[safe, *(by.get(safe, "") for by in orders.values())] for safe in places],
        ),
    ]  # fmt: skip
    return _result(run, shown, "Four actions", sentence, lines=[line] if methods else [], tables=tables)


_MAKERS: dict[str, Callable[[Run, str], StageResult]] = {
    "compare": _worlds,
    "tamper": _tamper,
    "redteam": _redteam,
    "train": training_result,
    "sft": training_result,
    "judge-check": _judge_check,
    "label": _label,
    "clean": _clean,
    "prepare": _prepare,
    "judge-train": _judge_train,
    "generate": _generate,
    "reference": _reference,
    "toy": _toy,
}
