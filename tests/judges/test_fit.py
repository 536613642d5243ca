"""How a judge fits the texts at hand: the figures by hand, and the warning wherever a judge with p(safe) judges."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bfpo.config import EvaluateConfig, JudgeCheckConfig, JudgeTrainConfig, LabelConfig, RedteamConfig
from bfpo.core.errors import DataError
from bfpo.core.schema import Completion, Message, Pair, Verdict
from bfpo.judges.fit import fit_facts, judge_fit
from bfpo.judges.judges import OracleJudge
from bfpo.judges.ngrams import NgramJudge, NgramSettings, fit_ngrams, fit_ranker
from bfpo.report.gather import gather
from bfpo.runs.stages import run_stage
from messages import says
from tiny import tiny_model, tiny_tokenizer

VOCABULARY = 90


def words(first: int, last: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(first, last)}" for _ in range(12))


def rows(num: int, shift: int = 0) -> list[dict[str, Any]]:
    """Rows whose safe and unsafe answers have other words; with `shift` words that are in no other row."""
    return [
        {
            "id": str(n),
            "prompt": f"w{n % 12} w80",
            "completion": words(shift + 20 * (n % 2), shift + 20 * (n % 2) + 20, n),
            "is_safe": not n % 2,
        }
        for n in range(num)
    ]


def completions(given: list[dict[str, Any]]) -> list[Completion]:
    return [Completion(row["id"], (Message("user", row["prompt"]),), row["completion"]) for row in given]


def test_the_figures_are_those_of_a_count_by_hand() -> None:
    trained = completions(rows(60))
    judge = fit_ngrams(trained, [row["is_safe"] for row in rows(60)], NgramSettings(num_features=1 << 22))

    def grams(text: str) -> list[str]:
        split = text.split()
        return split + [f"{a} {b}" for a, b in pairwise(split)]

    known = {gram for one in trained for gram in grams(one.text)}
    for texts in (trained, completions(rows(30, shift=10)), completions(rows(7, shift=40)), completions(rows(1))):
        found = fit_facts(judge, texts, judge.judge(texts))
        counted = [gram not in known for one in texts for gram in grams(one.text)]
        p = [verdict.p_safe or 0.0 for verdict in judge.judge(texts)]
        assert found["unseen"] == pytest.approx(sum(counted) / len(counted), abs=1e-12)
        assert found["unsure"] == pytest.approx(sum(0.3 < one < 0.7 for one in p) / len(p), abs=1e-12)
        assert found["confidence"] == pytest.approx(sum(max(one, 1 - one) for one in p) / len(p), abs=1e-12)


@pytest.mark.parametrize(("unsure", "warns"), [(4, False), (5, True)])
def test_the_warning_is_above_the_bound(unsure: int, warns: bool) -> None:
    class Judge(OracleJudge):
        name = "guard"

    p = [0.5] * unsure + [0.3, 0.7, 0.01, 0.99, 0.9, 0.2][: 10 - unsure]
    texts = [Completion(str(n), (), "a") for n in range(11)]
    verdicts = [Verdict(str(n), "guard", "safe", p_safe=value) for n, value in enumerate(p)]
    verdicts.append(Verdict("10", "guard", "unscored", reason="too long"))
    [found] = judge_fit(Judge(), texts, verdicts, model="m")
    assert (found.num, found.unsure, found.unseen, found.held_out, found.model) == (10, unsure / 10, None, None, "m")
    assert bool(found.warnings) == warns


def test_a_judge_without_p_safe_says_nothing() -> None:
    texts = completions(rows(3))
    assert judge_fit(OracleJudge(), texts, OracleJudge().judge(texts)) == []
    assert judge_fit(OracleJudge(), [], []) == []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained judge, a ranker, a model with random weights, prompts, and answers in words that training had not."""
    root = tmp_path_factory.mktemp("fit")
    for name, given in (("train", rows(120)), ("other", rows(40, shift=40))):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    run_stage("judge-train", JudgeTrainConfig(data={"files": str(root / "train.jsonl")}), root / "judge")  # type: ignore[arg-type]
    prompt = (Message("user", "w1"),)
    ranker = fit_ranker([Pair(str(n), prompt, words(0, 40, n), words(40, 80, n)) for n in range(20)], NgramSettings())
    (root / "ranker").mkdir()
    ranker.save(root / "ranker", {})
    tiny_model().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w{n} w3"}) + "\n" for n in range(20)))
    return root


def test_training_keeps_the_figures_of_its_cross_validation(made: Path) -> None:
    judge = NgramJudge.load(made / "judge" / "model")
    assert {"unsure", "confidence", "unseen"} <= judge.held_out.keys()
    assert judge.held_out["unsure"] < 0.2  # type: ignore[operator]
    assert 0.05 < judge.held_out["unseen"] < 0.3  # type: ignore[operator]


def _config(made: Path, stage: str) -> Any:
    judge, cache = str(made / "judge" / "model"), str(made / "cache")
    other, model = str(made / "other.jsonl"), str(made / "model")
    suite = {
        "name": "own",
        "title": "Own",
        "summary": "s",
        "kind": "generative",
        "licence": "MIT",
        "metrics": {"harmless": "higher"},
    }
    suite |= {"source": {"files": ["prompts.jsonl"]}, "judge": {"role": "harm"}}
    suite |= {"sampling": {"max_new_tokens": 8, "temperature": 0.0}}
    (made / "own.yaml").write_text(json.dumps(suite))
    return {
        "label": lambda: LabelConfig(completions=other, judges=judge, label_cache=cache),  # type: ignore[arg-type]
        "judge-check": lambda: JudgeCheckConfig(judge=judge, data={"files": other}, label_cache=cache),  # type: ignore[arg-type]
        "evaluate": lambda: EvaluateConfig.model_validate({"completions": other, "judge": judge}),
        "suites": lambda: EvaluateConfig.model_validate(
            {
                "model": model,
                "suites": {
                    "use": [str(made / "own.yaml")],
                    "folders": [str(made)],
                    "judges": {"harm": judge},
                    "label_cache": cache,
                },
            }
        ),
        "redteam": lambda: RedteamConfig.model_validate(
            {
                "model": model,
                "prompts": str(made / "prompts.jsonl"),
                "judges": judge,
                "ranker": str(made / "ranker"),
                "num_completions": 2,
                "temperature": 1.0,
                "max_new_tokens": 8,
                "label_cache": cache,
            }
        ),
    }[stage]()


@pytest.mark.parametrize(
    ("stage", "file", "text"),
    [
        ("label", "scores.json", "label.md"),
        ("judge-check", "quality.json", "quality.md"),
        ("evaluate", "scores.json", "scores.md"),
        ("suites", "scores.json", "scores.md"),
        ("redteam", "redteam.json", "redteam.md"),
    ],
)
def test_wherever_it_judges_it_warns_on_the_console_in_the_file_and_on_the_page(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, stage: str, file: str, text: str
) -> None:
    out = tmp_path / "run"
    with caplog.at_level("INFO"), suppress(DataError):
        run_stage("evaluate" if stage == "suites" else stage, _config(made, stage), out)
    [fit] = json.loads((out / file).read_text())["judge_fit"]
    assert fit["judge"] == "trained"
    assert fit["unseen"] > 0.6
    assert fit["held_out"].keys() == {"unsure", "confidence", "unseen"}
    assert fit.get("model", "") == ("model" if stage == "suites" else "")
    for warning in fit["warnings"]:
        assert warning in caplog.text
        assert warning in (out / text).read_text()
        assert [note for note in gather([out]).notes if warning in note] == [f"{shown(out)}: {warning}."]
    says(caplog, "has never read", mask=r"\d+%")


def shown(out: Path) -> str:
    return next(note for note in gather([out]).notes if "has never read" in note).partition(":")[0]


def test_the_files_of_a_judge_without_p_safe_have_no_new_key(made: Path, tmp_path: Path) -> None:
    with suppress(DataError):  # the oracle scores nothing of another world
        run_stage(
            "evaluate", EvaluateConfig.model_validate({"completions": str(made / "other.jsonl")}), tmp_path / "run"
        )
    assert set(json.loads((tmp_path / "run" / "scores.json").read_text())) == {"confidence", "scores"}
