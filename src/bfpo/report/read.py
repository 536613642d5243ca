"""Run folders as a report finds them: whatever can be read is kept, and what cannot is said, never a failure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bfpo.core.errors import DataError

__all__ = ["Run", "find_runs", "model_name", "resolve", "shown_path", "shown_roots"]

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
