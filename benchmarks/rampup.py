"""BENCHMARK: what comes before the first step: start-up, reading, tokenizing, preparing and the reference pass.

    python -m benchmarks.rampup [--quick]

Synthetic pairs of 1,000 rows and more in a JSON-lines file; time and memory of each part per number of rows, each size
in a process of its own. The reference pass runs a tiny model on fewer rows: how it grows with them is the point there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import add_common_options, integers, thread_count
from benchmarks.process import QUIET, ROOT, in_process, program, write_results
from benchmarks.rampup_parts import dry_run_files
from benchmarks.tables import show_tables
from bfpo.core.errors import RunError

PARTS = ("read", "read and tokenize", "prepare", "reference pass")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the results and show the table."""
    options = parse(arguments)
    runs: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        runs += [{"kind": "startup", "repeat": repeat, **found} for found in startup(options.threads)]
    for part in PARTS:
        for rows in options.reference_rows if part == "reference pass" else options.rows:
            sys.stderr.write(f"{part}: {rows} rows\n")
            values = {"part": part, "rows": rows}
            measured = in_process("benchmarks.rampup_parts", values, threads=options.threads, timeout=24 * 3600.0)
            runs.append({"kind": "part", **values, **measured})
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "quick")}
    write_results(options.out, "rampup", settings=settings, runs=runs)
    show_tables(options.out, ["rampup"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, those of the smoke form put in where it is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_common_options(parser)
    parser.add_argument("--rows", type=integers, default=[1000, 10_000, 100_000], help="up to 1000000, for example")
    parser.add_argument("--reference-rows", type=integers, default=[1000, 10_000])
    parser.add_argument("--repeats", type=int, default=3, help="of the start-up")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.reference_rows, options.repeats = [100, 200], [50], 1
    options.threads = thread_count(options.threads)
    return options


def startup(threads: int) -> list[dict[str, Any]]:
    """Return the seconds that Python alone, the import, `--help` and a dry run of training take, as whole processes."""
    with tempfile.TemporaryDirectory() as folder:
        config = dry_run_files(Path(folder))
        commands = {
            "python alone": ["-c", "pass"],
            "import bfpo": ["-c", "import bfpo"],
            "bfpo --help": ["-m", "bfpo", "--help"],
            "bfpo train --dry-run": ["-m", "bfpo", "train", "--config", str(config), "--dry-run"],
        }
        return [{"command": name, "seconds": _seconds(command, threads)} for name, command in commands.items()]


def _seconds(command: Sequence[str], threads: int) -> float:
    environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise RunError(f"python {' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return seconds


if __name__ == "__main__":
    program(main)
