"""BENCHMARK: `bfpo prepare` beside a script of polars and rensa that does what a user sees of the same job.

    python -m benchmarks.prepare [--quick] [--data FILES] [--before COMMIT]

CPU seconds (user and system, of the whole process and its children) and the peak of resident memory. All arms run in
every repeat, in shuffled order. The counts of rows, rejects, duplicates and label cells must be the same for all.
The script also runs with a figure like that of the data card. One arm of ours leaves out what the script does not do:
refusals, and with them the languages.
`--data`: JSON lines of chosen and rejected transcripts, such as HH-RLHF's, in place of synthetic ones. Labels that are
not there are drawn, and more rows than there are are made from them by changing words. `--before`: an earlier commit
of bfpo, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import add_common_options, integers
from benchmarks.prepare_polars import DRAWN, SCRIPT
from benchmarks.process import ROOT, program, unpack_sources, whole_process, write_results
from benchmarks.tables import show_tables
from bfpo.core.errors import RunError
from bfpo.data.files import iter_rows

OURS, BEFORE = "bfpo prepare", "bfpo prepare, before"
LESS = "bfpo prepare, language_sample: 0"
_SPEAKERS = {"Human", "Assistant"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the results and show the table."""
    options = parse(arguments)
    arms = [SCRIPT, DRAWN, OURS, LESS, *([BEFORE] if options.before else [])]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        before = None
        if options.before is not None:
            unpack_sources(options.before, before := Path(name) / "before")
        for rows in options.rows:
            file = Path(name) / f"pairs-{rows}.jsonl"
            if options.data is None:
                write_transcripts(file, rows)
                data = "synthetic transcripts"
            else:
                data = write_rows(options.data, file, rows)
            for repeat in range(options.repeats):
                for arm in random.Random(repeat).sample(arms, len(arms)):
                    sys.stderr.write(f"{arm}: {rows} rows, repeat {repeat}\n")
                    measured = measure(arm, file, before=before)
                    check_counts(measured["counts"], [run for run in runs if run["rows"] == measured["counts"]["rows"]])
                    runs.append({"arm": arm, "rows": measured["counts"]["rows"], "repeat": repeat, **measured})
                write_results(options.out, "prepare", settings=_settings(options, data), runs=runs)
    show_tables(options.out, ["prepare"])


def _settings(options: argparse.Namespace, data: str) -> dict[str, Any]:
    return {
        "before": options.before,
        "data": data,
        "repeats": options.repeats,
        "load": [round(value, 1) for value in os.getloadavg()],
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, those of the smoke form put in where it is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_common_options(parser, threads=False)
    parser.add_argument("--rows", type=integers, default=[5000, 50_000], help="numbers of rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, nargs="+", default=None, help="JSON lines in place of synthetic ones")
    parser.add_argument("--before", default=None, help="an earlier commit, measured too")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.repeats = [300], 1
    return options


def write_transcripts(path: Path, rows: int, *, seed: int = 0) -> None:
    """Write transcripts of one to four questions; a few repeat an earlier row, or its prompt but for one word."""
    draw = random.Random(seed)
    words = [f"{a}{b}st{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("an", "er", "o", "ly", "ing", "")]
    # A third of the words are common ones, as in English: other texts are given to the model of languages.
    words += ["the", "and", "that", "this", "with", "you", "your", "are", "it", "its", "of", "to", "for", "be"] * 13

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    kept: list[dict[str, Any]] = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = dict(draw.choice(kept)) if kept and number % 50 == 0 else _drawn_row(text, draw)
            if kept and number % 50 == 1:
                asked = draw.choice(kept)["prompt"] + f" {text(1, 1)}"
                row = {**row, "prompt": asked}
            if len(kept) < 1000:
                kept.append(row)
            said = {name: f"{row['prompt']}\n\nAssistant: {row[name]}" for name in ("chosen", "rejected")}
            labels = {name: row[name] for name in ("chosen_is_safe", "rejected_is_safe")}
            file.write(json.dumps({**said, **labels}) + "\n")


def _drawn_row(text: Any, draw: random.Random) -> dict[str, Any]:
    turns = [f"\n\nHuman: {text(8, 40)}"]
    for _ in range(draw.randint(0, 3)):
        turns += [f"\n\nAssistant: {text(20, 80)}", f"\n\nHuman: {text(8, 40)}"]
    labels = {"chosen_is_safe": draw.random() < 0.7, "rejected_is_safe": draw.random() < 0.5}
    return {"prompt": "".join(turns), "chosen": text(20, 80), "rejected": text(20, 80), **labels}


def write_rows(sources: Sequence[Path], target: Path, rows: int, *, seed: int = 0) -> str:
    """Write the rows of JSON lines (gzip too), then, up to `rows`, copies of them in which words are other words.

    Returns what is written, in words.
    """
    draw = random.Random(seed)
    read: list[dict[str, Any]] = [dict(row.columns) for source in sources for row in iter_rows(source)]
    words = sorted({word for row in read[:1000] for word in re.findall(r"[A-Za-z]+", row["chosen"])} - _SPEAKERS)
    places = {word: place for place, word in enumerate(words)}
    with target.open("w", encoding="utf-8") as file:
        for number in range(rows):
            turn, row = divmod(number, len(read))

            def other(match: re.Match[str], turn: int = turn) -> str:
                place = places.get(match.group())
                return match.group() if place is None or (place + turn) % 4 else words[(place + turn) % len(words)]

            said = {name: read[row][name] for name in ("chosen", "rejected")}
            if turn:
                said = {name: re.sub("[A-Za-z]+", other, text) for name, text in said.items()}
            labels = {f"{name}_is_safe": draw.random() < share for name, share in (("chosen", 0.7), ("rejected", 0.5))}
            file.write(json.dumps({**labels, **read[row], **said}) + "\n")
    names = ", ".join(source.name for source in sources)
    return f"{len(read):,} pairs of {names}, more made from them by changing words; random labels where there are none"


def measure(arm: str, file: Path, *, before: Path | None) -> dict[str, Any]:
    """Return CPU seconds, peak bytes and counts of one run in a process of its own; raises `RunError` if it fails."""
    source = str((before if arm == BEFORE and before is not None else ROOT) / "src")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [{"name": "pairs", "files": str(file), "bad_rows": "skip"}]
        config = {"sources": sources, "processes": 1, **({"language_sample": 0} if arm == LESS else {})}
        (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
        command = ["-m", "bfpo", "prepare", "--config", str(folder / "config.yaml"), "--out", str(folder / "out")]
        if arm in (SCRIPT, DRAWN):
            command = ["-m", "benchmarks.prepare_polars", str(file), name, *(["figure"] if arm == DRAWN else [])]
        usage, text = whole_process(command, {"PYTHONPATH": os.pathsep.join([source, str(ROOT)])})
        counts = json.loads(text.splitlines()[-1]) if arm in (SCRIPT, DRAWN) else _counts_of(folder / "out")
    return {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "counts": {key: counts[key] for key in ("rows", "rejected", "duplicates", "cells")},
    }


def _counts_of(folder: Path) -> dict[str, Any]:
    """Return what `data.json` says, in the words of the script."""
    data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    (source,) = data["sources"]
    cells: dict[str, int] = {}
    for found in data["streams"]["main"]["cells"].values():
        for cell, number in found.items():
            cells[cell] = cells.get(cell, 0) + number
    return {
        "rows": source["rows"],
        "rejected": sum(source["rejected"].values()),
        "duplicates": source["units"].get("duplicate", 0),
        "cells": {cell: number for cell, number in cells.items() if number},
    }


def check_counts(counts: dict[str, Any], runs: Sequence[dict[str, Any]]) -> None:
    """Raise `RunError` where two runs on the same rows counted differently: they would not be the same work."""
    if runs and runs[0]["counts"] != counts:
        raise RunError(f"the counts differ: {runs[0]['arm']} has {runs[0]['counts']}, this run {counts}")


if __name__ == "__main__":
    program(main)
