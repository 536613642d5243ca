"""From `benchmarks/results/*.json` to the tables and the figure of `docs/performance.md`.

    python -m benchmarks.report

What stands between the two marker lines of the page is replaced, the prose around it is kept.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.balance import balance_tables
from benchmarks.figure import SALT, performance_figure
from benchmarks.gpu.table import gpu_tables
from benchmarks.options import RESULTS
from benchmarks.process import ROOT, program, read_results
from benchmarks.tables import TABLES as CPU_TABLES
from benchmarks.tables import machine_line, markdown
from bfpo.core.console import show
from bfpo.core.errors import RunError
from bfpo.core.files import write_bytes_whole, write_text_whole
from bfpo.plots.style import svg_bytes

TABLES = {**CPU_TABLES, "balance": balance_tables, "gpu": gpu_tables}
NO_GPU = "### On one GPU\n\nNo figure from a GPU exists yet.\n"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and the figure from what has been measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "images" / "performance.svg")
    options = parser.parse_args(arguments)
    results = {name: read_results(options.results, name) for name in TABLES}
    if not any(results.values()):
        raise RunError(f"{options.results}: holds no results; run a benchmark first")
    figure = performance_figure(results["throughput"], results["scaling"])
    page, blocks = options.page.read_text(encoding="utf-8"), []
    if figure is not None:
        link = Path(os.path.relpath(options.figure, options.page.parent)).as_posix()
        if options.figure.exists() and f"]({link})" not in page:
            raise RunError(f"--figure: {options.figure} exists and is not shown on {options.page}; choose another name")
        write_bytes_whole(options.figure, svg_bytes(figure, salt=SALT))
        blocks.append(f"![Tokens per CPU-second and memory of bfpo and TRL, and a step by size]({link})\n")
    for name, found in results.items():
        if found is not None:
            blocks += [markdown(table) for table in TABLES[name](found)]
            blocks.append(f"*{machine_line(found)}*\n")
    if results["gpu"] is None:
        blocks.append(NO_GPU)
    write_text_whole(options.page, with_block(page, "\n".join(blocks), name=str(options.page)))
    show(f"{options.page}: written from {', '.join(name for name, found in results.items() if found is not None)}")


def with_block(page: str, block: str, *, name: str) -> str:
    """Return the page with what stands between the markers replaced; raises `RunError` where they are amiss."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise RunError(f"{name}: the lines '{BEGIN}' and '{END}' are needed, once each and in this order")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{block}\n{END}{after}"


if __name__ == "__main__":
    program(main)
