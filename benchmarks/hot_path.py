"""BENCHMARK: parts of a training step before and after a commit, in one run.

    python -m benchmarks.hot_path [--before COMMIT] [--quick]

One process with the sources of the earlier commit and one with those of this checkout; every part is measured in both,
one right after the other in random order, in CPU seconds, which other jobs disturb less than time on the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.hot_path_parts import CASES
from benchmarks.options import add_common_options, thread_count
from benchmarks.process import QUIET, ROOT, program, unpack_sources, write_results
from benchmarks.tables import SIDES, show_tables
from bfpo.core.errors import RunError

BEFORE = "9c8c6bb5"
"""The last commit before attention without repeated keys, the head that recomputes and calls for many texts."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the results and show the tables."""
    options = parse(arguments)
    runs: list[dict[str, Any]] = []
    with ExitStack() as stack:
        old = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        unpack_sources(options.before, old)
        workers = {
            side: stack.enter_context(Worker(source, options))
            for side, source in zip(SIDES, (old / "src", ROOT / "src"), strict=True)
        }
        order = random.Random(0)
        for repeat in range(options.repeats):
            for case in CASES:
                for side in order.sample(SIDES, 2):
                    measured = workers[side].ask(case=case)
                    runs.append({"kind": "time", "case": case, "side": side, "repeat": repeat, **measured})
            sys.stderr.write(f"repeat {repeat + 1}/{options.repeats}, load {os.getloadavg()[0]:.1f}\n")
        exact = workers["after"].ask(dtype="float64")["logps"]
        for side in SIDES:
            for dtype in ("float32", "bfloat16"):
                found = workers[side].ask(dtype=dtype)["logps"]
                errors = [abs(one - other) for one, other in zip(found, exact, strict=True)]
                runs.append({"kind": "error", "side": side, "dtype": dtype, "errors": errors})
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "quick")}
    settings["load"] = os.getloadavg()[2]
    write_results(options.out, "hot_path", settings=settings, runs=runs)
    show_tables(options.out, ["hot_path"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, those of the smoke form put in where it is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_common_options(parser)
    parser.add_argument("--repeats", type=int, default=7, help="measurements of every part on both sides")
    parser.add_argument("--before", default=BEFORE, help="the commit to compare this checkout with")
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeats = 1
    options.threads = thread_count(options.threads)
    return options


class Worker:
    """A process of `benchmarks.hot_path_parts` with the sources of one side."""

    def __init__(self, source: Path, options: argparse.Namespace) -> None:
        settings = json.dumps({"threads": options.threads, "quick": options.quick})
        environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": str(source)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.hot_path_parts", settings],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def ask(self, **what: str) -> dict[str, Any]:
        """Return the worker's answer; raises `RunError` if it has ended, after what it wrote to standard error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("measured "):
                answer: dict[str, Any] = json.loads(line.removeprefix("measured "))
                return answer
        raise RunError(f"benchmarks.hot_path_parts ended at {json.dumps(what)}; its error is above")


if __name__ == "__main__":
    program(main)
