"""BENCHMARK: everything that needs a GPU, in one command that ends by itself.

    python -m benchmarks.gpu --budget 540 --out DIR     # on a machine with one GPU and no network
    python -m benchmarks.gpu --small --out DIR          # tiny sizes, on a CPU too; its numbers mean nothing
    python -m benchmarks.gpu --wheels DIR               # the wheels that must be carried to such a machine

Each part is a process of its own, the most valuable first; one that fails, runs out of memory or lacks a package is a
row that says so. `gpu.json` and `gpu.md` are written after every part.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import Part, plan, profile_part
from benchmarks.gpu.table import gpu_tables
from benchmarks.gpu.wheels import show_wheels
from benchmarks.options import thread_count
from benchmarks.process import in_process, program, read_results, write_results
from benchmarks.tables import machine_line, markdown
from bfpo.core.console import show
from bfpo.core.errors import BfpoError, SettingError
from bfpo.core.files import write_text_whole

_KEPT = 5.0  # seconds of the budget for the last files


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts until the budget is spent, write both files, and show the tables."""
    options = parse(arguments)
    if options.wheels is not None:
        show_wheels(options.wheels, options.have, options.python)
        return
    stop = time.monotonic() + options.budget - _KEPT
    settings = {"small": options.small, "budget_s": options.budget}
    parts, runs = _chosen(options), []
    for number, part in enumerate(parts, 1):
        started = time.monotonic()
        run = run_part(part, stop - started, threads=options.threads)
        run["seconds"] = round(time.monotonic() - started, 1)
        runs.append(run)
        sys.stderr.write(f"{number}/{len(parts)} {part.group} {part.title}: {run['status']}, {run['seconds']:.0f} s\n")
        _write(options.out, settings, runs)
        kernels = _profile(part, runs) if not options.parts or "kernels" in options.parts else None
        if kernels is not None:
            parts.append(kernels) if options.small else parts.insert(number, kernels)
    results = read_results(options.out, "gpu")
    assert results is not None
    show((options.out / "gpu.md").read_text(encoding="utf-8"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.gpu",
        fromfile_prefix_chars="@",
    )
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which nothing runs any more")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--small", action="store_true", help="tiny sizes in float32, once each")
    parser.add_argument("--parts", nargs="+", default=[], metavar="KIND", help="only these kinds of parts")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="download the wheels to carry, with sizes, and end")
    parser.add_argument(
        "--have", nargs="+", default=[], metavar="NAME", help="of --wheels: packages that are there; @FILE: one a line"
    )
    parser.add_argument("--python", default="3.12", help="of --wheels: Python of that machine (3.12)")
    options = parser.parse_args(arguments)
    kinds = {part.kind for part in plan(small=True, cuda=False)} | {"kernels"}
    if unknown := sorted(set(options.parts) - kinds):
        parser.error(f"--parts: got {', '.join(unknown)}; allowed: {', '.join(sorted(kinds))}")
    if options.budget <= _KEPT:
        parser.error(f"--budget: got {options.budget:g}; allowed: more than {_KEPT:g} seconds")
    options.threads = thread_count(0)
    return options


def _chosen(options: argparse.Namespace) -> list[Part]:
    cuda = _has_gpu()
    if not cuda and not options.small:
        raise SettingError("no GPU is visible to torch; add --small for the tiny form, which runs on a CPU")
    every = plan(small=options.small, cuda=cuda)
    return [part for part in every if not options.parts or part.kind in options.parts]


def _has_gpu() -> bool:
    """Return whether torch sees a GPU; asked in a process of its own, so that this one holds none of its memory."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def run_part(part: Part, left: float, *, threads: int) -> dict[str, Any]:
    """Return the row of a part: what it measured, or in `status` why it did not."""
    row: dict[str, Any] = {"kind": part.kind, "group": part.group, "title": part.title, "values": part.values}
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {**row, "status": f"not measured: {', '.join(missing)} not installed"}
    if left < part.least:
        return {**row, "status": f"not started: {max(0.0, left):.0f} s of the budget left"}
    limit = min(part.most, left)
    try:
        return {**row, "status": "measured", **in_process(part.module, part.values, threads=threads, timeout=limit)}
    except subprocess.TimeoutExpired:
        return {**row, "status": f"stopped after {limit:.0f} s"}
    except (BfpoError, OSError, ValueError) as error:
        return {**row, "status": f"failed: {_cause(str(error))}", "output": str(error)[-3000:]}


def _cause(text: str) -> str:
    """Return the line of a worker's output that names the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0] or "OutOfMemory" in line]
    return (named or lines or ["no output"])[-1][:300]


def _profile(part: Part, runs: Sequence[dict[str, Any]]) -> Part | None:
    """Return the profile to be made after this part: of our fastest run of the first group, once both forms ran."""
    first = next((run["group"] for run in runs if run["kind"] == "training"), None)
    ours = [
        run
        for run in runs
        if run["kind"] == "training" and run["group"] == first and run["values"]["trainer"] == "bfpo"
    ]
    measured = [run for run in ours if run["status"] == "measured"]
    done = any(run["kind"] == "kernels" for run in runs)
    if done or part.kind != "training" or part.group != first or len(ours) != 2 or not measured:
        return None
    if part.values["trainer"] != "bfpo":
        return None
    best = max(measured, key=lambda run: float(run["loop_tokens"] / run["loop_seconds"]))
    return profile_part(dataclasses.replace(part, title=best["title"], values=best["values"]))


def _write(folder: Path, settings: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = write_results(folder, "gpu", settings=settings, runs=runs)
    results = read_results(folder, "gpu")
    assert results is not None
    text = "\n".join([*map(markdown, gpu_tables(results)), f"*{machine_line(results)}*\n"])
    write_text_whole(path.with_suffix(".md"), text)


if __name__ == "__main__":
    program(main)
