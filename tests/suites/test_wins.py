"""Win rates by a ranker that was trained: of a model against itself, turned round, and at equal length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bfpo.config import EvaluateConfig
from bfpo.core.schema import Message, Pair
from bfpo.judges.judges import make_ranker
from bfpo.judges.ngrams import NgramSettings, fit_ranker
from bfpo.judges.settings import RankerConfig
from bfpo.policy.save import save_policy
from bfpo.runs.stages import run_stage
from bfpo.suites.evaluations import read_evaluation
from tiny import tiny_model, tiny_tokenizer

SUITE = {
    "name": "wins",
    "title": "Wins",
    "summary": "prompts of my own",
    "kind": "generative",
    "licence": "CC0",
    "source": {"files": ["wins.jsonl"]},
    "judge": {"role": "ranker"},
    "metrics": {"winrate": "higher", "lc_winrate": "higher"},
    "sampling": {"max_new_tokens": 6, "temperature": 0.0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wins")
    for seed, name in enumerate(("one", "two"), start=1):
        save_policy(tiny_model(seed=seed), tiny_tokenizer(), root / name)
    pairs = [Pair(str(n), (Message("user", "w1"),), f"w{n} w{n + 1}", f"w{n + 40} w3 w4") for n in range(2, 40)]
    fit_ranker(pairs, NgramSettings(), name="trained").save(root / "ranker", {})
    prompts = [{"id": str(n), "prompt": f"w{n} w5"} for n in range(32)]
    (root / "wins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (root / "wins.yaml").write_text(yaml.safe_dump(SUITE))
    return root


def scores(root: Path, out: str, baseline: str, **suites: Any) -> dict[tuple[str, str], dict[str, Any]]:
    section = {"use": [str(root / "wins.yaml")], "folders": [str(root)], "label_cache": str(root / "cache")}
    section |= {"ranker": str(root / "ranker"), "baseline": baseline, **suites}
    models = [{"name": n, "model": str(root / f)} for n, f in (("one", "one"), ("again", "one"), ("two", "two"))]
    config = EvaluateConfig(models=models, suites=section, bootstrap_samples=20, threads=1)  # type: ignore[arg-type]
    run_stage("evaluate", config, root / out)
    return {(s["model"], s["metric"]): s for s in json.loads((root / out / "scores.json").read_text())["scores"]}


def test_against_itself_a_half_and_turned_round_the_rest(root: Path) -> None:
    of_one, of_two = scores(root, "of-one", "one"), scores(root, "of-two", "two")
    plain, controlled = "winrate[trained]", "lc_winrate[trained]"
    names = ("again", "two", "one")
    assert list(of_one) == [(name, metric) for metric in (plain, controlled) for name in names]
    for metric in (plain, controlled):
        assert of_one["again", metric]["value"] == 0.5
        assert abs(of_one["two", metric]["value"] - 0.5) > 0.05
        assert of_two["one", metric]["value"] == pytest.approx(1 - of_one["two", metric]["value"], abs=1e-6)
        assert of_two["one", metric] == of_two["again", metric] | {"model": "one"}
        # The baseline has a half by definition, without uncertainty.
        own = of_one["one", metric]
        assert (own["value"], own["low"], own["high"], own["num"], own["unscored"]) == (0.5, 0.5, 0.5, 32, 0)
        assert (of_one["two", metric]["num"], of_one["two", metric]["unscored"]) == (32, 0)
    assert abs(of_one["two", controlled]["value"] - of_one["two", plain]["value"]) > 1e-3  # their lengths differ
    rows = json.loads((root / "of-one" / "scores.json").read_text())["comparisons"]
    compared = {(row["first"], row["second"]): row for row in rows}
    assert list(compared) == [("again", "two"), ("again", "one"), ("two", "one")]
    assert all((row["metric"], row["num"]) == (plain, 32) for row in rows)
    lead = of_one["two", plain]["value"] - 0.5
    assert compared["again", "two"]["difference"] == pytest.approx(-lead)
    assert compared["two", "one"]["difference"] == pytest.approx(lead)
    same = compared["again", "one"]
    assert (same["difference"], same["p_value"]) == (0.0, 1.0)
    assert same["low"] < 0 < same["high"]


def test_the_version_of_the_ranker_is_recorded(root: Path) -> None:
    scores(root, "version", "one", limit=2)
    ranker = make_ranker(RankerConfig.model_validate(str(root / "ranker")))
    assert json.loads((root / "version" / "run.json").read_text())["judges"]["ranker"] == ranker.version
    assert read_evaluation(root / "version" / "models" / "two").suites["wins"].ranker == ranker.version


def test_too_few_prompts_leave_the_rate_at_equal_length_unmeasured(root: Path) -> None:
    found = scores(root, "few", "one", limit=8)
    assert found["two", "winrate[trained]"]["num"] == 8
    row = found["two", "lc_winrate[trained]"]
    assert (row["value"], row["num"], row["unscored"]) == (None, 0, 8)
    assert "8 of two unscored: the win rate at equal length needs 30" in (root / "few" / "scores.md").read_text()
