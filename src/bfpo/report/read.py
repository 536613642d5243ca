"""Reading run folders for a report: unreadable files and values are noted and never raise an error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bfpo.core.console import in_words
from bfpo.core.errors import DataError
from bfpo.core.provenance import RunFile
from bfpo.core.records import load, load_lines
from bfpo.core.schema import Score
from bfpo.data.labels import CELLS
from bfpo.data.records import DataFile, PairStreamFacts
from bfpo.judges.quality import QUALITY_TITLES
from bfpo.judges.records import JudgeCheckFile
from bfpo.report.data import Agreement, DataCard, FactTable, MarginSpread, RunRecord
from bfpo.report.wording import interval_text, percent
from bfpo.scores.people import people_sentence, percent_words, points_words, pools_words, used_words
from bfpo.scores.records import AccuracyRow, ScoresFile
from bfpo.suites.records import SuitesFile

__all__ = [
    "Run",
    "agreement_of",
    "data_card_of",
    "find_runs",
    "margin_spreads",
    "model_name",
    "named_parts",
    "people_tables",
    "record_of",
    "resolve",
    "shown_path",
    "shown_roots",
    "with_own_titles",
]

Record = TypeVar("Record")
Setting = TypeVar("Setting")

# Folders of a run that contain no runs and possibly very many files.
_SKIPPED = frozenset({"checkpoints", "figures", "logs", "model", "reference", "tokens", "tokenizer"})
_STEPS = frozenset({"model", "train", "checkpoints", "scores", "answers", "evaluate", "generate", "policy"})
_MAX_DEPTH = 5
_NUM_BINS = 48
_QUANTILES = (5, 25, 50, 75, 95)


@dataclass(eq=False)
class Run:
    """One run folder: its `run.json`, and `problems`, a list shared by all runs of a report."""

    path: Path
    record: RunFile
    problems: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        """Return the name of the stage, `unknown` if the record has none."""
        return self.record.stage

    def setting(self, key: str, kind: type[Setting]) -> Setting | None:
        """Return a value of the config, `None` if it is missing or of another type."""
        value = self.record.config.get(key)
        return value if isinstance(value, kind) else None

    def load(self, kind: type[Record], name: str) -> Record:
        """Return the record in a file, empty if it is missing; invalid values are left out with a note."""
        return load(kind, self.path / name, self.problems) if (self.path / name).is_file() else kind()

    def rows(self, kind: type[Record], name: str) -> list[Record]:
        """Return the rows of a JSON Lines file, empty if it is missing; invalid rows are skipped with a note."""
        return load_lines(kind, self.path / name, self.problems) if (self.path / name).is_file() else []

    @cached_property
    def scores(self) -> ScoresFile | SuitesFile:
        """Return `scores.json`, of one model or of several over suites."""
        over_suites = "models" in self.load(dict, "scores.json")
        return self.load(SuitesFile, "scores.json") if over_suites else self.load(ScoresFile, "scores.json")


def find_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Return the runs in and below the folders, in the order given, then by path, each once.

    Raises `DataError` for a folder that is missing or that holds no run.
    """
    found: dict[Path, Run] = {}
    problems: list[str] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; pass run folders, as in bfpo report runs/scores runs/bfpo")
        before = len(found)
        runs = list(_walk(folder, problems, 0))
        for run in runs:
            found.setdefault(run.path.resolve(), run)
        if not runs and len(found) == before:
            raise DataError(f"{folder}: holds no run of bfpo (no run.json in it or below it); pass run folders")
    return list(found.values())


def _walk(folder: Path, problems: list[str], depth: int) -> Iterator[Run]:
    record = folder / "run.json"
    try:
        is_run, inside = record.is_file(), sorted(folder.iterdir()) if depth < _MAX_DEPTH else []
    except OSError as error:
        problems.append(f"{folder}: cannot be listed ({error.strerror}); what is in it is not shown")
        return
    if is_run:
        yield Run(folder, load(RunFile, record, problems), problems)
    for item in inside:
        if item.name.startswith(".") or item.is_symlink() or not item.is_dir():
            continue
        # In a demo `model` can also be the run folder of the SFT training.
        if item.name not in _SKIPPED or (item / "run.json").is_file():
            yield from _walk(item, problems, depth + 1)


def resolve(path: str, run: Run) -> Path | None:
    """Return a path of a run's config: as given, or, if the run was moved, by its last parts near the run.

    `None` if no such file exists, or if the file system cannot have one of such a name.
    """
    parts = Path(path).parts
    roots = list(run.path.resolve().parents)[:4]
    starts = range(max(0, len(parts) - 4), len(parts) - 1)
    near = (root / Path(*parts[start:]) for root in roots for start in starts)
    try:
        return next((found for found in (Path(path), *near) if found.exists()), None)
    except OSError:  # such as a name that is too long
        return None


def model_name(path: str) -> str:
    """Return a model's name from its path: the last part that is not a step of a run, such as `bfpo`."""
    named = named_parts(Path(path))
    return named[-1] if named else path


def named_parts(path: Path) -> tuple[str, ...]:
    """Return the parts of a path up to the last one that is not a step of a run; all if every one is a step."""
    parts = [part for part in path.parts if part not in ("/", ".", "..")]
    last = max((n for n, part in enumerate(parts) if not _is_step(part)), default=len(parts) - 1)
    return tuple(parts[: last + 1])


def _is_step(part: str) -> bool:
    return part in _STEPS or part.startswith("checkpoint-")


def shown_path(path: Path, roots: Sequence[Path]) -> str:
    """Return a run's path relative to the given folder, whose name is that of `shown_roots`."""
    names = shown_roots(roots)
    for root in roots:
        if path == root or root in path.parents:
            inner = path.relative_to(root).as_posix()
            return names[root] if inner == "." else f"{names[root]}/{inner}"
    return path.name


def shown_roots(roots: Sequence[Path]) -> dict[Path, str]:
    """Return short, unique names of the given folders.

    A relative path stays as typed. Of an absolute one only the last two parts are shown, or as many as make the names
    unique, so that a page reveals little about the machine.
    """
    found: dict[Path, str] = {}
    for root in dict.fromkeys(roots):
        if not root.is_absolute() and ".." not in root.parts and root.parts:
            found[root] = root.as_posix()
            continue
        parts = root.resolve().parts[1:] if not root.is_absolute() else root.parts[1:]
        ends = [other.resolve().parts for other in roots if other != root]
        length = min(2, len(parts))
        while length < len(parts) and any(end[-length:] == parts[-length:] for end in ends):
            length += 1
        found[root] = "/".join(parts[-length:]) or str(root)
    return found


def margin_spreads(rows: Iterable[AccuracyRow], *, beta: float | None = None) -> list[MarginSpread]:
    """Return the distribution of `beta * margin` in each cell, from the rows of `accuracy.jsonl`.

    `beta` is that of the training; without it the product is as `bfpo evaluate` wrote it. All cells have the same bins;
    the outermost half per cent of all margins on either side falls into the first and last bin.
    """
    by_cell: dict[str, list[tuple[float, float | None]]] = {}
    for row in rows:
        margin = row.beta_margin if beta is None else beta * row.margin
        if math.isfinite(margin) and row.cell in CELLS:
            by_cell.setdefault(row.cell, []).append((margin, row.target))
    if not by_cell:
        return []
    every = np.array([margin for found in by_cell.values() for margin, _ in found])
    targets = [target for found in by_cell.values() for _, target in found if target is not None]
    low, high = (float(value) for value in np.percentile(every, (0.5, 99.5)))
    low, high = min([low, 0.0, *targets]), max([high, 0.0, *targets])
    room = 0.04 * (high - low) or 1.0
    edges = np.linspace(low - room, high + room, _NUM_BINS + 1)
    spreads = []
    for cell in CELLS:
        if cell not in by_cell:
            continue
        margins = np.array([margin for margin, _ in by_cell[cell]])
        aims = {target for _, target in by_cell[cell]}
        counts, _ = np.histogram(np.clip(margins, edges[0], edges[-1]), bins=edges)
        spreads.append(
            MarginSpread(
                cell=cell,
                target=next(iter(aims)) if len(aims) == 1 else None,
                num=len(margins),
                quantiles={
                    f"p{q}": float(value)
                    for q, value in zip(_QUANTILES, np.percentile(margins, _QUANTILES), strict=True)
                },
                low=float(edges[0]),
                high=float(edges[-1]),
                counts=[int(count) for count in counts],
            )
        )
    return spreads


def agreement_of(run: Run, shown: str) -> Agreement | None:
    """Return what `judge-check` or `label` measured about a judge, and on which data; `None` without scores."""
    data = _data_name(run.setting("data", dict) or {})
    scores: Sequence[Score]
    if run.stage != "judge-check":
        scores = run.scores.scores
        return (
            Agreement(f"labels: judges, votes and given labels, {data or shown}", shown, list(scores))
            if scores
            else None
        )
    found = run.load(JudgeCheckFile, "quality.json")
    scores = found.quality.get("all") or next(iter(found.quality.values()), [])
    title = f"{found.judge.name or 'a judge'} against people's labels, {data or shown}"
    level = found.confidence if 0 < found.confidence < 1 else 0.95
    if not scores:
        return None
    return Agreement(title, shown, list(scores), found.judge.name, level, found.calibration, _by_kind(found))


def people_tables(run: Run, shown: str) -> list[FactTable]:
    """Return what people's labels of a run's answers gave, beside the judge's own rates; empty without labels."""
    found = run.scores.people
    if found is None:
        return []
    judged = {(getattr(s, "suite", ""), getattr(s, "model", ""), s.metric): s for s in run.scores.scores}
    rows, every = [], "all" if found.pools else ""
    for rate in found.rates:
        alone = judged.get((rate.suite, rate.model if rate.suite else "", rate.metric))
        known = alone is not None and alone.value is not None
        judge = f"{percent(alone.value or 0.0)} ({interval_text(alone, in_percent=True)})" if alone and known else ""
        people = percent_words(rate.people, rate.people_low, rate.people_high)
        judge = judge or ("not measured" if rate.suite or not found.pools else "")  # it is scored by suite
        rows.append([rate.model, rate.suite or every, rate.title, people_sentence(rate), people, judge])
    tables = [
        FactTable(
            f"Rates, {shown}", ["model", "suite", "metric", "people + judge", "people alone", "judge alone"], rows
        )
    ]
    differences = [
        [f"{row.first} - {row.second}", row.suite or every, row.title, points_words(row.difference, row.low, row.high),
         points_words(row.people, row.people_low, row.people_high), used_words(row)]
        for row in found.differences
    ]  # fmt: skip
    heads = ["models", "suite", "metric", "people + judge, points", "people alone", "used"]
    tables.append(FactTable(f"Paired differences, {shown}", heads, differences))
    pools = [[pools_words({kind: suites})] for kind, suites in (found.pools or {}).items()]
    tables.append(FactTable(f"All suites, {shown}", ["prompts"], pools))
    tables.append(FactTable(f"No rate, {shown}", ["of"], [[one] for one in found.left_out or ()]))
    return [table for table in tables if table.rows]


def _by_kind(found: JudgeCheckFile) -> FactTable | None:
    """Return the main measures for each kind of text; `None` if there is only one kind."""
    kinds = {kind: {score.metric: score for score in given} for kind, given in found.quality.items() if kind != "all"}
    metrics = ("accuracy", "kappa", "roc_auc")

    def cell(score: Score | None) -> str:
        return "not measured" if score is None or score.value is None else f"{score.value:.3f} ({interval_text(score)})"

    rows = [
        [kind, f"{max((score.num + score.unscored for score in by.values()), default=0):,}",
         *(cell(by.get(metric)) for metric in metrics)]
        for kind, by in kinds.items()
    ]  # fmt: skip
    return (
        FactTable("By kind of text", ["kind", "texts", *(QUALITY_TITLES[metric] for metric in metrics)], rows)
        if rows
        else None
    )


def _data_name(data: dict[str, Any]) -> str:
    """Return the file names of a config's `data`, or its source; empty without both."""
    files = data.get("files")
    names = [Path(file).name for file in files if isinstance(file, str)] if isinstance(files, list) else []
    if len(names) > 2:
        return f"{names[0]} and {len(names) - 1} more files"
    return " and ".join(names) or str(data.get("source") or "")


def with_own_titles(found: Sequence[Agreement]) -> list[Agreement]:
    """Return the tables with unique titles: equal ones are followed by the run."""
    titles = [one.title for one in found]
    return [replace(one, title=f"{one.title} ({one.run})") if titles.count(one.title) > 1 else one for one in found]


def data_card_of(run: Run, shown: str) -> DataCard | None:
    """Return the data card of `prepare`; `None` without one."""
    data = run.load(DataFile, "data.json")
    if not data.streams:
        return None
    cells: dict[str, dict[str, int]] = {}
    facts: dict[str, Any] = {}
    for name, stream in data.streams.items():
        if isinstance(stream, PairStreamFacts):
            cells |= {f"{name} {split}": counts for split, counts in stream.cells.items() if any(counts.values())}
            facts[f"{name}: mean safety of all completions (E_safe)"] = stream.e_safe
            conflicts = f"{name}: share of pairs whose more helpful completion is unsafe, the other safe"
            facts[conflicts] = None if stream.conflict_rate is None else percent(stream.conflict_rate, 1)
        facts[f"{name}: languages, as guessed"] = stream.languages
    facts |= {f"near-duplicates: {name.replace('_', ' ')}": count for name, count in data.near_duplicates.items()}
    facts["rows that repeat another"] = data.duplicates
    for name, hits in data.decontamination.items():
        facts[f"rows removed because they ask a prompt of {name}"] = (
            f"{hits.rows:,} (prompts looked for: {hits.prompts:,})"
        )
    facts["rows with a completion that is labelled both safe and unsafe"] = data.contradictory_rows
    keys = ("name", "stream", "rows", "rejected", "licence", "hub_id", "revision")  # the columns of the page's table
    sources = [{key: getattr(source, key) for key in keys} for source in data.sources]
    return DataCard(shown, sources, cells, {key: value for key, value in facts.items() if value}, data.warnings)


def record_of(run: Run, roots: Sequence[Path]) -> RunRecord:
    """Return a run as the page lists it; `tokens` are the generated ones, if it counted them."""
    record = run.record
    tokens = record.completions.get("completion_tokens")
    return RunRecord(
        path=shown_path(run.path, roots),
        stage=run.stage,
        status=record.status or "unknown",
        seconds=record.seconds,
        tokens=tokens if isinstance(tokens, int) else None,
        seeds=", ".join(dict.fromkeys(map(in_words, record.seeds.values()))),
        error=record.error,
        whole=run.path.as_posix(),
        joules=record.gpu_joules,
    )
