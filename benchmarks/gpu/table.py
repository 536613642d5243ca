"""From the rows of `gpu.json` to tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from benchmarks.tables import Table

__all__ = ["gpu_tables"]

GIB = 2**30
NONE = ""
COLUMNS = ["what", "run", "tokens/s", "times the best other", "peak GiB", "of the data sheet", "of the matrix rate"]


def gpu_tables(results: dict[str, Any]) -> list[Table]:
    """Return the tables: what was trained and sampled, its kernels, and the tests."""
    runs = results["runs"]
    facts: dict[str, Any] = next((run for run in runs if run["kind"] == "facts" and "device" in run), {})
    tables = [_rates(results, facts)]
    tables += [_kernels(run) for run in runs if run["kind"] == "kernels"]
    tests = [run for run in runs if run["kind"] == "tests"]
    return tables + [_tests(run) for run in tests]


def _rates(results: dict[str, Any], facts: dict[str, Any]) -> Table:
    runs = [run for run in results["runs"] if run["kind"] in ("training", "sft", "generation")]
    arms: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        arms[run["group"], run["title"]].append(run)
    best = _best_of_others(arms)
    matrix = facts.get("matrix_bfloat16") or facts.get("matrix_float32")
    rows = []
    for (group, title), same in arms.items():
        measured = [run for run in same if run["status"] == "measured"]
        if not measured:
            rows.append([group, title, same[0]["status"], *[NONE] * 4])
            continue
        rate = _rate(measured)
        flops = [run["loop_needed_flops"] / run["loop_seconds"] for run in measured if "loop_needed_flops" in run]
        other = best.get(group)
        peaks = [run["peak"] for run in measured if run.get("peak") is not None]
        padded = title.startswith("bfpo") and any(run.get("form") == "padded" for run in measured)
        rows.append(
            [
                group,
                f"{title}, padded rows" if padded else title,
                f"{rate:,.0f}" + (f" (median of {len(measured)})" if len(measured) > 1 else ""),
                f"{rate / other:.2f}" if other and title.startswith("bfpo") else NONE,
                f"{max(peaks) / GIB:.1f}" if peaks else NONE,
                _share(flops, facts.get("datasheet")),
                _share(flops, matrix),
            ]
        )
    rows += _at_equal_memory(arms)
    seconds = sum(run.get("seconds", 0.0) for run in results["runs"])
    has_compiler = facts.get("compiler", True)
    lacking = "" if has_compiler else "; no C compiler, so that flex attention cannot be compiled"
    note = (
        f"{facts.get('device', 'unknown device')}{lacking}; best matrix rate seen "
        f"{'unknown' if matrix is None else f'{matrix / 1e12:.0f} TFLOP/s'}; all parts took {seconds:.0f} s. Tokens "
        "of training: prompt, chosen and rejected of each pair once each, of SFT prompt and completion, for both "
        "sides; of generation the sampled ones, loading included. The first optimizer step is not timed. "
        "Shares: of the operations needed, in the dense bfloat16 rate of the data sheet and in the best matrix product "
        "measured here. *Times the best other*: the fastest run of TRL or plain transformers in the same group."
    )
    title = "On one GPU" + (" (small form: these numbers mean nothing)" if results["settings"]["small"] else "")
    return Table(title, note, COLUMNS, rows)


def _rate(runs: Iterable[dict[str, Any]]) -> float:
    return median(float(run["loop_tokens"] / run["loop_seconds"]) for run in runs)


def _share(flops: Sequence[float], rate: float | None) -> str:
    return f"{median(flops) / rate:.1%}" if flops and rate else NONE


def _best_of_others(arms: dict[tuple[str, str], list[dict[str, Any]]]) -> dict[str, float]:
    """Return the rate of the fastest run that is not ours, by group."""
    best: dict[str, float] = {}
    for (group, title), same in arms.items():
        measured = [run for run in same if run["status"] == "measured"]
        if measured and not title.startswith("bfpo"):
            best[group] = max(best.get(group, 0.0), _rate(measured))
    return best


def _at_equal_memory(arms: dict[tuple[str, str], list[dict[str, Any]]]) -> list[list[str]]:
    """Return a row for each group: our fastest run that takes no more memory than TRL's fastest."""
    rows = []
    for group in dict.fromkeys(group for group, _ in arms):
        known = {
            title: (_rate(measured), max(run["peak"] for run in measured))
            for (of, title), same in arms.items()
            if of == group
            and (measured := [run for run in same if run["status"] == "measured" and run.get("peak") is not None])
        }
        others = {title: value for title, value in known.items() if not title.startswith("bfpo")}
        if not others:
            continue
        rate, peak = max(others.values())
        ours = {title: value for title, value in known.items() if title.startswith("bfpo") and value[1] <= peak}
        if not ours:
            continue
        title = max(ours, key=lambda name: ours[name])
        tokens, memory = ours[title]
        name = f"at most the peak of the fastest other: {title}"
        rows.append([group, name, f"{tokens:,.0f}", f"{tokens / rate:.2f}", f"{memory / GIB:.1f}", NONE, NONE])
    return rows


def _kernels(run: dict[str, Any]) -> Table:
    title = f"Kernels of a step: {run['group']}, {run['title'].removeprefix('kernels of ')}"
    if run["status"] != "measured":
        return Table(title, run["status"], ["kernel", "share"], [])
    idle = max(0.0, 1 - run["kernel_seconds"] / run["step_seconds"])
    note = (
        f"One step of {run['step_seconds']:.2f} s; {idle:.0%} of it without a kernel (the profiler itself slows the "
        "host down). Shares are of the time in kernels, which are grouped by their names."
    )
    rows = [[name, f"{share:.1%}"] for name, share in run["groups"].items() if share >= 0.0005]
    rows += [[f"`{one['name'][:80]}`, {one['calls']} calls", f"{one['share']:.1%}"] for one in run["longest"][:12]]
    return Table(title, note, ["kernel", "share"], [[cell.replace("|", "/") for cell in row] for row in rows])


def _tests(run: dict[str, Any]) -> Table:
    title = "Tests marked `gpu`"
    if run["status"] != "measured":
        return Table(title, run["status"], ["test", "outcome"], [])
    rows = [[name, outcome] for outcome in ("failed", "skipped", "passed") for name in run[outcome]]
    counts = ", ".join(f"{len(run[outcome])} {outcome}" for outcome in ("passed", "failed", "skipped"))
    return Table(title, f"{counts}.", ["test", "outcome"], [[cell.replace("|", "/") for cell in row] for row in rows])
