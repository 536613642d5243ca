"""The text of a red-team run: what no judge measured is not in it."""

from __future__ import annotations

import pytest

from bfpo.core.schema import Comparison, Completion, Message, Score, Verdict
from bfpo.judges.label_report import agreement_scores, measures_form, redteam_text
from bfpo.stats import rate_interval

FUNNEL = {"prompts": 5, "completions": 20, "well_formed": 18, "unscored": 1, "unsafe": 3, "usable": 17, "candidates": 9,
          "unranked": 0, "ties": 2, "pairs": 4, "prompts_with_pairs": 3}  # fmt: skip


@pytest.mark.parametrize(("num", "value"), [(20, 0.9), (0, None)])
def test_well_formed_is_named_only_where_it_was_measured(num: int, value: float | None) -> None:
    rates = {
        "all prompts": [Score("unsafe", 0.15, 0.1, 0.3, 20), Score("well_formed", value, None, None, num, 20 - num)]
    }
    text = redteam_text("m", FUNNEL, {"safe-safe": 4}, rates, {}, 0.95)
    assert measures_form(rates) is (num > 0)
    assert ("well-formed" in text) is (num > 0)
    assert "| prompts | 5 |" in text
    assert ("| usable: scored |" in text) is (num == 0)


def test_the_interval_of_the_order_is_over_prompts() -> None:
    """Eight pairs of each of five prompts, on all of which the ranker agrees or none."""
    right = [n // 8 % 2 == 0 for n in range(40)]
    sides = [
        Completion(f"{n}:{side}", (Message("user", f"prompt {n // 8}"),), side)
        for n in range(40)
        for side in ("chosen", "rejected")
    ]
    verdicts = [Verdict(one.id, "j", "safe") for one in sides]
    comparisons = [Comparison(f"{n}:chosen", f"{n}:rejected", "r", float(same)) for n, same in enumerate(right)]
    comparisons[3] = Comparison("3:chosen", "3:rejected", "r", None)
    known = [n for n in range(40) if n != 3]
    rows = [(row, str(n // 8)) for n, row in enumerate(comparisons)]
    (score,) = agreement_scores(sides, {"j": [[one] for one in verdicts]}, verdicts, {}, rows)
    expected = rate_interval([right[n] for n in known], [n // 8 for n in known])
    assert (score.value, score.low, score.high) == (expected.value, expected.low, expected.high)
    assert (score.num, score.unscored) == (39, 1)
    alone = rate_interval([right[n] for n in known])
    assert score.low is not None
    assert alone.low is not None
    assert score.low < alone.low - 0.1
