"""BENCHMARK: what `bfpo clean` gives in the closed world: the same training on labels as given and as cleaned.

    python -m benchmarks.cleaning --runs FOLDER [--noise 0.1,0.2] [--policies drop,flip,soften] [--out FOLDER]

The judge is the command's own: n-grams trained on the noisy labels, each label judged by one that saw none of its
prompt. The oracle scores the answers and counts the wrong labels; neither the judge nor the training sees it. A stopped
benchmark continues with the same `--runs`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.options import add_common_options
from benchmarks.process import program, write_results
from bfpo.config import CleanConfig, CompareConfig
from bfpo.core import markdown
from bfpo.core.records import as_json
from bfpo.core.schema import Pair
from bfpo.data.labels import completions_of_pair
from bfpo.data.read import read_pairs
from bfpo.experiments.points import Step, read_judged
from bfpo.experiments.steps import START, asking, seeds_of, sft_step, train_step, write_prompts, write_world
from bfpo.runs.folder import RunFolder
from bfpo.runs.stages import run_stage
from bfpo.scores.comparisons import compare_pairs
from bfpo.scores.scores import Judged, score_rows
from bfpo.world.oracle import assess

METRICS = ("helpful_and_safe", "harmless_harmful")
GIVEN, PROMPTS = "given", "data/test.jsonl"
CERTAINTY = 0.5  # the default finds fewer of the labels that are flipped, and is wrong less often on real ones
SETTING = {"beta": 0.05, "learning_rate": 1e-3}  # of BFPO, as the demo chose it without noise
FULL: dict[str, Any] = {
    "world": {"main_pairs": 3200, "buffer_pairs": 3200},
    "align": {"steps": 200},
}
QUICK: dict[str, Any] = {
    "world": {"main_pairs": 200, "buffer_pairs": 100, "sft_completions": 200, "held_out_prompts": 12},
    "align": {"steps": 2},
    "sft": {"steps": 2},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, show the table and write the results."""
    options = parse(arguments)
    noises, arms = [float(part) for part in options.noise.split(",")], [GIVEN, *options.policies.split(",")]
    sizes = QUICK if options.quick else FULL
    configs = {
        noise: CompareConfig.model_validate(
            {
                **sizes,
                "seeds": options.seeds,
                "world": {**sizes["world"], **({"safety_flips": noise, "order_flips": noise} if noise else {})},
            }
        )
        for noise in (0.0, *noises)
    }
    start = options.runs / "start"  # noise is in the pairs alone, so that all share the start model
    made = RunFolder.create(start, "compare", configs[0.0], resume=True)
    write_prompts(configs[0.0], made, "test", PROMPTS)
    write_world(configs[0.0], made)
    for seed in seeds_of(configs[0.0]):
        _run(sft_step(configs[0.0], start, START, seed))
    runs = [row for noise in noises for row in measured(configs[noise], options.runs / f"noise-{noise:g}", start, arms)]
    settings = {
        "noise": noises,
        "arms": arms,
        "seeds": options.seeds,
        "bfpo": SETTING,
        "certainty": CERTAINTY,
        "sizes": sizes,
    }
    path = write_results(options.out, "cleaning", settings=settings, runs=runs)
    sys.stdout.write(f"{table(runs)}\n\n{between(runs)}\n{path}\n")


def measured(config: CompareConfig, root: Path, start: Path, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Return what was measured of each arm at one share of noise: labels, scores, and the difference to `GIVEN`."""
    write_world(config, RunFolder.create(root, "compare", config, resume=True))
    judged: dict[str, list[Judged]] = {arm: [] for arm in arms}
    labels: dict[str, list[tuple[int, int, float]]] = {arm: [] for arm in arms}
    for seed in seeds_of(config):
        for arm in arms:
            pairs = _pairs_of_arm(root, arm, seed)
            labels[arm].append(_counted(pairs))
            model, runs = start / f"seed-{seed}" / START / "model" / "model", root / arm / f"seed-{seed}"
            train = train_step(config, root / arm, "bfpo", SETTING, model, runs / "train", seed)
            for step in (train, *asking(config, start / PROMPTS, train.out / "model", runs, seed)):
                _run(step)
            judged[arm] += read_judged(runs / "answers", runs / "scores", seed=seed)
    cleaned = [arm for arm in arms if arm != GIVEN]
    gains = compare_pairs(judged, [(arm, GIVEN) for arm in cleaned], METRICS)
    others = compare_pairs(judged, [(second, first) for first, second in combinations(cleaned, 2)], METRICS)
    return [
        {
            "noise": config.world.safety_flips,
            "arm": arm,
            "pairs": [num for num, *_ in labels[arm]],
            "labels": [num for _, num, _ in labels[arm]],
            "wrong": [num for *_, num in labels[arm]],
            "scores": {one.metric: as_json(one) for one in score_rows(judged[arm]) if one.metric in METRICS},
            "minus_given": {row.metric: as_json(row) for row in gains if row.first == arm},
            "minus_others": [as_json(row) for row in others if row.first == arm],
        }
        for arm in arms
    ]


def _run(step: Step) -> None:
    run_stage(step.stage, step.config, step.out, resume=True)


def _pairs_of_arm(root: Path, arm: str, seed: int) -> list[Pair]:
    """Return the main pairs of an arm, and write its data where its training looks for them."""
    data, own = root / "data" / f"seed-{seed}", root / arm / "data" / f"seed-{seed}"
    found = data / "main.jsonl"
    if arm != GIVEN:
        config = CleanConfig.model_validate(
            {
                "data": {"files": str(found)},
                "policy": arm,
                "certainty": CERTAINTY,
                "seed": seed,
                "bootstrap_samples": 50,
            }
        )
        found = run_stage("clean", config, root / arm / f"seed-{seed}" / "clean", resume=True).file("pairs.jsonl")
    own.mkdir(parents=True, exist_ok=True)
    for file, name in ((found, "main.jsonl"), (data / "buffer.jsonl", "buffer.jsonl")):
        shutil.copyfile(file, own / name)
    return read_pairs([own / "main.jsonl"]).pairs


def _counted(pairs: Sequence[Pair]) -> tuple[int, int, float]:
    """Return the numbers of pairs, of labels, and of wrong ones by the oracle: a soft label by its distance."""
    sides = [side for pair in pairs for side in completions_of_pair(pair)]
    wrong = 0.0
    for side in sides:
        found = assess([message.content for message in side.prompt if message.role == "user"], side.text)
        wrong += 0.0 if found is None or side.is_safe is None else abs(found.safe - side.is_safe)
    return len(pairs), len(sides), round(wrong, 3)


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the table of docs/cleaning.md as Markdown: per cent and points, with 95% intervals."""
    heads = ["noise", "labels", "pairs", "wrong labels", "helpful and safe", "minus given", "harmless", "minus given"]
    rows = []
    for row in runs:
        cells = [f"{100 * row['noise']:g}", row["arm"], f"{sum(row['pairs']) / len(row['pairs']):.0f}"]
        cells.append(f"{100 * sum(row['wrong']) / sum(row['labels']):.1f}")
        for metric in METRICS:
            gain = row["minus_given"].get(metric)
            cells.append(_with_bounds(row["scores"][metric], "value"))
            cells.append(_difference(gain) if gain else "")
        rows.append(cells)
    return "\n".join(markdown.table(heads, rows))


def between(runs: Sequence[dict[str, Any]]) -> str:
    """Return one line for each two ways of cleaning: the paired differences of their scores in points."""
    lines = []
    for row in runs:
        for other in dict.fromkeys(gain["second"] for gain in row["minus_others"]):
            gains = [(gain["metric"], gain) for gain in row["minus_others"] if gain["second"] == other]
            parts = "; ".join(f"{metric} {_difference(gain)}" for metric, gain in gains)
            lines.append(f"{100 * row['noise']:g}%, {row['arm']} minus {other}: {parts}\n")
    return "".join(lines)


def _difference(gain: dict[str, Any]) -> str:
    return f"{_with_bounds(gain, 'difference', '+')}, p {gain['p_holm']:.2g}"


def _with_bounds(found: dict[str, Any], name: str, sign: str = "") -> str:
    low, value, high = (100 * found[key] for key in ("low", name, "high"))
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_common_options(parser, threads=False)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs, which a later call continues")
    parser.add_argument("--noise", default="0.1,0.2", help="shares of flipped safety labels, and of flipped orders")
    parser.add_argument("--policies", default="drop,flip,soften", help="what is done to contradicted labels")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    program(main)
