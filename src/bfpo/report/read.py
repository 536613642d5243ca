"""Run folders as a report finds them: whatever can be read is kept, and what cannot is said, never a failure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bfpo.core.errors import BfpoError, DataError
from bfpo.core.schema import Score, Verdict
from bfpo.data.labels import CELLS
from bfpo.report.data import Agreement, DataCard, MarginSpread, RunRecord

__all__ = [
    "Run",
    "agreement_of",
    "data_card_of",
    "find_runs",
    "margin_spreads",
    "model_name",
    "number",
    "object_of",
    "record_of",
    "resolve",
    "scores_of",
    "shown_path",
    "shown_roots",
    "text",
    "verdict_of",
    "with_own_titles",
]

# Folders of a run that hold no run of their own and may hold very many files.
_PASSED_OVER = frozenset({"checkpoints", "figures", "logs", "model", "reference", "tokens", "tokenizer"})
_STEPS = frozenset({"model", "train", "checkpoints", "scores", "answers", "evaluate", "generate", "policy"})
_MAX_DEPTH = 5


@dataclass(eq=False)
class Run:
    """One run folder: its record, and `problems`, a list that all runs of a report share."""

    path: Path
    record: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        """Return the name of the stage, `unknown` where the record has none."""
        return str(self.record.get("stage") or "unknown")

    @property
    def config(self) -> dict[str, Any]:
        """Return the resolved config, empty where there is none."""
        config = self.record.get("config")
        return config if isinstance(config, dict) else {}

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON object that the run wrote; empty where it is missing or, with a note, cannot be read."""
        return _read_object(self.path / name, self.problems) if (self.path / name).is_file() else {}

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a file of JSON lines; what cannot be read is passed over and counted in a note."""
        return read_rows(self.path / name, self.problems)


def read_rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, none where it is missing; what is broken is counted in `problems`."""
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
        return []
    rows, broken = [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            broken += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken += 1
    if broken:
        problems.append(f"{path}: {broken} lines are no JSON object and were passed over")
    return rows


def find_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Return the runs in the folders and below them, in the order given, then by path; none twice.

    Raises `DataError` for a folder that is missing or that holds no run.
    """
    found: dict[Path, Run] = {}
    problems: list[str] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; give run folders, as in bfpo report runs/scores runs/bfpo")
        before = len(found)
        runs = list(_walk(folder, problems, 0))
        for run in runs:
            found.setdefault(run.path.resolve(), run)
        if not runs and len(found) == before:
            raise DataError(f"{folder}: holds no run of bfpo (no run.json in it or below it); give run folders")
    return list(found.values())


def _walk(folder: Path, problems: list[str], depth: int) -> Iterator[Run]:
    record = folder / "run.json"
    if record.is_file():
        yield Run(folder, _read_object(record, problems), problems)
    if depth < _MAX_DEPTH:
        for item in sorted(folder.iterdir()):
            # `model` is what a training writes, and in a demo also the folder of the training of the start model.
            inner = item.name in _PASSED_OVER and not (item / "run.json").is_file()
            if item.is_dir() and not item.is_symlink() and not inner and not item.name.startswith("."):
                yield from _walk(item, problems, depth + 1)


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: cannot be read ({type(error).__name__})")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path}: is no JSON object")
        return {}
    return value


def resolve(path: str, run: Run) -> Path | None:
    """Return the file that a run's config names: as it stands, or where its last parts lie around the run.

    A run that was moved keeps the paths of its first place; `None` where nothing fits.
    """
    if Path(path).exists():
        return Path(path)
    parts = Path(path).parts
    for root in list(run.path.resolve().parents)[:4]:
        for start in range(max(0, len(parts) - 4), len(parts)):
            if (root / Path(*parts[start:])).exists() and len(parts) - start > 1:
                return root / Path(*parts[start:])
    return None


def model_name(path: str) -> str:
    """Return what people call a model by its path: the last part that is no step of a run, such as `bfpo`."""
    parts = [part for part in Path(path).parts if part not in ("/", ".", "..")]
    named = [part for part in parts if part not in _STEPS and not part.startswith("checkpoint-")]
    return (named or parts or [path])[-1]


def shown_path(path: Path, roots: Sequence[Path]) -> str:
    """Return a run's path as people know it: below the folder that was given, which is as `shown_roots` has it."""
    names = shown_roots(roots)
    for root in roots:
        if path == root or root in path.parents:
            inner = path.relative_to(root).as_posix()
            return names[root] if inner == "." else f"{names[root]}/{inner}"
    return path.name


def shown_roots(roots: Sequence[Path]) -> dict[Path, str]:
    """Return short names of the folders that were given, no two alike.

    A relative path is what was typed and stays whole. Of any other the last two parts are shown, or as many as it takes
    to tell the folders apart, so that a page tells at a glance little of the machine around it.
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


NUM_BINS = 48
_QUANTILES = (5, 25, 50, 75, 95)
_VERDICT_FLAGS = ("well_formed", "on_topic", "refused", "helpful_and_safe")


def number(value: Any) -> float | None:
    """Return a finite number, `None` for anything else (a truth value is no number)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def text(value: Any) -> str:
    """Return text as it is, and nothing for what is no text."""
    return value if isinstance(value, str) else ""


def object_of(value: Any) -> dict[str, Any]:
    """Return a JSON object as it is, and an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def scores_of(rows: Any) -> list[Score]:
    """Return the scores among rows; a row without the name of a metric is none."""
    found = []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(row.get("metric"), str):
            extra = object_of(row.get("extra"))
            found.append(
                Score(
                    metric=row["metric"],
                    value=number(row.get("value")),
                    low=number(row.get("low")),
                    high=number(row.get("high")),
                    num=int(number(row.get("num")) or 0),
                    unscored=int(number(row.get("unscored")) or 0),
                    higher_is_better=row.get("higher_is_better") is not False,
                    extra={str(key): value for key, item in extra.items() if (value := number(item)) is not None},
                )
            )
    return found


def verdict_of(row: Mapping[str, Any]) -> Verdict | None:
    """Return the verdict that a judge's row holds, from its fields alone; `None` where it is none."""
    flags: dict[str, Any] = {name: row[name] for name in _VERDICT_FLAGS if isinstance(row.get(name), bool)}
    try:
        return Verdict(
            completion_id=text(row.get("completion_id")),
            judge=text(row.get("judge")),
            label=row.get("label"),  # type: ignore[arg-type]  # checked by the class
            helpful=number(row.get("helpful")),
            p_safe=number(row.get("p_safe")),
            reason=text(row.get("reason")),
            **flags,
        )
    except (BfpoError, TypeError):
        return None


def margin_spreads(rows: Iterable[Mapping[str, Any]], *, beta: float | None = None) -> list[MarginSpread]:
    """Return how `beta * margin` spreads in each cell that the rows of `accuracy.jsonl` hold.

    `beta` is the training's own; without it the product is as `bfpo evaluate` wrote it.

    The bins of all cells are the same, so that a figure may lay one over another; the outermost per cent of all margins
    on either side falls into the first and last bin.
    """
    by_cell: dict[str, list[tuple[float, float | None]]] = {}
    for row in rows:
        nats = number(row.get("margin"))
        margin = number(row.get("beta_margin")) if beta is None or nats is None else beta * nats
        if margin is not None and row.get("cell") in CELLS:
            by_cell.setdefault(row["cell"], []).append((margin, number(row.get("target"))))
    if not by_cell:
        return []
    every = np.array([margin for found in by_cell.values() for margin, _ in found])
    targets = [target for found in by_cell.values() for _, target in found if target is not None]
    low, high = (float(value) for value in np.percentile(every, (0.5, 99.5)))
    low, high = min([low, 0.0, *targets]), max([high, 0.0, *targets])
    room = 0.04 * (high - low) or 1.0
    edges = np.linspace(low - room, high + room, NUM_BINS + 1)
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
    """Return what `judge-check` or `label` measured about a judge, and on which data; `None` where nothing was."""
    data = _data_name(object_of(run.config.get("data")))
    if run.stage == "judge-check":
        quality = run.json("quality.json")
        judge, groups = object_of(quality.get("judge")), object_of(quality.get("quality"))
        scores = scores_of(groups.get("all") or next(iter(groups.values()), []))
        title = f"{text(judge.get('name')) or 'a judge'} against people's labels"
    else:
        scores = scores_of(run.json("scores.json").get("scores"))
        title = "labels: judges, votes and given labels"
    return Agreement(f"{title}, {data or shown}", shown, scores) if scores else None


def _data_name(data: dict[str, Any]) -> str:
    """Return the file names of a config's `data`, or its source; nothing where it names neither."""
    files = data.get("files")
    names = [Path(file).name for file in files if isinstance(file, str)] if isinstance(files, list) else []
    if len(names) > 2:
        return f"{names[0]} and {len(names) - 1} more files"
    return " and ".join(names) or text(data.get("source"))


def with_own_titles(found: Sequence[Agreement]) -> list[Agreement]:
    """Return the tables with titles no two of which are alike: where they are, the run follows."""
    titles = [one.title for one in found]
    return [replace(one, title=f"{one.title} ({one.run})") if titles.count(one.title) > 1 else one for one in found]


def data_card_of(run: Run, shown: str) -> DataCard | None:
    """Return the data card of `prepare`; `None` where there is none."""
    data = run.json("data.json")
    streams = data.get("streams")
    if not isinstance(streams, dict):
        return None
    cells: dict[str, dict[str, int]] = {}
    facts: dict[str, Any] = {}
    for name, stream in streams.items():
        stream = object_of(stream)
        for split, counts in object_of(stream.get("cells")).items():
            known = {cell: int(number(count) or 0) for cell, count in object_of(counts).items()}
            if any(known.values()):
                cells[f"{name} {split}"] = known
        if (share := number(stream.get("e_safe"))) is not None:
            facts[f"{name}: mean safety of all completions (E_safe)"] = share
        if (rate := number(stream.get("conflict_rate"))) is not None:
            facts[f"{name}: share of pairs whose more helpful completion is unsafe, the other safe"] = rate
        if stream.get("languages"):
            facts[f"{name}: languages, as guessed"] = stream["languages"]
    near = object_of(data.get("near_duplicates"))
    facts |= {f"near-duplicates: {name.replace('_', ' ')}": count for name, count in near.items()}
    facts["rows that repeat another"] = data.get("duplicates")
    facts["removed or counted by decontamination"] = {
        name: len(found) if isinstance(found, (list, dict)) else found
        for name, found in object_of(data.get("decontamination")).items()
    }
    sources = [
        {key: source.get(key) for key in ("name", "stream", "rows", "rejected", "licence", "hub_id", "revision")}
        for source in data.get("sources") or []
        if isinstance(source, dict)
    ]
    warnings = [text(item) for item in data.get("warnings") or []]
    return DataCard(shown, sources, cells, {key: value for key, value in facts.items() if value}, warnings)


def record_of(run: Run, roots: Sequence[Path]) -> RunRecord:
    """Return a run as the page lists it; tokens are those that it generated or trained on, where it counted them."""
    tokens = number(object_of(run.record.get("completions")).get("completion_tokens"))
    return RunRecord(
        path=shown_path(run.path, roots),
        stage=run.stage,
        status=text(run.record.get("status")) or "unknown",
        seconds=number(run.record.get("seconds")),
        tokens=None if tokens is None else int(tokens),
        seeds=", ".join(map(str, dict.fromkeys(object_of(run.record.get("seeds")).values()))),
        error=text(run.record.get("error")),
        whole=run.path.as_posix(),
        joules=number(run.record.get("gpu_joules")),
    )
