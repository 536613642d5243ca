"""Options that the benchmarks share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.process import ROOT

__all__ = ["RESULTS", "add_common_options", "integers", "thread_count"]

RESULTS = ROOT / "benchmarks" / "results"


def add_common_options(parser: argparse.ArgumentParser, *, threads: bool = True) -> None:
    """Add `--out`, `--quick` and, unless it is not needed, `--threads`."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    if threads:
        parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = the cores this process may use")
    parser.add_argument("--quick", action="store_true", help="smoke form: tiny sizes; its numbers mean nothing")


def integers(text: str) -> list[int]:
    """Return whole numbers from a list with commas."""
    return [int(part) for part in text.split(",")]


def thread_count(wanted: int) -> int:
    """Return the number of threads, that of the usable cores for 0."""
    if wanted > 0:
        return wanted
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
