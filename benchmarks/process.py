"""Measurements in processes of their own, and the files that keep them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from resource import struct_rusage
from typing import Any

from benchmarks.machine import describe_machine, software
from bfpo.core.errors import BfpoError, RunError
from bfpo.core.files import write_text_whole

__all__ = [
    "ROOT",
    "in_process",
    "of_dtype",
    "program",
    "read_results",
    "result_file",
    "unpack_sources",
    "whole_process",
    "worker",
    "write_results",
]

ROOT = Path(__file__).resolve().parents[1]
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


def in_process(module: str, values: Mapping[str, Any], *, threads: int, timeout: float = 3600.0) -> dict[str, Any]:
    """Run a worker module in a fresh Python with so many threads and return its measurement.

    Memory peaks belong to a process, and what one trainer leaves behind (caches, allocators, patched classes) must not
    meet the other. Raises `RunError` with the end of the worker's output where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads), "HF_DATASETS_CACHE": folder}
        command = [sys.executable, "-m", module, json.dumps(values), str(out)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=timeout
        )
        if done.returncode != 0 or not out.is_file():
            raise RunError(f"{module} failed with {json.dumps(values)}:\n{(done.stdout + done.stderr)[-3000:]}")
        measured: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return measured


def whole_process(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path = ROOT
) -> tuple[struct_rusage, str]:
    """Run Python with these arguments and return its resource usage and all that it wrote.

    Raises `RunError` with the end of that where it fails.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env={**os.environ, **QUIET, **environment},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    if process.returncode != 0:
        raise RunError(f"python {' '.join(command)} failed:\n{text[-2000:]}")
    return usage, text


def unpack_sources(commit: str, folder: Path) -> None:
    """Write `src` of a commit into a folder; raises `RunError` for a commit that this checkout does not have."""
    command = ["git", "archive", commit, "src"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode != 0:
        raise RunError(
            f"--before: {commit} is not a commit of this checkout ({done.stderr.decode().strip()}); fetch its history "
            "(git fetch --unshallow) or name another commit"
        )
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def of_dtype(name: str, dtype: str) -> str:
    """Return the name of the results of a benchmark in a dtype; float32 has the name alone."""
    return name if dtype == "float32" else f"{name}_{dtype}"


def worker(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Be the worker: read what to measure from the first argument, write what was measured to the second."""
    values, out = sys.argv[1:]
    Path(out).write_text(json.dumps(measure(json.loads(values))), encoding="utf-8")


def program(main: Callable[[], None]) -> None:
    """Run a benchmark's main function; an error raised on purpose is one line and the exit code."""
    try:
        main()
    except BfpoError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None


def result_file(folder: Path, benchmark: str) -> Path:
    """Return the file that keeps a benchmark's results."""
    return folder / f"{benchmark}.json"


def write_results(folder: Path, benchmark: str, *, settings: Mapping[str, Any], runs: list[dict[str, Any]]) -> Path:
    """Write every single measurement with the machine, the versions and the settings; return the file."""
    content = {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "software": software(),
        "settings": dict(settings),
        "runs": runs,
    }
    path = result_file(folder, benchmark)
    read_results(folder, benchmark)  # another file of this name is not replaced
    write_text_whole(path, json.dumps(content, indent=1) + "\n")
    return path


def read_results(folder: Path, benchmark: str) -> dict[str, Any] | None:
    """Return what `write_results` wrote, or `None` where there is nothing; raises `RunError` for a damaged file."""
    path = result_file(folder, benchmark)
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"machine", "software", "settings", "runs"} <= content.keys():
            raise ValueError("not a file of results")
    except ValueError as error:
        raise RunError(
            f"{path}: cannot be read as results ({error}); move it away and run the benchmark again"
        ) from error
    return content
