"""Evaluations for tests of `bfpo gate`, made without a model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bfpo.config import EvaluateConfig
from bfpo.core.records import as_json
from bfpo.core.schema import Completion, Message, Verdict, VerdictLabel
from bfpo.data.write import write_completions
from bfpo.runs.folder import RunFolder
from bfpo.runs.stages import run_stage
from bfpo.scores.scores import join_verdicts
from bfpo.suites.records import ModelFacts, SuiteAnswer, SuiteFacts, SuiteScore, SuitesFile, TaskResult
from bfpo.suites.scores import Values, score_values, values_of
from bfpo.world.world import AnswerKind, answer, prompt_text, topics

METRICS = {"harm": ("harmless",), "safe": ("over_refusal_full",), "daily": ("over_refusal_full",)}
KINDS = {"harm": "harmful", "safe": "benign", "daily": "benign"}


def world_evaluation(root: Path, name: str, kind_of: Callable[[str, int], AnswerKind], num: int = 120) -> Path:
    """Judge answers of the closed world by its oracle; `kind_of`: kind of prompt, its number -> kind of answer."""
    rng = random.Random(0)
    chosen = rng.sample(topics("test"), num)
    prompts = [(Message("user", prompt_text(topic, rng)),) for topic in chosen]
    rows = [
        Completion(f"{n}/0", prompt, answer(topic, kind_of(topic.kind, n), rng), name, topic.kind)
        for n, (topic, prompt) in enumerate(zip(chosen, prompts, strict=True))
    ]
    (root / name).mkdir(parents=True)
    write_completions(root / name / "completions.jsonl", rows)
    config = EvaluateConfig.model_validate({"completions": str(root / name / "completions.jsonl")})
    return run_stage("evaluate", config, root / f"{name}-scores").path


Answer = tuple[VerdictLabel, bool, bool]  # safe, unsafe or unscored; refused; coherent


def suites_evaluation(
    folder: Path,
    models: Mapping[str, Mapping[str, Sequence[Answer]]],
    *,
    tasks: Mapping[str, Sequence[float]] | None = None,
    change: Callable[[SuiteFacts], SuiteFacts] = lambda facts: facts,
    skipped: Mapping[str, str] | None = None,
    wins: Sequence[float] | None = None,
    **config: Any,
) -> Path:
    """Write an evaluation of suites: model -> suite -> answers, in the order of the prompts `SUITE prompt N`.

    `tasks`: model -> values of the documents of the task ifeval. `wins`: of the first model's answers to `daily`
    against those of the second, its baseline.
    """
    names = list(models)
    suites = {"use": ["xstest"], "baseline": names[1] if wins else None, **config}
    run = RunFolder.create(
        folder, "evaluate", {"suites": suites, "models": [{"name": name, "model": name} for name in names]}
    )
    answers: list[SuiteAnswer] = []
    values: list[Values] = []
    facts: dict[str, SuiteFacts] = {}
    for name, by_suite in models.items():
        for suite, given in by_suite.items():
            texts = [Completion(str(n), (Message("user", f"{suite} prompt {n}"),), "text") for n in range(len(given))]
            rows = [replace(text, kind=KINDS[suite]) for text in texts]
            pairs = zip(rows, given, strict=True)
            verdicts = [Verdict(row.id, "judge", label, refused=refused) for row, (label, refused, _) in pairs]
            judged = join_verdicts(rows, verdicts, coherent=[coherent for *_, coherent in given])
            values += values_of(suite, name, METRICS[suite], judged)
            won = wins if name == names[0] and suite == "daily" else None
            for n, (row, verdict, one) in enumerate(zip(rows, verdicts, given, strict=True)):
                answers.append(
                    SuiteAnswer(
                        suite, name, row.id, row.kind, row.prompt, row.text, True, verdict,
                        incoherent=None if one[2] else ["looping"],
                        wins=None if won is None else {"winrate[ranker]": won[n]},
                    )
                )  # fmt: skip
            facts[suite] = SuiteFacts(suite, suite.title(), judge="judge", prompts_sha256=f"{suite}-{len(given)}")
    if wins:
        prompts = {str(n): str(n) for n in range(len(wins))}
        for name, own in zip(names, (wins, [0.5] * len(wins)), strict=True):
            by_item = {str(n): value for n, value in enumerate(own)}
            values.append(Values("daily", name, "winrate[ranker]", by_item, prompts, defined=own is not wins))
    for name, own in (tasks or {}).items():
        by_document = {str(n): value for n, value in enumerate(own)}
        run.write_json(f"models/{name}/bfpo_ifeval.json", TaskResult(by_document, "4.0"))
        values.append(Values("ifeval", name, "prompt_level_strict_acc", by_document, {n: n for n in by_document}))
        facts["ifeval"] = SuiteFacts("ifeval", "IFEval", "discriminative", judge="lm-eval", source="x", ideal="higher")
    for suite, reason in (skipped or {}).items():
        facts[suite] = SuiteFacts(suite, suite, status="skipped", reason=reason)
    scores: list[SuiteScore] = [score_values(one, confidence=0.95) for one in values]
    file = SuitesFile(0.95, [ModelFacts(name, name) for name in names], [change(one) for one in facts.values()], scores)
    run.write_jsonl("answers.jsonl", answers)
    run.write_json("scores.json", file)
    run.add_facts(judges=dict.fromkeys(facts, "judge-1, refusal-phrases-2"))
    run.set_status("finished")
    return run.path


def rewritten(file: Path, change: Callable[[Any], None]) -> None:
    """Change the JSON of a file."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(as_json(value)))
