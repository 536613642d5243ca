"""Small mixtures for the tests of `bfpo prepare`: rows, configs and what comes out."""

from __future__ import annotations

import hashlib
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet

from bfpo.config import PrepareConfig
from bfpo.runs.folder import RunFolder
from bfpo.runs.stages import run_stage
from helpers import write_rows


def row(number: int, prompt: str | None = None, **changes: Any) -> dict[str, Any]:
    """Return a pair in our columns; its prompt is like no other's."""
    draw = random.Random(number)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(12)]
    return {
        "id": f"r{number}",
        "prompt": prompt if prompt is not None else f"{number} {' '.join(words)}",
        "chosen": f"yes {number}",
        "rejected": f"no {number}",
        "chosen_is_safe": number % 2 == 0,
        "rejected_is_safe": number % 3 == 0,
        **changes,
    }


def source(path: Path, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Write rows and return the section of the mixture that reads them."""
    return {"name": path.stem, "files": str(write_rows(path, rows)), **changes}


def prepare(
    out: Path, sources: list[dict[str, Any]], *, resume: bool = False, draws: bool = False, **changes: Any
) -> RunFolder:
    """Run the stage in this process, without a look at languages and, as it takes longest, without the figure."""
    settings = {"processes": 1, "language_sample": 0, "splits": {"validation": 0.2, "test": 0.2}, **changes}
    with nullcontext() if draws else patch("bfpo.commands.prepare.draw_data", lambda _: {}):
        return run_stage("prepare", PrepareConfig(sources=sources, **settings), out, resume=resume)


def rows_of(folder: RunFolder | Path, stream: str = "main") -> dict[str, list[dict[str, Any]]]:
    """Return what was written of a stream, by split."""
    path = folder.path if isinstance(folder, RunFolder) else folder
    return {file.stem: pyarrow.parquet.read_table(file).to_pylist() for file in sorted((path / stream).glob("*"))}


def hashes(folder: RunFolder | Path) -> dict[str, str]:
    """Return the SHA-256 of the Parquet files, the manifest, `data.json` and the lists."""
    path = folder.path if isinstance(folder, RunFolder) else folder
    files = [*path.glob("*/*.parquet"), *path.glob("*.jsonl"), path / "manifest.json", path / "data.json"]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
