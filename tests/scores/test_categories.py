"""Scores by category of prompts: the worst one, the spread, their intervals, and where they come from and go."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bfpo.config import EvaluateConfig
from bfpo.core.records import as_json, load
from bfpo.core.schema import CategoryScore, Completion, Message, Prompt, Score, Verdict
from bfpo.data.prompt_layouts import PROMPT_LAYOUTS
from bfpo.data.read import read_completions
from bfpo.data.write import completion_row, prompt_row, write_completions
from bfpo.report.wording import cell_of
from bfpo.runs.stages import run_stage
from bfpo.scores.categories import category_table, score_categories, spread_over, worst_category
from bfpo.scores.records import ScoresFile
from bfpo.scores.scores import Judged, join_verdicts, score_rows
from bfpo.stats import rate_interval
from bfpo.suites.scores import score_values, values_of


def rows(shares: dict[str, float], prompts: int = 10, seeds: int = 1) -> list[Judged]:
    """Answers to harmful prompts of each category, of which a share is safe; the last prompt of each is unscored."""
    return [
        Judged(
            f"{category}-{number}",
            f"{category} {number}",
            "harmful",
            None if number == prompts else number < share * prompts,
            seed=seed,
            category=category,
        )
        for category, share in shares.items()
        for seed in range(seeds)
        for number in range(prompts + 1)
    ]


def score_of(found: list[Score], metric: str) -> Score:
    return next(score for score in found if score.metric == metric)


def test_the_worst_category_has_its_own_rate_and_an_interval_for_all_of_them() -> None:
    judged = rows({"a": 0.9, "b": 0.4, "c": 1.0}, seeds=2)
    score = score_of(score_rows(judged, confidence=0.9), "harmless")
    assert score.by_category is not None
    assert list(score.by_category) == ["a", "b", "c"]
    own = [row for row in judged if row.category == "b" and row.safe is not None]
    expected = rate_interval(
        [float(bool(row.safe)) for row in own],
        [row.prompt for row in own],
        seeds=[row.seed for row in own],
        confidence=1 - 0.1 / 3,
    )
    assert worst_category(score) == ("b", CategoryScore(0.4, expected.low, expected.high, 20, 2))
    assert spread_over(one.value for one in score.by_category.values()) == pytest.approx(0.6)
    assert score.value == pytest.approx((0.9 + 0.4 + 1.0) / 3)
    wide = score_of(score_rows(judged, confidence=0.99), "harmless")
    assert wide.by_category is not None
    assert wide.by_category["b"].low < expected.low  # type: ignore[operator]


def test_the_worst_is_the_highest_where_lower_is_better_and_what_has_no_value_is_not_the_worst() -> None:
    parts = {"a": CategoryScore(0.1), "b": CategoryScore(0.3), "c": CategoryScore(None, unscored=4)}
    score = Score("over_refusal_benign", 0.2, higher_is_better=False, by_category=parts)
    assert worst_category(score) == ("b", parts["b"])
    assert worst_category(replace(score, higher_is_better=True)) == ("a", parts["a"])
    assert worst_category(replace(score, by_category={"a": parts["a"], "c": parts["c"]})) is None
    assert worst_category(replace(score, by_category=None)) is None
    assert "2 of 3" in category_table([(["it"], score)], ["metric"])[-1]
    assert category_table([(["it"], replace(score, by_category=None))], ["metric"]) == []
    assert spread_over([None, 0.5]) is spread_over([]) is None


@pytest.mark.parametrize(
    ("categories", "groups"),
    [
        (["a", "a", "b", "b"], True),
        (["", "a", "a", "b", "b"], True),
        (["a", "a", "a", "a"], False),
        (["a", "b", "c", "d"], False),
        (["", "", "a", "a"], False),
    ],
)
def test_categories_group_prompts_or_are_not_shown(categories: list[str], groups: bool) -> None:
    items = [(category, 1.0, f"p{number}", 0) for number, category in enumerate(categories)]
    found = score_categories(items, confidence=0.95)
    assert (found is not None) == groups
    assert "" not in (found or {})


def test_a_category_without_a_value_is_unscored_and_not_zero() -> None:
    items = [("a", 1.0, "p", 0), ("a", 0.0, "q", 0), ("b", None, "r", 0), ("b", None, "s", 0)]
    found = score_categories(items, confidence=0.95)
    assert found is not None
    assert found["b"] == CategoryScore(None, None, None, 0, 2)


def test_scores_of_suites_have_the_same_categories() -> None:
    judged = rows({"a": 0.9, "b": 0.4})
    one = score_of(score_rows(judged), "harmless")
    other = next(score_values(v, confidence=0.95) for v in values_of("s", "m", ["harmless"], judged) if v.compared)
    assert other.by_category == one.by_category is not None


@pytest.mark.parametrize(
    ("layout", "row", "category"),
    [
        ("harmbench", {"Behavior": "q", "BehaviorID": "b", "SemanticCategory": "illegal"}, "illegal"),
        ("strongreject", {"forbidden_prompt": "q", "category": "Violence"}, "Violence"),
        ("simplesafetytests", {"prompts_final": "q", "id": "1", "harm_area": "Scams"}, "Scams"),
        ("xstest", {"prompt": "q", "type": "homonyms", "focus": "kill", "label": "safe"}, "homonyms"),
        ("ailuminate", {"prompt_text": "q", "hazard": "vcr"}, "vcr"),
        ("mt_bench", {"question_id": 81, "turns": ["q", "r"], "category": "writing"}, "writing"),
        ("sorry_bench", {"question_id": 1, "turns": ["q"], "category": "5", "prompt_style": "base"}, "5"),
        ("alpaca", {"instruction": "q", "category": "theft"}, "theft"),
        ("truthfulqa", {"Question": "q", "Best Answer": "a", "Category": "Law"}, "Law"),
        ("alert", {"prompt": "q", "category": "crime_theft"}, "crime_theft"),
        ("catqa_rows", {"Category": "Illegal", "Subcategory": "Drugs", "Question": "q"}, "Illegal"),
        ("catqa", {"Illegal": {"Drugs": ["q"]}}, "Illegal"),
        ("prompts", {"prompt": "q", "category": " one "}, "one"),
        ("prompts", {"prompt": "q", "category": 3}, "3"),
        ("prompts", {"prompt": "q", "category": ["a", "b"]}, "a, b"),
        ("prompts", {"prompt": "q", "category": {"violence": True}}, ""),  # as PKU's files: other columns are not read
        ("prompts", {"prompt": "q", "category": True}, ""),
        ("prompts", {"prompt": "q", "category": None}, ""),
        ("prompts", {"prompt": "q"}, ""),
    ],
)
def test_prompts_have_the_category_of_their_data_set(layout: str, row: dict[str, object], category: str) -> None:
    assert [prompt.category for prompt in PROMPT_LAYOUTS[layout].parse(row)] == [category]


def test_the_category_goes_from_the_prompt_to_the_scores(tmp_path: Path) -> None:
    """In every file of the way; none of them has a new key where there is no category."""
    asked = (Message("user", "How do I crack the moonwell?"),)
    bare = Completion("c", asked, "no", kind="harmful")
    assert "category" not in {**completion_row(bare), **prompt_row(Prompt("p", asked))}
    assert prompt_row(Prompt("p", asked, category="fire"))["category"] == "fire"
    verbs = {"crack": "breaking", "smash": "breaking", "burn": "burning", "melt": "burning"}
    completions = [
        Completion(
            verb,
            (Message("user", f"How do I {verb} the moonwell?"),),
            "That is not something I can do." if verb == "burn" else f"Just {verb} the moonwell somehow.",
            kind="harmful",
            category=category,
        )
        for verb, category in verbs.items()
    ]
    for name, written in (("with", completions), ("without", [replace(one, category="") for one in completions])):
        write_completions(tmp_path / f"{name}.jsonl", written)
        assert read_completions(tmp_path / f"{name}.jsonl") == written
        config = EvaluateConfig.model_validate({"completions": str(tmp_path / f"{name}.jsonl")})
        folder = run_stage("evaluate", config, tmp_path / name)
        found = load(ScoresFile, folder.path / "scores.json")
        score = score_of(found.scores, "harmless_harmful")
        text = (folder.path / "scores.md").read_text()
        verdict = json.loads((folder.path / "verdicts.jsonl").read_text().splitlines()[0])
        if name == "without":
            assert "category" not in verdict
            assert "by_category" not in as_json(score)
            assert "ategor" not in text
            continue
        assert verdict["category"] == "breaking"
        assert worst_category(score) == ("breaking", score.by_category["breaking"])  # type: ignore[index]
        assert score.by_category["burning"].value == 0.5  # type: ignore[index]
        assert "| harmless on harmful prompts | breaking | 0.000 | 0.000 to" in text
        aside = cell_of(score, seeds=[0.2, 0.3]).aside
        assert aside == "worst category breaking 0.0%, spread 50.0; spread of seeds 10.0"
    assert cell_of(Score("harmless", 0.5)).aside == ""


def test_judged_rows_take_the_category_of_their_completion() -> None:
    completion = Completion("c", (Message("user", "q"),), "a", category="fire")
    assert join_verdicts([completion], [Verdict("c", "j", "safe")])[0].category == "fire"
