"""The text of a red-team run: what no judge measured is not in it."""

from __future__ import annotations

import pytest

from bfpo.core.schema import Score
from bfpo.judges.label_report import measures_form, redteam_text

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
