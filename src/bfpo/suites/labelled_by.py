"""Who labelled what a model was trained on, as far as the run folders behind it say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["labelling_judges"]

_LEVELS = 4  # folders above a file in which its run may lie
_DEPTH = 8  # runs behind runs


def labelling_judges(model: str) -> list[dict[str, Any]]:
    """Return the judges (their settings) of the labelling runs behind a model's training data, each once.

    Follows `run.json` from the model's run to the runs that its data are from. What is not there is not guessed: an
    empty list says that nothing is known.
    """
    found: dict[str, dict[str, Any]] = {}
    _follow(Path(model), found, set(), _DEPTH)
    return list(found.values())


def _follow(path: Path, found: dict[str, dict[str, Any]], seen: set[Path], depth: int) -> None:
    record_file = next(
        (
            folder / "run.json"
            for folder in [path, *path.absolute().parents][:_LEVELS]
            if (folder / "run.json").is_file()
        ),
        None,
    )
    if record_file is None or record_file in seen or depth == 0:
        return
    seen.add(record_file)
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        judges = record.get("config", {}).get("judges", [])
        inputs = [Path(file) for files in record.get("data", {}).values() for file in files]
    except (OSError, ValueError, AttributeError):
        return
    for judge in judges if isinstance(judges, list) else []:
        found.setdefault(json.dumps(judge, sort_keys=True), judge)
    start = record.get("config", {}).get("model")
    for file in [*inputs, *([Path(start)] if isinstance(start, str) and Path(start).is_dir() else [])]:
        _follow(file, found, seen, depth - 1)
