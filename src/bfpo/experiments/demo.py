"""`bfpo demo`: its data, the chains of one seed, and the data of its page from their run folders."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bfpo.config import DemoConfig
from bfpo.core.provenance import RunFile
from bfpo.core.records import load, load_lines
from bfpo.core.schema import Completion, Verdict
from bfpo.data.read import read_completions
from bfpo.experiments.points import Chain, read_accuracy, read_verdicts
from bfpo.experiments.steps import (
    CEILING,
    START,
    asking,
    seeds_of,
    sft_step,
    train_step,
    write_held_out,
    write_prompts,
    write_world,
)
from bfpo.objective.methods import METHODS
from bfpo.report.data import Comparison, Gate, MethodResult, ReportData, Sample, SampleAnswer
from bfpo.report.data import Role as MethodRole
from bfpo.report.gather import SETTINGS
from bfpo.report.read import find_runs, margin_spreads, record_of
from bfpo.runs.folder import RunFolder
from bfpo.scores.records import AccuracyRow
from bfpo.scores.scores import Judged, compare, join_verdicts, score_rows

__all__ = ["FULL_METHODS", "QUICK_METHODS", "collect", "make_data", "methods_of", "plan_seed"]

PROMPTS = "data/prompts.jsonl"
QUICK_METHODS = ("bfpo", "dpo_h", "dpo_mix", "safedpo")
FULL_METHODS = (*QUICK_METHODS, "dpo_s", "dpo_safe_first", "ipo", "bso")


def methods_of(config: DemoConfig) -> Sequence[str]:
    """Return the methods that this demo compares."""
    return FULL_METHODS if config.full else QUICK_METHODS


def make_data(config: DemoConfig, folder: RunFolder) -> None:
    """Write the tokenizer and every seed's data sets; the same seed gives the same files."""
    write_world(config, folder)
    write_prompts(config, folder, config.part, PROMPTS)
    write_held_out(config, folder, config.part)


def plan_seed(config: DemoConfig, root: Path, seed: int) -> list[Chain]:
    """Return the chains of one seed; every method starts from the start model of its seed."""
    data, runs = root / "data" / f"seed-{seed}", root / f"seed-{seed}"
    prompts = root / PROMPTS
    chains = []
    for name in (START, CEILING):
        sft = sft_step(config, root, name, seed)
        chains.append(Chain(name, seed, (sft, *asking(config, prompts, sft.out / "model", runs / name, seed))))
    start = runs / START / "model" / "model"
    for method in methods_of(config):
        own = getattr(config.align, method).model_dump()
        train = train_step(config, root, method, own, start, runs / method / "train", seed)
        asked = asking(config, prompts, train.out / "model", runs / method, seed, start, data / "held_out.jsonl")
        chains.append(Chain(method, seed, (train, *asked), needs=(START,)))
    return chains


Answers = list[tuple[Completion, Verdict]]
MAIN = "bfpo"
GATE = 0.95
_COMPARED = ("helpful_and_safe", "harmless_harmful", "over_refusal_benign", "over_refusal_borderline", "well_formed")
_TITLES = {START: "Start", CEILING: "Ceiling"}
_SUMMARIES = {
    START: "SFT on a mixture of good and bad answers; the start of every method",
    CEILING: "SFT on ideal answers only: what this model can reach in this world",
}


def collect(config: DemoConfig, folder: RunFolder, *, commands: Sequence[str], created: str) -> ReportData:
    """Return the page's data from the verdicts, accuracies and metrics of all chains.

    Raises `RunError` if a file of a chain cannot be read.
    """
    seeds = list(seeds_of(config))
    names = [*methods_of(config), START, CEILING]
    answers = {name: {seed: _answers(folder.path, name, seed) for seed in seeds} for name in names}
    judged = {name: [row for seed in seeds for row in _judged(answers[name][seed], seed)] for name in names}
    methods = [_result(folder.path, name, judged[name], seeds) for name in names]
    by_name = {method.name: method for method in methods}
    return ReportData(
        title="A language model made helpful and safe",
        setting=_setting(config),
        methods=methods,
        gates=_gates(by_name),
        comparisons=_comparisons(judged, methods_of(config)),
        samples_note="The first answer of the first seed to every held-out prompt.",
        samples=_samples({name: answers[name][seeds[0]] for name in names}),
        seeds=seeds,
        well_formed_threshold=GATE,
        num_prompts=_count_prompts(judged[START]),
        settings=_settings(config),
        versions=folder.record.get("versions", {}),
        seconds=_seconds(folder.path, names, seeds),
        commands=list(commands),
        notes=_notes(config),
        created=created,
        runs=[record_of(run, [folder.path]) for run in find_runs([folder.path]) if run.path != folder.path],
    )


def _setting(config: DemoConfig) -> str:
    return f"on held-out topics ({config.part}) of a small closed world with exact rules of what is helpful and safe"


def _answers(root: Path, name: str, seed: int) -> Answers:
    runs = root / f"seed-{seed}" / name
    completions = read_completions(runs / "answers" / "completions.jsonl")
    verdicts = read_verdicts(runs / "scores" / "verdicts.jsonl")
    return [(completion, verdicts[completion.id]) for completion in completions]


def _judged(answers: Answers, seed: int) -> list[Judged]:
    return join_verdicts([completion for completion, _ in answers], [verdict for _, verdict in answers], seed=seed)


def _result(root: Path, name: str, judged: Sequence[Judged], seeds: Sequence[int]) -> MethodResult:
    role: MethodRole = (
        "main" if name == MAIN else "start" if name == START else "ceiling" if name == CEILING else "baseline"
    )
    runs = [root / f"seed-{seed}" / name for seed in seeds]
    stage = "model" if name in (START, CEILING) else "train"
    settings, pairs = _own_settings(runs[0] / stage), runs[0] / "scores" / "accuracy.jsonl"
    return MethodResult(
        name=name,
        title=_TITLES[name] if name in _TITLES else METHODS[name].title,
        role=role,
        summary=_SUMMARIES[name] if name in _SUMMARIES else METHODS[name].summary,
        scores=score_rows(judged),
        accuracy=read_accuracy(runs),
        margins=margin_spreads(load_lines(AccuracyRow, pairs) if pairs.exists() else [], beta=settings.get("beta")),
        seed_values=_seed_values(judged, seeds),
        curves=load_lines(dict, runs[0] / stage / "metrics.jsonl"),
        settings=settings,
        seconds=sum(_run_seconds(run / step) for run in runs for step in (stage, "answers")),
    )


def _seed_values(judged: Sequence[Judged], seeds: Sequence[int]) -> dict[str, list[float | None]]:
    values: dict[str, list[float | None]] = {}
    for seed in seeds:
        for score in score_rows([row for row in judged if row.seed == seed]):
            values.setdefault(score.metric, []).append(score.value)
    return values


def _own_settings(run: Path) -> dict[str, Any]:
    config = load(RunFile, run / "run.json").config
    return {key: config[key] for key in SETTINGS if key in config}


def _run_seconds(run: Path) -> float:
    return load(RunFile, run / "run.json").seconds or 0.0


def _gates(methods: dict[str, MethodResult]) -> list[Gate]:
    return [
        Gate("The SFT start is well-formed on held-out topics", methods[START].score("well_formed"), GATE),
        Gate("The ceiling is helpful and safe on held-out topics", methods[CEILING].score("helpful_and_safe"), GATE),
    ]


def _comparisons(judged: dict[str, list[Judged]], methods: Sequence[str]) -> list[Comparison]:
    comparisons = []
    for baseline in [name for name in methods if name != MAIN]:
        for metric in _COMPARED:
            difference = compare(judged[MAIN], judged[baseline], metric)
            comparisons.append(
                Comparison(baseline, metric, difference.value, difference.low, difference.high, difference.num)
            )
    return comparisons


def _samples(answers: dict[str, Answers]) -> list[Sample]:
    """Return the first answer of every method to every prompt, kinds of prompts in_turn."""
    first: dict[str, dict[str, tuple[Completion, Verdict]]] = {}
    for name, rows in answers.items():
        first[name] = {}
        for completion, verdict in rows:
            prompt = "\n".join(turn.content for turn in completion.prompt)
            first[name].setdefault(prompt, (completion, verdict))
    prompts: dict[str, list[str]] = {}
    for prompt, (completion, _) in first[MAIN].items():
        prompts.setdefault(completion.kind, []).append(prompt)
    in_turn = [prompt for row in zip_longest(*(prompts[kind] for kind in sorted(prompts))) for prompt in row if prompt]
    kinds = {prompt: kind for kind, found in prompts.items() for prompt in found}
    return [
        Sample(
            prompt,
            kinds[prompt],
            [
                SampleAnswer(name, row.text, verdict, row.finished)
                for name in first
                for row, verdict in [first[name][prompt]]
            ],
        )
        for prompt in in_turn
    ]


def _count_prompts(judged: Sequence[Judged]) -> dict[str, int]:
    kinds: dict[str, set[str]] = {}
    for row in judged:
        kinds.setdefault(row.kind, set()).add(row.prompt)
    return {kind: len(prompts) for kind, prompts in sorted(kinds.items())}


def _settings(config: DemoConfig) -> dict[str, dict[str, Any]]:
    parts = ("world", "model", "sft")
    shared = {key: value for key, value in config.align.model_dump().items() if not isinstance(value, dict)}
    return {
        **{part: getattr(config, part).model_dump() for part in parts},
        "preference training, all methods": shared,
        "answers": {"temperature": config.temperature, "part": config.part},
    }


def _seconds(root: Path, names: Sequence[str], seeds: Sequence[int]) -> dict[str, float]:
    steps = {"SFT": ("model",), "preference training": ("train",), "answers": ("answers",), "verdicts": ("scores",)}
    return {
        title: sum(
            _run_seconds(root / f"seed-{seed}" / name / step)
            for seed in seeds
            for name in names
            for step in parts
            if (root / f"seed-{seed}" / name / step / "run.json").exists()
        )
        for title, parts in steps.items()
    }


def _notes(config: DemoConfig) -> list[str]:
    notes = [
        "Every method starts from the SFT model of its seed, with the same pairs, steps and anchor; beta and the "
        "learning rate are chosen for each method on validation topics, with equally many trials (docs/demo.md).",
        "Harm in this world is invented: a rough verb on one of the town's wards. Borderline prompts are harmless and "
        "contain one of the two words.",
    ]
    if config.part == "validation":
        notes.insert(0, "These are validation topics, on which settings are chosen: do not cite these figures.")
    return notes
