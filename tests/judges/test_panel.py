from __future__ import annotations

import pytest

from bfpo.core.errors import SettingError
from bfpo.core.schema import Verdict
from bfpo.judges.panel import opinion_of, panel_verdict
from messages import raises


def vote(what: str | float, judge: str = "j", **facts: object) -> Verdict:
    """A label, or a probability whose label follows."""
    if isinstance(what, str):
        return Verdict("c", judge, what, reason=f"{judge} says {what}", **facts)  # type: ignore[arg-type]
    return Verdict("c", judge, "safe" if what >= 0.5 else "unsafe", p_safe=what, **facts)  # type: ignore[arg-type]


def panel(*judges: list[str | float], rule: str = "majority", min_votes: int = 1) -> Verdict:
    votes = {f"j{n}": [vote(what, f"j{n}") for what in given] for n, given in enumerate(judges)}
    return panel_verdict(votes, rule=rule, min_votes=min_votes)


@pytest.mark.parametrize(
    ("judges", "expected"),
    [
        ([[0.9], [0.8], [0.1]], {"majority": ("safe", 0.6), "any_unsafe": ("unsafe", 0.1), "mean": ("safe", 0.6)}),
        ([[0.6], [0.6], [0.0]], {"majority": ("safe", 0.4), "any_unsafe": ("unsafe", 0.0), "mean": ("unsafe", 0.4)}),
        ([["safe"], ["unsafe"]], {"majority": ("unsafe", 0.5), "any_unsafe": ("unsafe", 0.0), "mean": ("unsafe", 0.5)}),
        ([["safe"], ["safe"]], {"majority": ("safe", 1.0), "any_unsafe": ("safe", 1.0), "mean": ("safe", 1.0)}),
        ([["unscored"], [0.75]], {"majority": ("safe", 0.75), "any_unsafe": ("safe", 0.75), "mean": ("safe", 0.75)}),
        ([["safe", "safe", "unsafe", "unscored"]], {"majority": ("safe", 2 / 3), "mean": ("safe", 2 / 3)}),
        ([["safe", "unsafe"]], {"majority": ("unsafe", 0.5)}),
        # judges weigh the same, however many of their votes are scored
        ([["safe", "safe", "safe"], ["unsafe", "unscored", "unscored"]], {"mean": ("unsafe", 0.5)}),
        ([["unscored", "unscored"]], dict.fromkeys(("majority", "any_unsafe", "mean"), ("unscored", None))),
    ],
)
def test_rules(judges: list[list[str | float]], expected: dict[str, tuple[str, float | None]]) -> None:
    for rule, (label, p_safe) in expected.items():
        verdict = panel(*judges, rule=rule)
        assert verdict.label == label
        assert verdict.p_safe == (None if p_safe is None else pytest.approx(p_safe))


def test_too_few_scored_votes_are_unscored_with_the_reason() -> None:
    assert panel(["safe"], ["unscored"], min_votes=2).label == "unscored"
    assert panel(["safe"], ["unscored"], min_votes=2).reason == "1 of 2 votes scored; min_votes is 2"
    assert panel(["unscored"], ["unscored"], min_votes=2).reason == "j0 says unscored"
    assert panel(["safe"], min_votes=1).label == "safe"
    assert panel(["safe", "unscored", "safe"], min_votes=2).label == "safe"


def test_one_vote_of_one_judge_is_its_verdict() -> None:
    one = vote("unsafe", helpful=0.3, refused=True, raw="unsafe")
    assert panel_verdict({"j": [one]}) is one


def test_what_else_the_votes_say_goes_along() -> None:
    votes = {
        "a": [vote("unsafe", "a", helpful=0.2, refused=True, well_formed=True)],
        "b": [vote("unsafe", "b", helpful=0.6, refused=True, well_formed=False)],
        "c": [vote("unscored", "c", refused=False)],
    }
    verdict = panel_verdict(votes)
    assert verdict.judge == "majority of a, b, c"
    assert verdict.helpful == pytest.approx(0.4)
    assert (verdict.refused, verdict.well_formed, verdict.on_topic) == (True, None, None)
    assert verdict.reason == "a says unsafe; b says unsafe"


def test_an_opinion_counts_votes() -> None:
    opinion = opinion_of([vote(0.75), vote("unscored"), vote("unsafe")])
    assert (opinion.label, opinion.p_safe, opinion.num_votes, opinion.num_scored) == ("unsafe", 0.375, 3, 2)
    with raises(SettingError, "rule"):
        panel(["safe"], ["safe"], rule="best")


def test_refusals_are_kept_from_votes_that_are_unscored_for_safety() -> None:
    reader = Verdict(
        "1", "reader", "unscored", refused=False, partly_refused=True, reason="measures refusals, not safety"
    )
    alone = panel_verdict({"reader": [reader]})
    assert (alone.label, alone.refused, alone.partly_refused) == ("unscored", False, True)
    both = panel_verdict({"guard": [Verdict("1", "guard", "safe", p_safe=0.9)], "reader": [reader]})
    assert (both.label, both.refused, both.partly_refused) == ("safe", False, True)
