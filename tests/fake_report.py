"""A made-up report, for tests and for looking at: `python tests/fake_report.py FOLDER [--full]`."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import replace

from bfpo.core.schema import Completion, Message, Score
from bfpo.data.labels import CELLS
from bfpo.judges.judges import OracleJudge
from bfpo.report.data import Comparison, Gate, MethodResult, ReportData, Sample, SampleAnswer
from bfpo.report.page import write_report
from bfpo.scores.scores import Judged, compare, score_rows
from bfpo.stats import rate_interval
from bfpo.world.world import ANSWER_KINDS, Topic, answer, ideal_kind, prompt_text, topics

# name: title, role, share of right answers, harmless share, refusals, well-formed share
METHODS = {
    "start": ("Start (SFT)", "start", 0.28, 0.42, 0.25, 0.97),
    "bfpo": ("BFPO", "main", 0.71, 0.985, 0.06, 0.97),
    "dpo_h": ("DPO-H", "baseline", 0.44, 0.31, 0.02, 0.96),
    "dpo_mix": ("DPO-mix", "baseline", 0.49, 0.62, 0.08, 0.88),
    "safedpo": ("SafeDPO", "baseline", 0.55, 0.99, 0.24, 0.965),
    "ipo": ("IPO", "baseline", 0.42, 0.36, 0.03, 0.97),
    "dpo_s": ("DPO-S", "baseline", 0.38, 0.98, 0.41, 0.91),
    "dpo_safe_first": ("DPO safe-first", "baseline", 0.57, 0.97, 0.2, 0.95),
    "bso": ("BSO", "baseline", 0.54, 0.985, 0.25, 0.955),
    "bso_sba": ("BSO (SBA)", "baseline", 0.53, 0.98, 0.22, 0.94),
    "ceiling": ("Ceiling", "ceiling", 0.97, 1.0, 0.0, 0.99),
}
QUICK = ("start", "bfpo", "dpo_h", "dpo_mix", "safedpo", "ceiling")
TARGETS = dict(zip(CELLS, (0.5, 1.0, -1.0, -0.5), strict=True))


def judged(name: str, seeds: int, num_prompts: int = 300) -> list[Judged]:
    _, _, right, harmless, refusal, formed = METHODS[name]
    rng = random.Random(name)
    rows = []
    for seed in range(seeds):
        shift = rng.gauss(0, 0.03)
        for number in range(num_prompts):
            kind = ("benign", "borderline", "harmful")[number % 3]
            well_formed = rng.random() < formed
            safe = kind != "harmful" or rng.random() < harmless
            good = well_formed and safe and rng.random() < (right + shift) / formed
            refused = rng.random() < (refusal * (2 if kind == "borderline" else 1) if kind != "harmful" else 0.5)
            helpful = 1.0 if good else 0.1 if refused else 0.35 * well_formed
            rows.append(
                Judged(
                    str(number), str(number), kind, safe, helpful, good, well_formed, refused and not good, seed=seed
                )
            )
    return rows


def curves(name: str) -> list[dict[str, float]]:
    rng = random.Random(name)
    rows = []
    for step in range(0, 901, 10):
        progress = 1 - math.exp(-step / 250)
        row = {"step": step, "main/loss_at_start": 0.62}
        for cell in CELLS:
            pull = (
                TARGETS[cell] if name == "bfpo" else abs(TARGETS[cell]) if name != "safedpo" else max(TARGETS[cell], 0)
            )
            row[f"main/{cell}/beta_margin"] = pull * 0.85 * progress + rng.gauss(0, 0.1 * progress)
            if name in ("bfpo", "ipo"):
                row[f"main/{cell}/target"] = TARGETS[cell] if name == "bfpo" else 0.5
        row["main/normalised_loss"] = 0.62 * (1 - 0.8 * progress) + rng.gauss(0, 0.03)
        row["main/favoured_drift_per_token"] = {"dpo_h": -0.5, "dpo_mix": -0.8}.get(name, -0.05) * progress
        rows.append(row)
    return rows


def accuracy(name: str) -> list[Score]:
    rng = random.Random(name + "accuracy")
    scores = []
    for cell in (None, *CELLS):
        metric = "accuracy" if cell is None else f"accuracy_{cell.replace('-', '_')}"
        if name == "safedpo" and cell == "unsafe-unsafe":
            scores.append(Score(metric, None, None, None, 0, unscored=150))
            continue
        rate = 0.95 if name == "bfpo" else 0.9 if cell in ("safe-safe", "safe-unsafe") else 0.2
        hits = [rng.random() < rate for _ in range(150)]
        interval = rate_interval(hits, list(range(150)))
        scores.append(Score(metric, interval.value, interval.low, interval.high, interval.num))
    return scores


def samples(names: list[str]) -> list[Sample]:
    rng = random.Random(3)
    pool = topics("test")
    by_kind = {kind: [topic for topic in pool if topic.kind == kind] for kind in ("benign", "borderline", "harmful")}
    found = []
    for kind in ("benign", "borderline", "harmful") * 3:
        topic: Topic = rng.choice(by_kind[kind])
        question = prompt_text(topic, rng)
        answers = []
        for name in names:
            best = name == "ceiling" or rng.random() < METHODS[name][2]
            text = answer(topic, ideal_kind(topic.kind) if best else rng.choice(ANSWER_KINDS), rng)
            if rng.random() < 0.08:
                text = text[: len(text) // 2] + " the the the brush"
            completion = Completion("x", (Message("user", question),), text)
            answers.append(SampleAnswer(name, text, OracleJudge().judge([completion])[0], finished=best))
        found.append(Sample(question, kind, answers))
    return found


def fake_report(*, full: bool = False, only: Sequence[str] = QUICK) -> ReportData:
    names, seeds = (list(METHODS), 3) if full else (list(only), 1)
    rows = {name: judged(name, seeds) for name in names}
    methods = []
    for name in names:
        title, role, *_ = METHODS[name]
        by_seed = [
            {s.metric: s.value for s in score_rows([r for r in rows[name] if r.seed == seed])} for seed in range(seeds)
        ]
        trained = role in ("main", "baseline")
        methods.append(
            MethodResult(
                name=name,
                title=title,
                role=role,  # type: ignore[arg-type]
                summary={"bfpo": "two factors, one squared loss", "start": "before preference training"}.get(name, ""),
                scores=score_rows(rows[name]),
                accuracy=accuracy(name) if trained else [],
                seed_values={metric: [values[metric] for values in by_seed] for metric in by_seed[0]},
                curves=curves(name) if trained else [],
                settings={"beta": 0.1, "anchor_weight": 0.3} if trained else {},
                seconds=74.2 if trained else None,
            )
        )
    comparisons = []
    for name in names:
        if METHODS[name][1] == "baseline":
            found = compare(rows["bfpo"], rows[name])
            comparisons.append(Comparison(name, "helpful_and_safe", found.value, found.low, found.high, found.num))
    of = {method.name: method for method in methods}
    return ReportData(
        title="bfpo demo",
        setting="a small closed world with exact oracles, a model of 0.9 million parameters trained here",
        methods=methods,
        gates=[
            Gate("The start model writes well-formed text on held-out topics", of["start"].score("well_formed"), 0.95),
            Gate("A model trained on ideal answers is helpful and safe", of["ceiling"].score("helpful_and_safe"), 0.95),
        ],
        comparisons=comparisons,
        samples=samples(names),
        samples_note="Drawn at random from the held-out prompts, three of each kind.",
        seeds=list(range(seeds)),
        num_prompts={"benign": 100, "borderline": 100, "harmful": 100},
        settings={
            "Data": {"main pairs": 6000, "buffer pairs": 6000, "SFT completions": 8000, "test prompts": 300},
            "Preference runs": {"steps": 900, "learning_rate": 1e-4, "pairs per step": "16 + 16", "anchor_weight": 0.3},
        },
        versions={"python": "3.11.9", "bfpo": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": None},
        seconds={"data": 1.2, "SFT": 61.0, "all": 388.0},
        commands=["bfpo demo --out runs/demo"],
        notes=["Settings were chosen on validation topics, the figures are from test topics."],
        created="2026-11-23 23:50 UTC",
    )


def hostile_report() -> ReportData:
    """Everything that a model or a file could write in place of text."""
    script = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    evil = script + "\x1b[31mred\x1b[0m\x07 \u202egnp.exe ]](javascript:alert(3)) `` ``` | \\ {{ 7*7 }} </style></svg>"
    data = fake_report(only=("start", "bfpo", "dpo_h", "ceiling"))
    return replace(
        data,
        title=evil,
        setting=evil,
        methods=[
            replace(m, title=f"{m.title} $\\frac{{1}}{{</svg><script>x()</script>", summary=evil) for m in data.methods
        ],
        samples=[
            Sample(
                evil, '"><b onclick=x>', [SampleAnswer("bfpo", evil), SampleAnswer("dpo_h", "", None, finished=False)]
            )
        ],
        notes=[evil],
        commands=[evil],
        settings={evil: {evil: evil}},
        versions={evil: evil},
        num_prompts={evil: 3},
    )


if __name__ == "__main__":
    write_report(fake_report(full="--full" in sys.argv), sys.argv[1])
