"""COMMAND `gate`: whether a model meets conditions against its start model, from evaluations that exist."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bfpo.config import GateConfig, load_config
from bfpo.core.console import Outcome, show
from bfpo.core.errors import ConfigError, RunError
from bfpo.core.files import write_text_whole
from bfpo.core.records import as_json
from bfpo.report.gate import GATE, GATE_PAGE, gate_lines, render_gate
from bfpo.suites.evaluations import read_categories, read_evaluation
from bfpo.suites.gate import judge_gate

__all__ = ["run"]


def run(path: Path, against: Path, config: Path | None, settings: Sequence[str], out: Path | None) -> Outcome:
    """Write `gate.json` and `gate.html`; the exit code is 0 for a pass, 3 for a fail, 4 if it cannot be told.

    Raises the errors of the config, of reading the evaluations, and `DataError` for two that cannot be compared;
    `RunError` if the files cannot be written.
    """
    loaded = load_config(GateConfig, config, settings)
    named = None if loaded.worst is None else loaded.worst.categories
    categories = {} if named is None else read_categories(named)
    found = judge_gate(loaded, read_evaluation(path), read_evaluation(against), categories)
    folder = path if out is None else out
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out: {folder} is a file; give a folder")
    values = as_json(found)
    try:
        write_text_whole(folder / GATE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        write_text_whole(folder / GATE_PAGE, render_gate(found))
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written ({error.strerror}); check --out, permissions and free space"
        ) from error
    show("\n".join([*gate_lines(found), f"The page: {folder / GATE_PAGE}"]))
    return Outcome(found.exit_code, values)
