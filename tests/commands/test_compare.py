"""The comparison: what each rival is made of, that trials are equal in number, and the table of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bfpo.commands.compare import NUM_TRIALS, preview
from bfpo.config import CompareConfig
from bfpo.experiments.compare import RIVALS, chains_of, make_result, result_markdown
from bfpo.experiments.steps import CEILING, START
from bfpo.objective.methods import METHODS
from bfpo.runs.stages import run_stage
from bfpo.scores.comparisons import is_distinguishable
from bfpo.scores.records import ModelComparison
from bfpo.scores.scores import Judged
from small_world import SMALL


def test_every_rival_tries_as_many_different_settings() -> None:
    for rival in RIVALS.values():
        assert len({tuple(sorted(trial.items())) for trial in rival.trials}) == len(rival.trials) == NUM_TRIALS
        assert rival.kind != "loss" or rival.name in METHODS
    assert "bso_sba" not in RIVALS  # docs/head-to-head.md says why
    assert "13 methods x 2 settings" in preview(CompareConfig(quick=True))[0]


def test_recipes_share_their_stages_and_have_the_same_steps_and_anchor(tmp_path: Path) -> None:
    config, wanted = CompareConfig(), {name: [0] for name in RIVALS}
    chains = {chain.name: chain for chain in chains_of(config, tmp_path, 3, wanted, "validation")}
    trains = {name: chain.steps[0].config for name, chain in chains.items() if chain.steps[0].stage == "train"}
    assert {train.max_steps for train in trains.values()} == {config.align.steps}
    assert {train.anchor_weight for train in trains.values()} == {config.align.anchor_weight}
    assert {train.seed for train in trains.values()} == {3}
    base = "beta=0.1-learning_rate=0.001"
    sacpo = f"dpo_s-{base}-after-dpo_h-{base}"
    assert chains[sacpo].needs == (f"dpo_h-{base}",)
    assert trains[sacpo].model == str(chains[f"dpo_h-{base}"].steps[0].out / "model")
    assert trains[f"modpo-{base}-safety_share=0.5"].margin_model == str(chains[f"dpo_s-{base}"].steps[0].out / "model")
    blended = {name: chain for name, chain in chains.items() if chain.steps[0].stage == "interpolate"}
    assert {chain.needs for chain in blended.values()} == {
        (f"dpo_h-{base}", sacpo),
        (f"dpo_h-{base}", f"dpo_s-{base}"),
    }
    asked = [name for name in chains if name.endswith("on validation")]
    assert len(asked) == len(RIVALS) + 2
    known = set(chains)
    assert all(set(chain.needs) <= known for chain in chains.values())
    assert {START, CEILING} <= known


def rows_of(good: float, seeds: int = 2, prompts: int = 60) -> list[Judged]:
    """Answers to harmful, benign and borderline prompts, of which this share is right; no two seeds differ."""
    kinds = ("harmful", "benign", "borderline")
    right = [number < good * prompts for number in range(prompts)]
    return [
        Judged(
            f"{n}", f"p{n}", kinds[n % 3], ok, float(ok), helpful_and_safe=ok, well_formed=True, refused=False, seed=s
        )
        for s in range(seeds)
        for n, ok in enumerate(right)
    ]


def test_all_pairs_are_one_family_and_the_table_names_what_is_not_told_apart() -> None:
    shares = dict.fromkeys(RIVALS, 0.2) | {"bfpo": 0.6, "safedpo": 0.9, "bso": 0.88, START: 0.1, CEILING: 1.0}
    judged = {name: rows_of(share) for name, share in shares.items()}
    config = {**CompareConfig(bootstrap_samples=200, seeds=2).resolved()}
    result = make_result(config, judged, {}, {name: [0.1, 0.2] for name in RIVALS}, dict.fromkeys(RIVALS, 1))
    found = result.comparisons
    assert found.num == len(found.rows) == 13 * 12 // 2
    assert found.num * min(row.p_value for row in found.rows) == min(row.p_holm for row in found.rows)
    assert result.best == "safedpo"
    assert found.not_told_from_best == ["bso"]
    methods = {method.name: method for method in result.methods}
    assert methods["safedpo"].bfpo_minus_this.value == pytest.approx(-0.3)
    assert methods["bfpo"].best_minus_this.value == pytest.approx(0.3)
    assert methods["bfpo"].best_minus_this.low == -methods["safedpo"].bfpo_minus_this.high
    assert methods["bfpo"].bfpo_minus_this is methods[START].best_minus_this is None
    text = result_markdown(result)
    assert "**Not distinguishable from SafeDPO:** BSO." in text
    assert "Per cent on 60 test prompts (20 harmful, 20 benign, 20 borderline), number of seeds 2, 120 answers" in text
    assert "| BFPO | 60.0, 60.0 | 0.0 |" in text


def test_a_difference_needs_its_interval_beside_the_corrected_p() -> None:
    row = ModelComparison("helpful_and_safe", "a", "b", p_holm=0.01, low=0.1, high=0.2)
    assert is_distinguishable(row, 0.95)
    for change in ({"p_holm": 0.06}, {"p_holm": None}, {"low": 0.0}, {"low": None}):
        assert not is_distinguishable(replace(row, **change), 0.95)


@pytest.mark.slow
def test_a_comparison_ends_with_its_table(tmp_path: Path) -> None:
    values = {**SMALL, "quick": True, "seeds": 2, "bootstrap_samples": 50}
    folder = run_stage("compare", CompareConfig.model_validate(values), tmp_path / "run")
    result = folder.read_json("comparison.json")
    assert {method["name"] for method in result["methods"]} == {*RIVALS, START, CEILING}
    for method in result["methods"]:
        assert len(method["seed_values"]["well_formed"]) == 2
        assert len(method["trials"]) == (2 if method["name"] in RIVALS else 0)
        assert (method["bfpo_minus_this"] is None) == (method["name"] in ("bfpo", START, CEILING))
    record = folder.read_json("run.json")
    assert 0.5 * record["seconds"] < result["seconds"] <= record["seconds"]
    text = (folder.path / "comparison.md").read_text()
    assert "MODPO" in text
    assert "**beta" in text
