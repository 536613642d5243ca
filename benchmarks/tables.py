"""Tables of results, for the console and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.hot_path_parts import CASES
from benchmarks.prepare_polars import DRAWN, SCRIPT
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
from bfpo.core.markdown import table as table_lines

__all__ = [
    "SIDES",
    "TABLES",
    "Table",
    "machine_line",
    "markdown",
    "peak_mib",
    "scaling_points",
    "seconds_per_step",
    "sft_tables",
    "show_tables",
]

MIB = 2**20
SIDES = ("before", "after")
UNKNOWN = "unknown"
_RECOMPUTED = {False: "", True: ", recomputed", "selective": ", recomputed but for products"}


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
        f"optimizer steps of {settings['pairs']} pairs each, {settings['threads']} thread(s), float32, `down_proj` "
        "training. Tokens: prompt, chosen and rejected of each pair once each, for both. CPU-second: of the process, "
        f"not of the clock; the mean load of the machine was {settings['load']:.1f}. Ratios, repeat by repeat: "
        "against the TRL row of the same model, reference and pairs a forward; *its best* is the faster TRL row of the "
        "same model and reference. Share: of needed operations per CPU-second in the best "
        f"matrix rate seen here, {rate / 1e9:.0f} GFLOP/s. Work: operations counted in the first step over needed "
        "ones, which leave the reference out; the first step of bfpo also checks packed rows on one pair, once."
    )
    columns = [
        "model",
        "reference",
        "trainer",
        "tokens per CPU-second",
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
        f"thread(s), in CPU-seconds. Mean load of the machine: {settings['load']:.1f}."
    )
    columns = ["tokens a row", "pairs a step", "vocabulary", "bfpo, CPU-s/step", "TRL, CPU-s/step", "times TRL"]
    return [Table("A step by size", note, [*columns, "bfpo, peak MiB", "TRL, peak MiB", "of TRL's"], rows)]


def rampup_tables(results: dict[str, Any]) -> list[Table]:
    """Return the tables of start-up and of reading, tokenizing and the reference pass."""
    settings = results["settings"]
    starts = [run for run in results["runs"] if run["kind"] == "startup"]
    times = []
    for name in dict.fromkeys(run["command"] for run in starts):
        sides = [[r["cpu_seconds"] for r in starts if (r["command"], r["side"]) == (name, side)] for side in SIDES]
        ratio = spread(one / other for one, other in zip(*sides, strict=True))
        times.append([name, *(number(spread(side), 2) for side in sides), number(ratio, 2)])
    start_note = (
        f"Whole processes, CPU seconds with the sources of commit {settings['before']} and with those measured, median "
        f"[quartiles] of {settings['repeats']} repeats, {settings['threads']} thread(s). A dry run now also computes "
        f"the first loss and times a few steps. Mean load of the machine: {settings['load']:.1f}."
    )
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
        Table("Start-up, before and after", start_note, ["command", "before, s", "after, s", "times as fast"], times),
        Table("Before the first step", note, ["part", "pairs", "seconds", "pairs/s", "peak MiB"], parts),
    ]


def sft_tables(results: dict[str, Any]) -> list[Table]:
    """Return the table of training on completions."""
    runs, settings = sorted(results["runs"], key=lambda run: run["repeat"]), results["settings"]
    names = ("model", "trainer", "form", "texts_per_forward", "recompute")
    arms = list(dict.fromkeys(tuple(run.get(name, False) for name in names) for run in runs))

    def of(arm: tuple[Any, ...]) -> list[dict[str, Any]]:
        return [run for run in runs if tuple(run.get(name, False) for name in names) == arm]

    def rate(run: dict[str, Any]) -> float:
        return float(run["loop_tokens"] / run["loop_cpu_seconds"])

    def above(run: dict[str, Any]) -> float:
        return float(run["peak_above_model"] - run["state_bytes"])

    def ratio(arm: tuple[Any, ...], other: tuple[Any, ...], value: Any) -> str:
        return number(spread(value(a) / value(b) for a, b in zip(of(arm), of(other), strict=True)), 2)

    rows = []
    for arm in sorted(arms, key=lambda arm: (arm[0], arm[1], arm[2] == "padded", -arm[3], str(arm[4]))):
        theirs = [one for one in arms if one[:2] == (arm[0], "trl")]
        packed = next(one for one in theirs if one[2] == "packed" and not one[4])
        best = max(theirs, key=lambda one: spread(map(rate, of(one))).median)
        known = all(run["peak_above_model"] is not None for run in (*of(arm), *of(packed)))
        title = f"{'bfpo' if arm[1] == 'bfpo' else 'TRL, packed' if arm[2] == 'packed' else 'TRL, no packing'}"
        rows.append(
            [
                arm[0],
                f"{title}, {arm[3]} text{'s' * (arm[3] > 1)} a forward{_RECOMPUTED[arm[4]]}",
                number(spread(map(rate, of(arm))), 0),
                ratio(arm, packed, rate),
                ratio(arm, best, rate),
                number(spread(run["peak_above_model"] / MIB for run in of(arm)), 0) if known else UNKNOWN,
                ratio(arm, packed, lambda run: run["peak_above_model"]) if known else UNKNOWN,
                number(spread(above(run) / MIB for run in of(arm)), 0) if known else UNKNOWN,
                ratio(arm, packed, above) if known else UNKNOWN,
            ]
        )
    loads = spread(run["load_average"] for run in runs)
    repeats = ", ".join(f"{arm[0]}: {len(of(arm))}" for arm in {arm[0]: arm for arm in arms}.values())
    share = sum(run["completion_tokens"] for run in runs) / sum(run["loop_tokens"] for run in runs)
    note = (
        f"Median [quartiles] of repeats with texts of their own ({repeats}), {settings['steps'] - 1} timed "
        f"optimizer steps of {settings['texts']} texts each, lengths of HH-RLHF times "
        f"{settings['length_scale']:g} ({share:.0%} of the tokens are of completions), {settings['threads']} "
        f"thread(s), {settings['dtype']}, all weights train. Tokens: prompt and completion once each. CPU-second: of "
        f"the process, not of the clock; the load of the machine was {number(loads, 1)}. Ratios, repeat by repeat: "
        "against TRL's packed row of the same model; *its best* is the fastest TRL row. Activations: the peak without "
        "gradients and optimizer state, which both need. Recomputed: activations are computed again in the backward "
        "pass, `gradient_checkpointing` is true (TRL's default) or `selective`."
    )
    columns = ["model", "trainer", "tokens per CPU-second", "times TRL packed", "times its best"]
    columns += ["peak above the model, MiB", "of TRL's packed", "activations, MiB", "of TRL's packed"]
    return [Table(f"Training on completions, {settings['dtype']}", note, columns, rows)]


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


def generation_tables(results: dict[str, Any]) -> list[Table]:
    """Return the table of generation: tokens per CPU second, and the share of row-steps that were of use."""
    runs, settings = results["runs"], results["settings"]
    arms = list(dict.fromkeys(run["arm"] for run in sorted(runs, key=lambda run: run["arm"])))
    rates = {arm: [run["tokens"] / run["cpu_seconds"] for run in runs if run["arm"] == arm] for arm in arms}
    rows = [
        [
            arm,
            number(spread(rates[arm]), 1),
            number(spread(ours / theirs for ours, theirs in zip(rates[arm], rates[arms[0]], strict=True)), 2),
            number(spread(run["tokens"] / run["row_steps"] for run in runs if run["arm"] == arm), 2),
        ]
        for arm in arms
    ]
    lengths = spread(run["tokens"] / settings["num"] for run in runs)
    load = number(spread(run["load"] for run in runs), 0)
    note = (
        f"{settings['model']}, temperature 1, {settings['num']} prompts a repeat, {settings['repeats']} repeats. "
        f"Answers: {number(lengths, 0)} tokens on average, at most {settings['max_new_tokens']}. Weights of `default` "
        f"and transformers: {settings['dtype']}. {settings['threads']} thread(s), load of the machine {load}. "
        "Median [quartiles]; ratios repeat by repeat. Useful: row-steps that made a token of an answer."
    )
    columns = ["how", "tokens per CPU second", "times before", "useful row-steps"]
    return [Table("Generation", note, columns, rows)]


def real_tables(results: dict[str, Any]) -> list[Table]:
    """Return the table of training a real chat model: each way beside the fastest other one."""
    runs, settings = sorted(results["runs"], key=lambda run: run["repeat"]), results["settings"]
    arms: dict[tuple[str, bool, str], list[dict[str, Any]]] = {}
    for run in runs:
        arms.setdefault(_real_arm(run), []).append(run)
    titles = {"training": "pairs", "completions": "completions"}

    def rate(run: dict[str, Any]) -> float:
        return float(run["loop_tokens"] / run["loop_seconds" if run["kind"] == "training" else "loop_cpu_seconds"])

    rows = []
    for (kind, _ours, name), own in sorted(
        arms.items(), key=lambda item: (list(titles).index(item[0][0]), not item[0][1])
    ):
        others = [some for (other, is_ours, _), some in arms.items() if other == kind and not is_ours]
        best = max(others, key=lambda some: spread(map(rate, some)).median)
        peaks = [run.get("peak_above_model") for run in (*own, *best)]
        known = None not in peaks
        pairs = list(zip(own, best, strict=True))
        rows.append(
            [
                titles[kind],
                name,
                number(spread(map(rate, own)), 0),
                number(spread(rate(one) / rate(other) for one, other in pairs), 2),
                number(spread(run["peak_above_model"] / MIB for run in own), 0) if known else "",
                number(spread(a["peak_above_model"] / b["peak_above_model"] for a, b in pairs), 2) if known else "",
            ]
        )
    num_repeats = len({run["repeat"] for run in runs})
    loads = [run[key] for run in runs for key in ("load_average", "load") if key in run]
    note = (
        f"{settings['model']}, pairs of {settings['pairs']} of at most {settings['max_length']} tokens, "
        f"{settings['threads']} thread(s), {settings['dtype']}. Median [quartiles] of {num_repeats} repeats "
        f"with pairs of their own: {settings['steps'] - 1} timed optimizer step(s) of {settings['per_step']} pairs "
        f"(`down_proj` trains, the reference is precomputed) or of their chosen completions (all weights train). "
        "Tokens: of prompt and completions once each. "
        "Ratios, repeat by repeat, against the fastest other way of the same work. Peak: above the model. "
        f"Load of the machine: {number(spread(loads), 1)}."
    )
    columns = ["work", "program", "tokens per CPU-second", "times the best other", "peak, MiB", "of the best other"]
    return [Table(f"A real chat model, {settings['dtype']}", note, columns, rows)]


def _real_arm(run: dict[str, Any]) -> tuple[str, bool, str]:
    """Return the work of a measurement, whether it is ours, and its name."""
    ours, name = run["trainer"] == "bfpo", "bfpo" if run["trainer"] == "bfpo" else "TRL"
    num = run["microbatch"] if run["kind"] == "training" else run["texts_per_forward"]
    form = "" if ours or run["kind"] == "training" else {"packed": ", packed", "padded": ", no packing"}[run["form"]]
    return run["kind"], ours, f"{name}{form}, {num} a forward"


def real_generation_tables(results: dict[str, Any]) -> list[Table]:
    """Return the table of the answers of a real chat model, by numbers of prompts."""
    runs, settings = sorted(results["runs"], key=lambda run: run["repeat"]), results["settings"]

    def of(arm: tuple[int, str]) -> list[dict[str, Any]]:
        return [run for run in runs if (run["prompts"], run["arm"]) == arm]

    def rate(run: dict[str, Any]) -> float:
        return float(run["tokens"] / run["cpu_seconds"])

    rows = []
    arms = sorted({(run["prompts"], run["arm"]) for run in runs}, key=lambda arm: (-arm[0], arm[1]))
    for arm in arms:
        others = [one for one in arms if one[0] == arm[0] and one[1].startswith("transformers")]
        best = max(others, key=lambda one: spread(map(rate, of(one))).median)
        before = [one for one in arms if one[0] == arm[0] and one[1].startswith("before")]
        rows.append(
            [
                f"{arm[0]:,}",
                arm[1] if arm in others else f"bfpo, {arm[1]}",
                number(spread(map(rate, of(arm))), 1),
                *(
                    number(spread(rate(a) / rate(b) for a, b in zip(of(arm), of(one), strict=True)), 2) if one else ""
                    for one in (before[0] if before else None, best)
                ),
                number(spread(run["tokens"] / run["row_steps"] for run in of(arm)), 2),
            ]
        )
    few = " or ".join(map(str, settings["few"]))
    few = f"; to {few} prompt(s) greedy ones, so that both make the same tokens" if few else ""
    note = (
        f"{settings['model']}, prompts of pairs of {settings['pairs']} of at most {settings['max_length']} tokens, "
        f"{settings['threads']} thread(s), {settings['dtype']}. Answers of one paragraph and at most "
        f"{settings['max_new_tokens']} tokens, drawn at temperature 1{few}. Median [quartiles] of "
        f"{len({run['repeat'] for run in runs})} repeat(s) with prompts of their own; ratios repeat by repeat. "
        "Useful: row-steps that made a token of an answer. "
        f"Load of the machine: {number(spread(run['load'] for run in runs), 1)}."
    )
    columns = ["prompts", "program", "tokens per CPU-second", "times before", "times transformers", "useful row-steps"]
    return [Table("Answers of a real chat model", note, columns, rows)]


def prepare_tables(results: dict[str, Any]) -> list[Table]:
    """Return the table of `bfpo prepare` beside the script, by rows; ratios are taken repeat by repeat."""
    runs, settings = results["runs"], results["settings"]
    script, drawn = (
        {(run["rows"], run["repeat"]): run for run in runs if run["arm"] == arm} for arm in (SCRIPT, DRAWN)
    )

    def beside(own: list[dict[str, Any]], other: dict[tuple[int, int], dict[str, Any]]) -> str:
        pairs = [(run, other[run["rows"], run["repeat"]]) for run in own if (run["rows"], run["repeat"]) in other]
        return number(spread(one["cpu_seconds"] / two["cpu_seconds"] for one, two in pairs), 2) if pairs else UNKNOWN

    rows = []
    for size, arm in dict.fromkeys((run["rows"], run["arm"]) for run in sorted(runs, key=lambda run: run["rows"])):
        own = [run for run in runs if (run["rows"], run["arm"]) == (size, arm)]
        rows.append(
            [
                f"{size:,}",
                arm,
                number(spread(run["cpu_seconds"] for run in own), 2),
                beside(own, script),
                beside(own, drawn),
                number(spread(run["peak_bytes"] / MIB for run in own), 0),
            ]
        )
    repeats = sorted({sum(size == other for other, _ in script) for size, _ in script})
    note = (
        f"Data: {settings['data']}. CPU seconds (user and system) of whole processes, imports included; median "
        f"[quartiles] of {' or '.join(map(str, repeats))} repeats in shuffled order; load of the machine (1, 5, 15 "
        f"minutes) {', '.join(map(str, settings['load']))}. One process of bfpo. Peak: resident memory of the process."
    )
    if settings.get("before"):
        note += f" Before: commit {settings['before'][:10]}."
    columns = ["rows", "program", "CPU seconds", "times the script", "times it with a figure", "peak MiB"]
    return [Table("Preparing data", note, columns, rows)]


TABLES = {
    "throughput": throughput_tables,
    "sft": sft_tables,
    "sft_bfloat16": sft_tables,
    "hot_path": hot_path_tables,
    "scaling": scaling_tables,
    "rampup": rampup_tables,
    "generation": generation_tables,
    "prepare": prepare_tables,
    "real": real_tables,
    "real_bfloat16": real_tables,
    "real_generation": real_generation_tables,
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
    body = "\n".join(table_lines(table.columns, table.rows))
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
