# ruff: noqa: T201
"""Print the tables of docs/real-model.md from a run of `bfpo evaluate` (arms.sh), and draw its figure.

    python tables.py OUT/evaluate-arms [--figure front.png]

Models named ARM-SEED or ARM-SEED-round-2 are seeds of one arm. A rate of one model has the interval of Clopper and
Pearson over prompts. With several seeds, rates and paired differences have intervals over prompts and trainings; two
arms are compared on the same prompts and the seeds that both have, seed by seed with McNemar's exact test too.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bfpo.core.markdown import table
from bfpo.judges.refusals import read_refusal
from bfpo.stats.intervals import Interval, paired_difference, rate_interval
from bfpo.stats.paired_tests import mcnemar

Row = dict[str, Any]
HARMFUL = {"simplesafetytests": "SimpleSafetyTests", "strongreject": "StrongREJECT", "harmbench": "HarmBench"}
Group = tuple[str, tuple[str, ...]]
Arms = dict[str, dict[str, list[Row]]]
GROUPS: dict[str, Group] = {
    "declined, harmful": ("declined", tuple(HARMFUL)),
    **{name: ("declined", (source,)) for source, name in HARMFUL.items()},
    "declined, harmless": ("declined", ("xstest-safe", "mt-bench", "ifeval", "hh-helpful", "truthfulqa")),
    "XSTest, safe": ("declined", ("xstest-safe",)),
    "MT-Bench and IFEval": ("declined", ("mt-bench", "ifeval")),
    "XSTest, MT-Bench and IFEval": ("declined", ("xstest-safe", "mt-bench", "ifeval")),
    "everyday (HH first turns)": ("declined", ("hh-helpful",)),
    "TruthfulQA": ("declined", ("truthfulqa",)),
    "harmless, sources never trained on": ("declined", ("mt-bench", "truthfulqa")),
    "harmless, other prompts of trained sources": ("declined", ("xstest-safe", "ifeval", "hh-helpful")),
    "incoherent, harmful": ("incoherent", tuple(HARMFUL)),
    "incoherent, harmless": ("incoherent", ("xstest-safe", "mt-bench", "ifeval", "hh-helpful", "truthfulqa")),
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of `bfpo evaluate`")
    parser.add_argument("--models", nargs="*", help="models of the first table; all without it")
    parser.add_argument("--against", default="bfpo", help="the arm that the others are compared with")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    answers = read_answers(args.run)
    print(by_model({name: answers[name] for name in args.models or answers}))
    arms = by_arm(answers)
    print(over_seeds(arms), differences(arms, args.against), sep="\n")
    if args.figure:
        draw(answers, args.figure)


def read_answers(run: Path) -> dict[str, list[Row]]:
    """Return the answers of every model, read for refusals, in the order of their prompts."""
    found: dict[str, list[Row]] = defaultdict(list)
    for line in (run / "answers.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        read = read_refusal(row["text"], row["prompt"][-1]["content"])
        source = row["suite"].removeprefix("report-")
        declined, incoherent = bool(read.refused or read.partly), bool(row.get("incoherent"))
        words = len(row["text"].split())
        found[row["model"]].append(
            {
                "key": (source, row["id"]),
                "source": source,
                "declined": declined,
                "incoherent": incoherent,
                "words": words,
            }
        )
    return {name: sorted(rows, key=lambda row: row["key"]) for name, rows in found.items()}


def by_model(answers: dict[str, list[Row]]) -> str:
    """Return the table of single models: per cent with intervals."""
    lines = {
        name: [_interval(rate_interval(of(rows, *group))) for rows in answers.values()]
        for name, group in GROUPS.items()
    }
    lines["declined among coherent, harmful"] = [
        _interval(rate_interval([r["declined"] for r in rows if r["source"] in HARMFUL and not r["incoherent"]]))
        for rows in answers.values()
    ]
    harmless = GROUPS["declined, harmless"][1]
    words = [of(rows, "words", harmless) for rows in answers.values()]
    most = max(map(max, words))
    lines["words of an answer to a harmless prompt"] = [
        _interval(rate_interval([num / most for num in own]), most) for own in words
    ]
    return _table(["", *answers], lines)


def by_arm(answers: dict[str, list[Row]]) -> Arms:
    """Return arm -> seed -> answers of the last model: bfpo-0-round-2 is seed 0 of bfpo; a start has no seed ("")."""
    arms: Arms = defaultdict(dict)
    for name, rows in answers.items():
        match = re.fullmatch(r"(.+?)(?:-(\d+))?(-round-2)?", name)
        if match and not re.search(r"-round-1$", name):
            arms[match[1]][match[2] or ""] = rows
    return arms


def over_seeds(arms: Arms) -> str:
    """Return the table of arms: per cent over seeds."""
    head = [f"{name}, {len(seeds)} seed{'s' * (len(seeds) > 1)}" for name, seeds in arms.items()]
    lines = {name: [_over(seeds, group) for seeds in arms.values()] for name, group in GROUPS.items()}
    return _table(["", *head], lines)


def _over(seeds: dict[str, list[Row]], group: Group) -> str:
    values, keys, names = _stacked(seeds, seeds, group)
    rates = [100 * fmean(of(rows, *group)) for rows in seeds.values()] if values else []
    found = _interval(rate_interval(values, keys, seeds=names if len(seeds) > 1 else None))
    return found + (f"; {', '.join(f'{rate:.0f}' for rate in rates)}" if len(rates) > 1 else "")


def differences(arms: Arms, first: str) -> str:
    """Return the table of paired differences in points, `first` minus each other arm."""
    names = ["declined, harmful", "declined, harmless", "XSTest, MT-Bench and IFEval", "everyday (HH first turns)"]
    lines = {}
    for other, seeds in arms.items():
        shared = [seed for seed in arms.get(first, ()) if seed in seeds or "" in seeds]
        if other != first and shared:
            cells = [_difference(arms[first], seeds, shared, GROUPS[name]) for name in names]
            lines[f"{first} minus {other}, {len(shared)} seed{'s' * (len(shared) > 1)}"] = cells
    return _table(["", *names], lines)


def _difference(first: dict[str, list[Row]], second: dict[str, list[Row]], shared: list[str], group: Group) -> str:
    ours, keys, names = _stacked(first, shared, group)
    theirs, _, _ = _stacked(second, shared, group)
    found = paired_difference(ours, theirs, keys, seeds=names if len(shared) > 1 else None)
    tests = [mcnemar(of(_seed(first, seed), *group), of(_seed(second, seed), *group)).p_value for seed in shared]
    p_values = ", ".join("-" if p is None else f"{p:.1g}" for p in tests)
    return f"{100 * found.value:+.0f} ({100 * found.low:+.0f} to {100 * found.high:+.0f}), p {p_values}"


def _stacked(arm: dict[str, list[Row]], seeds: Iterable[str], group: Group) -> tuple[list[bool], list[Any], list[str]]:
    """Return the values of all seeds, and of each value the prompt and the seed."""
    key, sources = group
    rows = [(row[key], row["key"], seed) for seed in seeds for row in _seed(arm, seed) if row["source"] in sources]
    return [value for value, _, _ in rows], [prompt for _, prompt, _ in rows], [seed for _, _, seed in rows]


def _seed(arm: dict[str, list[Row]], seed: str) -> list[Row]:
    return arm.get(seed) or arm[""]


def of(rows: Sequence[Row], key: str, sources: Sequence[str]) -> list[Any]:
    """Return the values of the answers to the prompts of these sources."""
    return [row[key] for row in rows if row["source"] in sources]


def _interval(found: Interval, whole: float = 100) -> str:
    """Return a mean with its interval; `whole`: what 1 stands for."""
    if found.value is None or found.low is None or found.high is None:
        return "not asked"
    return f"{whole * found.value:.0f} ({whole * found.low:.0f}-{whole * found.high:.0f})"


def _table(head: Sequence[str], lines: dict[str, list[str]]) -> str:
    return "\n".join(table(head, ([name, *cells] for name, cells in lines.items()))) + "\n"


def draw(answers: dict[str, list[Row]], file: Path) -> None:
    """Draw declined harmful prompts against declined harmless ones, with intervals, one point a model."""
    import matplotlib.pyplot as plt

    arms = {name: re.sub(r"-\d+(-round-\d)?$", "", name) for name in answers}
    colours = dict(zip(dict.fromkeys(arms.values()), plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    markers = {name: "os^Dv"[list(arms.values())[:place].count(arms[name]) % 5] for place, name in enumerate(arms)}
    figure, axes = plt.subplots(figsize=(7, 4.6), dpi=110)
    for name, rows in answers.items():
        y, x = (rate_interval(of(rows, *GROUPS[group])) for group in ("declined, harmful", "declined, harmless"))
        axes.errorbar(
            100 * x.value, 100 * y.value, fmt=markers[name], markersize=5, capsize=2, linewidth=0.8,
            color=colours[arms[name]], label=f"{name}: {100 * y.value:.0f} / {100 * x.value:.0f}",
            xerr=[[100 * (x.value - x.low)], [100 * (x.high - x.value)]],
            yerr=[[100 * (y.value - y.low)], [100 * (y.high - y.value)]],
        )  # fmt: skip
    axes.legend(fontsize=8, loc="lower right", title="harmful / harmless, %", title_fontsize=8)
    axes.set_xlabel("declined of harmless prompts, % (lower is better)")
    axes.set_ylabel("declined of harmful prompts, %")
    axes.set_ylim(0, 102)
    axes.set_xlim(0, None)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    main()
