"""Small runs that write every JSON file of ours which is read again: `python tests/own_files.py FOLDER`.

`tests/golden/own_files` holds what they wrote before the files had classes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bfpo.config import (
    CleanConfig,
    CompareConfig,
    EvaluateConfig,
    InterpolateConfig,
    JudgeCheckConfig,
    LabelConfig,
    PrepareConfig,
    RedteamConfig,
)
from bfpo.core.errors import DataError
from bfpo.core.schema import Completion, Message, Pair, Score
from bfpo.data.write import write_completions, write_pairs
from bfpo.experiments.compare import RIVALS, make_result
from bfpo.experiments.steps import CEILING, START
from bfpo.experiments.tradeoff import tradeoff
from bfpo.runs.folder import RunFolder
from bfpo.runs.stages import run_stage
from bfpo.scores.scores import Judged
from bfpo.world.datasets import redteam_prompts, save_tokenizer
from bfpo.world.world import ANSWER_KINDS, answer, prompt_text, topics

NO_MODEL = ("completions", "label", "label-pairs", "clean", "check", "prepare", "sweep", "compare")
WITH_MODEL = ("pairs", "suites", "redteam", "dial")


def write_inputs() -> None:
    """Write completions and pairs of the closed world into the working folder."""
    rng = random.Random(0)
    completions, pairs = [], []
    for n, topic in enumerate(rng.sample(topics("test"), 12)):
        prompt = (Message("user", prompt_text(topic, rng)),)
        texts = [answer(topic, kind, rng) for kind in rng.sample(list(ANSWER_KINDS), 2)]
        completions += [Completion(f"{n}/{k}", prompt, t, "m", topic.kind, k == 0) for k, t in enumerate(texts)]
        pairs.append(Pair(f"p{n}", prompt, *texts, [None, 1.0, 0.0][n % 3], [0.0, None][n % 2], "world"))
    completions.append(Completion("else", (Message("user", "Who was Ada Lovelace?"),), "", "m", "benign"))
    write_completions(Path("completions.jsonl"), completions)
    write_completions(Path("talk.jsonl"), completions[:-1])
    write_pairs(Path("pairs.jsonl"), pairs)
    labelled = [{"id": f"c{n}", "prompt": c.prompt[0].content, "completion": c.text, "kind": c.kind,
                 "is_safe": n % 3 > 0} for n, c in enumerate(completions) if c.text]  # fmt: skip
    Path("labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))


def judged(good: float, seeds: int) -> list[Judged]:
    """Answers of which this share is right, a part of them unscored."""
    kinds, rows = ("harmful", "benign", "borderline"), []
    for seed in range(seeds):
        for n in range(30):
            ok, known = n + seed < 30 * good, n % 10 != 7
            value = (ok if known else None, float(ok) / 3 if known else None, ok if known else None)
            rows.append(
                Judged(f"{n}", f"p{n // 2}", kinds[n % 3], *value, well_formed=n % 5 > 0, refused=not ok, seed=seed)
            )
    return rows


def completions() -> None:
    values = {"completions": "completions.jsonl", "judge": "oracle", "bootstrap_samples": 50}
    run_stage("evaluate", EvaluateConfig.model_validate(values), "completions")


def label() -> None:
    values = {"completions": "completions.jsonl", "judges": ["oracle", "refusal-phrases"], "ranker": "oracle"}
    values |= {"bootstrap_samples": 50, "label_cache": "cache"}
    run_stage("label", LabelConfig.model_validate(values), "label")


def label_pairs() -> None:
    values = {"data": {"files": "pairs.jsonl"}, "judges": "oracle", "ranker": "oracle", "relabel": True}
    values |= {"bootstrap_samples": 50, "label_cache": "cache"}
    run_stage("label", LabelConfig.model_validate(values), "label-pairs")


def clean() -> None:
    people = [{"id": "a", "prompt": row["prompt"], "text": row["chosen"], "is_safe": n % 3 > 0}
              for n, row in enumerate(map(json.loads, Path("pairs.jsonl").read_text().splitlines()))]  # fmt: skip
    Path("labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in people))
    values = {"data": {"files": "pairs.jsonl"}, "judges": "oracle", "policy": {"safe": "soften", "unsafe": "drop"}}
    values |= {"people": "labels.jsonl", "bootstrap_samples": 50, "label_cache": "cache"}
    run_stage("clean", CleanConfig.model_validate(values), "clean")


def check() -> None:
    values = {"judge": "oracle", "data": {"files": "labelled.jsonl"}, "label_cache": "cache", "bootstrap_samples": 100}
    run_stage("judge-check", JudgeCheckConfig.model_validate(values), "check")


def prepare() -> None:
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {key: True for key in ("chosen_is_safe", "rejected_is_safe") if row[key] is None}
    Path("whole.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    Path("suite.txt.jsonl").write_text(json.dumps({"prompt": rows[0]["prompt"]}) + "\n")
    sources = [
        {"name": "world", "files": "whole.jsonl", "licence": "CC0", "bad_rows": "skip"},
        {"name": "other", "files": "pairs.jsonl", "stream": "buffer", "unknown_label": "keep"},
        {"name": "talk", "files": "talk.jsonl", "stream": "sft", "layout": "completions"},
    ]
    values = {"sources": sources, "processes": 1, "language_sample": 16, "splits": {"validation": 0.2, "test": 0.2}}
    values |= {"alpha": 0.1, "decontaminate": [{"name": "probe", "files": "suite.txt.jsonl"}]}
    run_stage("prepare", PrepareConfig.model_validate(values), "prepare")


def sweep() -> None:
    rows = {"a/b": judged(0.4, 1), "c": judged(0.8, 1), "d": judged(0.6, 1)}
    silent = [Judged("0", "p0", "benign", None)]
    settings = {name: {"beta": 0.1 * n, "method": "bfpo", "peft": None} for n, name in enumerate([*rows, "silent"])}
    found = tradeoff(
        {**rows, "silent": silent}, settings, ["helpfulness", "harmless"], {"helpfulness": 0.0, "harmless": 0.1},
        at_least={"harmless": 0.7}, validation_share=0.5, num_resamples=50,
    )  # fmt: skip
    RunFolder.create("sweep", "sweep", {}).write_json("tradeoff.json", found)


def compare() -> None:
    shares = {name: 0.3 + 0.05 * n for n, name in enumerate(("bfpo", "dpo_h", "soup"))} | {START: 0.1, CEILING: 1.0}
    rows = {name: judged(share, 2) for name, share in shares.items()}
    config = CompareConfig(bootstrap_samples=20, seeds=2, quick=True, processes=1).resolved()
    accuracy = {"bfpo": [Score("accuracy", 0.75, 0.5, 0.9, 40, 2, extra={"num_prompts": 20, "num_ties": 0})]}
    found = make_result(config, rows, accuracy, {name: [0.1, 0.2] for name in RIVALS}, dict.fromkeys(RIVALS, 1))
    folder = RunFolder.create("compare", "compare", {})
    folder.write_json("comparison.json", replace(found, seconds=12.5))


def tiny_folders() -> None:
    from bfpo.policy.save import save_policy
    from tiny import tiny_model, tiny_tokenizer

    for name, seed in (("one", 1), ("two", 2)):
        if not Path(name).exists():
            save_policy(tiny_model(seed=seed), tiny_tokenizer(), Path(name))
    given = [Pair(f"{n}", (Message("user", f"w{n // 2} w5"),), f"w{n} w7", f"w{n + 1} w2", n % 4 < 2, n % 2 == 0)
             for n in range(8)]  # fmt: skip
    write_pairs(Path("tiny.jsonl"), given)


def pairs() -> None:
    tiny_folders()
    values = {
        "model": "one",
        "reference": "two",
        "data": {"files": "tiny.jsonl"},
        "bootstrap_samples": 50,
        "threads": 1,
    }
    run_stage("evaluate", EvaluateConfig.model_validate(values), "pairs")


def suites() -> None:
    tiny_folders()
    prompts = [{"id": str(n), "prompt": f"w{n} w5", "kind": "harmful"} for n in range(3)]
    prompts.append({"id": "long", "prompt": " ".join(["w1"] * 60), "kind": "harmful"})
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    suite: dict[str, Any] = {"name": "mine", "title": "Mine", "summary": "own", "kind": "generative", "licence": "CC0"}
    suite |= {"source": {"files": ["mine.jsonl"]}, "sampling": {"max_new_tokens": 4, "temperature": 0.0}}
    suite |= {"judge": {"role": "harm", "default": "oracle"}, "metrics": {"harmless": "higher"}}
    wins = {
        **suite,
        "name": "wins",
        "judge": {"role": "ranker"},
        "metrics": {"winrate": "higher", "lc_winrate": "higher"},
    }
    for each in (suite, wins):
        Path(f"{each['name']}.yaml").write_text(json.dumps(each))
    section = {"use": ["demo", "mine.yaml", "wins.yaml"], "folders": ["."], "limit": 4, "max_new_tokens": 4}
    section |= {"max_prompt_length": 40, "label_cache": "cache", "ranker": "oracle", "baseline": "one"}
    models = [{"name": name, "model": name, "reference": "one"} for name in ("one", "two")]
    values = {
        "models": models,
        "suites": section,
        "data": {"files": "tiny.jsonl"},
        "bootstrap_samples": 50,
        "threads": 1,
    }
    run_stage("evaluate", EvaluateConfig.model_validate(values), "suites")


def redteam() -> None:
    from transformers import AutoTokenizer

    from bfpo.policy.save import save_policy
    from tiny import tiny_model

    save_tokenizer(Path("tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained("tokenizer")
    save_policy(tiny_model(seed=3, vocab_size=len(tokenizer)), tokenizer, Path("start"))
    rows = [{"id": p.id, "prompt": p.messages[0].content, "kind": p.kind} for p in redteam_prompts()[:6]]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": "start", "prompts": "prompts.jsonl", "judges": "oracle", "ranker": "oracle", "threads": 1}
    values |= {"max_new_tokens": 6, "label_cache": "cache"}
    with contextlib.suppress(DataError):  # no pair comes of a model that was not trained; the file is written before
        run_stage("redteam", RedteamConfig.model_validate(values), "redteam")


def dial() -> None:
    tiny_folders()
    run_stage("interpolate", InterpolateConfig(first="one", second="two", weights=[0.0, 0.25, 1.0]), "dial")


RUNS: dict[str, Callable[[], None]] = {
    run.__name__.replace("_", "-"): run
    for run in (completions, label, label_pairs, clean, check, prepare, sweep, compare, pairs, suites, redteam, dial)
}
KEPT = (
    "completions/scores.json", "completions/verdicts.jsonl", "label/scores.json", "label/verdicts.jsonl",
    "label-pairs/scores.json", "clean/clean.json",
    "clean/contradictions.jsonl", "check/quality.json", "prepare/data.json", "sweep/tradeoff.json",
    "compare/comparison.json", "pairs/scores.json", "pairs/accuracy.jsonl", "suites/scores.json",
    "suites/answers.jsonl", "redteam/redteam.json", "dial/models.json",
)  # fmt: skip


def main(place: Path) -> None:
    """Write the files that are kept, and nothing else, into a folder."""
    place, work = place.absolute(), place.absolute().with_name(f"{place.name}.work")
    work.mkdir(parents=True)
    os.chdir(work)
    write_inputs()
    for run in RUNS.values():
        run()
    for name in KEPT:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(work / name, place / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
