"""BENCHMARK: what comes before the first step: start-up, reading, tokenizing, preparing and the reference pass.

    python -m benchmarks.rampup [--before COMMIT] [--quick]

Start-up, and the resampling behind intervals, as whole processes with the sources of an earlier commit and with those
of this checkout, in random order, in CPU seconds. Then synthetic pairs of 1,000 rows and more in a JSON-lines file;
time and memory of each part per number of rows, each size in a process of its own. The reference pass runs a tiny model
on fewer rows: how it grows with them is the point there.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import add_common_options, integers, thread_count
from benchmarks.process import ROOT, in_process, program, unpack_sources, whole_process, write_results
from benchmarks.rampup_parts import dry_run_files
from benchmarks.tables import SIDES, show_tables

BEFORE = "0c9cfb2"
"""The commit from which `bfpo train --dry-run` and intervals were made quicker."""
PARTS = ("read", "read and tokenize", "prepare", "reference pass")
_RESAMPLES = """
try:
    from bfpo.stats.resampling import bootstrap_weights
except ImportError:  # where earlier commits have it
    from bfpo.evaluation.stats.resampling import bootstrap_weights
for _ in bootstrap_weights(range(2000), 20_000):
    pass
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the results and show the table."""
    options = parse(arguments)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        unpack_sources(options.before, Path(folder))
        sources = dict(zip(SIDES, (Path(folder) / "src", ROOT / "src"), strict=True))
        for repeat in range(options.repeats):
            found = startup(sources, options.threads, repeat)
            runs += [{"kind": "startup", "repeat": repeat, **run} for run in found]
    for part in PARTS:
        for rows in options.reference_rows if part == "reference pass" else options.rows:
            sys.stderr.write(f"{part}: {rows} rows\n")
            values = {"part": part, "rows": rows}
            measured = in_process("benchmarks.rampup_parts", values, threads=options.threads, timeout=24 * 3600.0)
            runs.append({"kind": "part", **values, **measured})
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "quick")}
    settings["load"] = os.getloadavg()[2]
    write_results(options.out, "rampup", settings=settings, runs=runs)
    show_tables(options.out, ["rampup"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, those of the smoke form put in where it is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_common_options(parser)
    parser.add_argument("--rows", type=integers, default=[1000, 10_000, 100_000], help="up to 1000000, for example")
    parser.add_argument("--reference-rows", type=integers, default=[1000, 10_000])
    parser.add_argument("--repeats", type=int, default=5, help="of the start-up")
    parser.add_argument("--before", default=BEFORE, help="the commit to compare this checkout's start-up with")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.reference_rows, options.repeats = [100, 200], [50], 1
    options.threads = thread_count(options.threads)
    return options


def startup(sources: Mapping[str, Path], threads: int, repeat: int) -> list[dict[str, Any]]:
    """Return the CPU seconds of whole processes on both sides: Python alone, start-up, a dry run, resampling."""
    with tempfile.TemporaryDirectory() as folder:
        config = dry_run_files(Path(folder))
        commands = {
            "python alone": ["-c", "pass"],
            "import bfpo": ["-c", "import bfpo"],
            "bfpo --help": ["-m", "bfpo", "--help"],
            "bfpo train --dry-run": ["-m", "bfpo", "train", "--config", str(config), "--dry-run"],
            "20,000 resamples of 2,000 prompts": ["-c", _RESAMPLES],
        }
        return [
            {"command": name, "side": side, "cpu_seconds": _cpu_seconds(command, sources[side], threads)}
            for name, command in commands.items()
            for side in random.Random(repeat).sample(SIDES, 2)
        ]


def _cpu_seconds(command: Sequence[str], source: Path, threads: int) -> float:
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(source)}
    usage, _ = whole_process(command, environment, source)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    program(main)
