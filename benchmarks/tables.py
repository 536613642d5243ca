"""Tables of results, for the console and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.hot_path_parts import CASES
from benchmarks.process import read_results
from benchmarks.summary import (
    Spread,
    best_rate,
    counterpart,
    fastest,
    memory_ratio,
    overall_factor,
    point_spread,
    rate_share,
    speed_ratio,
    spread,
    throughput_arms,
)
from bfpo.core.console import show, show_table

__all__ = [
    "SIDES",
    "TABLES",
    "Table",
    "machine_line",
    "markdown",
    "peak_mib",
    "scaling_points",
    "seconds_per_step",
    "show_tables",
]

MIB = 2**20
SIDES = ("before", "after")
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Table:
    """A title, a note that says what the columns are, and text cells."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


def throughput_tables(results: dict[str, Any]) -> list[Table]:
    """Return the table of whole training loops."""
    runs, settings = results["runs"], results["settings"]
    arms, rate = throughput_arms(runs), best_rate(runs)
    rows = []
    for arm in arms:
        other, best = counterpart(arms, arm), fastest(arms, arm)
        peaks = arm.peaks()
        rows.append(
            [
                arm.model,
                arm.reference,
                arm.title,
                number(spread(arm.tokens_per_second()), 0),
                UNKNOWN if other is None else number(speed_ratio(arm, other), 2),
                UNKNOWN if best is None else number(speed_ratio(arm, best), 2),
                UNKNOWN if peaks is None else number(spread(peak / MIB for peak in peaks), 0),
                UNKNOWN if other is None else number(memory_ratio(arm, other), 2),
                number(rate_share(arm, rate), 2),
                f"{overall_factor(arm):.2f}",
            ]
        )
    note = (
        f"Median [quartiles] of {settings['repeats']} repeats with pairs of their own, {settings['steps'] - 1} timed "
        f"optimizer steps of {settings['pairs']} pairs each, {settings['threads']} threads, float32, `down_proj` "
        "training. Tokens: prompt, chosen and rejected of each pair once each, for both. Ratios, repeat by repeat: "
        "against the TRL row of the same model, reference and pairs a forward; *its best* is the faster TRL row of the "
        "same model and reference. Share: of needed operations per second in the best "
        f"matrix rate seen here, {rate / 1e9:.0f} GFLOP/s. Work: operations counted over needed ones; what is needed "
        "leaves the reference out."
    )
    columns = [
        "model",
        "reference",
        "trainer",
        "tokens/s",
        "times TRL",
        "times its best",
        "peak above the model, MiB",
        "of TRL's",
        "share of the matrix rate",
        "work over needed",
    ]
    return [Table("Whole training loop", note, columns, rows)]


def scaling_points(runs: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """Return the points that were measured, by tokens, pairs and vocabulary."""
    found = {(run["length"], run["pairs"], run["vocabulary"]) for run in runs}
    return [dict(zip(("length", "pairs", "vocabulary"), point, strict=True)) for point in sorted(found)]


def seconds_per_step(run: dict[str, Any]) -> float:
    """Return the median time of the steps after the first."""
    return float(median(run["step_seconds"][1:]))


def peak_mib(run: dict[str, Any]) -> float | None:
    """Return the peak above the model in MiB."""
    return None if run["peak_above_model"] is None else run["peak_above_model"] / MIB


def scaling_tables(results: dict[str, Any]) -> list[Table]:
    """Return the table of step time and memory by tokens, pairs and vocabulary."""
    runs, settings = results["runs"], results["settings"]
    rows = []
    for point in scaling_points(runs):
        ours, theirs = (point_spread(runs, point, name, seconds_per_step) for name in ("bfpo", "trl"))
        our_peak, their_peak = (point_spread(runs, point, name, peak_mib) for name in ("bfpo", "trl"))
        rows.append(
            [
                *(f"{value:,}" for value in point.values()),
                number(ours, 3),
                number(theirs, 3),
                UNKNOWN if ours is None or theirs is None else f"{theirs.median / ours.median:.2f}",
                number(our_peak, 0),
                number(their_peak, 0),
                UNKNOWN if our_peak is None or their_peak is None else f"{our_peak.median / their_peak.median:.2f}",
            ]
        )
    note = (
        f"Layers of model {settings['model']}; rows of one length, half of it prompt, so without padding; reference "
        f"precomputed; {settings['repeats']} repeat(s), {settings['steps'] - 1} timed steps, {settings['threads']} "
        "threads."
    )
    columns = ["tokens a row", "pairs a step", "vocabulary", "bfpo, s/step", "TRL, s/step", "times TRL"]
    return [Table("A step by size", note, [*columns, "bfpo, peak MiB", "TRL, peak MiB", "of TRL's"], rows)]


def rampup_tables(results: dict[str, Any]) -> list[Table]:
    """Return the tables of start-up and of reading, tokenizing and the reference pass."""
    starts = [run for run in results["runs"] if run["kind"] == "startup"]
    commands = list(dict.fromkeys(run["command"] for run in starts))
    times = [[name, number(spread(r["seconds"] for r in starts if r["command"] == name), 2)] for name in commands]
    parts = [
        [
            run["part"],
            f"{run['rows']:,}",
            f"{run['seconds']:.2f}",
            f"{run['rows'] / run['seconds']:,.0f}",
            UNKNOWN if run["peak_bytes"] is None else f"{run['peak_bytes'] / MIB:.0f}",
        ]
        for run in results["runs"]
        if run["kind"] == "part"
    ]
    note = (
        "Synthetic pairs, three fields of 40 words; the reference pass runs a tiny model (XS) on shorter ones. Peak: "
        "above what was resident before."
    )
    return [
        Table("Start-up", "Whole processes, median [quartiles].", ["command", "seconds"], times),
        Table("Before the first step", note, ["part", "pairs", "seconds", "pairs/s", "peak MiB"], parts),
    ]


def hot_path_tables(results: dict[str, Any]) -> list[Table]:
    """Return the tables of parts of a step before and after a commit: CPU time, errors of log-probs."""
    settings = results["settings"]
    times = [run for run in results["runs"] if run["kind"] == "time"]
    rows = []
    for name in dict.fromkeys(run["case"] for run in times):
        before, after = ([r["seconds"] for r in times if (r["case"], r["side"]) == (name, s)] for s in SIDES)
        ratios = spread(one / other for one, other in zip(before, after, strict=True))
        milliseconds = [number(spread(1000 * seconds for seconds in side), 1) for side in (before, after)]
        rows.append([CASES[name].title, *milliseconds, number(ratios, 2)])
    note = (
        f"Models with random weights, one packed row; CPU milliseconds of a pass with the sources of commit "
        f"{settings['before']} and with those measured, the two one after the other, median [quartiles] of "
        f"{settings['repeats']} repeats, {settings['threads']} thread(s). Mean load of the machine: "
        f"{settings['load']:.1f}."
    )
    errors = [run for run in results["runs"] if run["kind"] == "error"]
    error_rows = [[e["dtype"], e["side"], f"{max(e['errors']):.2g}", f"{mean(e['errors']):.2g}"] for e in errors]
    error_note = "Of the log-probs of 4 completions of 110 to 170 tokens, against float64, in nats; random weights."
    return [
        Table("Parts of a step, before and after", note, ["pass", "before, ms", "after, ms", "times as fast"], rows),
        Table("Errors, before and after", error_note, ["computed in", "sources", "largest", "mean"], error_rows),
    ]


TABLES = {
    "throughput": throughput_tables,
    "hot_path": hot_path_tables,
    "scaling": scaling_tables,
    "rampup": rampup_tables,
}


def number(value: Spread | None, digits: int) -> str:
    """Return `median [low-high]`, the quartiles left out where they are the median."""
    if value is None:
        return UNKNOWN
    low, middle, high = (f"{v:,.{digits}f}" for v in (value.low, value.median, value.high))
    return middle if low == middle == high else f"{middle} [{low}-{high}]"


def machine_line(results: dict[str, Any]) -> str:
    """Return the machine, the versions and the commit of a file of results."""
    machine, software = results["machine"], results["software"]
    memory = machine.get("memory_bytes")
    parts = [str(machine.get("cpu") or machine.get("machine")), f"{machine.get('cores')} cores"]
    parts += [f"{memory / 2**30:.0f} GiB"] if memory else []
    versions = ", ".join(f"{name} {software[name]}" for name in ("torch", "transformers", "trl") if software.get(name))
    commit = str(software.get("commit") or UNKNOWN)[:10] + (" with changes" if software.get("changed") else "")
    return f"{', '.join(parts)}; {machine.get('system')}; {versions}; bfpo {commit}; {results['date']}"


def markdown(table: Table) -> str:
    """Return the table in Markdown, under its title and note."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"### {table.title}\n\n{table.note}\n\n{body}\n"


def show_tables(folder: Path, benchmarks: Sequence[str]) -> None:
    """Show the tables of the results in a folder."""
    for name in benchmarks:
        results = read_results(folder, name)
        if results is None:
            continue
        show(machine_line(results))
        for table in TABLES[name](results):
            show(f"\n{table.title}")
            show_table(table.columns, table.rows)
            show(table.note)
        show()
