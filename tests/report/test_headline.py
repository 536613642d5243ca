from __future__ import annotations

import pytest

from bfpo.core.schema import Score
from bfpo.report.data import Basis, Comparison, Gate, MethodResult, ReportData
from bfpo.report.headline import headline
from bfpo.report.wording import percent, points


def score(metric: str, value: float, half: float = 0.04) -> Score:
    return Score(metric, value, max(0.0, value - half), min(1.0, value + half), 300)


def report(
    main: float,
    baselines: dict[str, tuple[float, float | None]],
    *,
    formed: float = 0.97,
    seeds: int = 3,
    gate: float = 0.97,
) -> ReportData:
    """`baselines`: name -> (its share, lower bound of the lead over it or `None` where it was not compared)."""
    methods = [
        MethodResult("bfpo", "BFPO", "main", scores=[score("helpful_and_safe", main), score("well_formed", formed)])
    ]
    comparisons = []
    for name, (value, low) in baselines.items():
        methods.append(MethodResult(name, name, "baseline", scores=[score("helpful_and_safe", value)]))
        if low is not None:
            comparisons.append(Comparison(name, "helpful_and_safe", main - value, low, 2 * (main - value) - low, 300))
    return ReportData(
        "t",
        "",
        methods,
        [Gate("the start writes well", score("well_formed", gate), 0.95)],
        comparisons,
        seeds=list(range(seeds)),
    )


def test_a_win_needs_every_interval_above_zero() -> None:
    found = headline(report(0.7, {"A": (0.5, 0.1), "B": (0.6, 0.02)}))
    assert found.wins
    assert found.sentence == (
        "BFPO is helpful and safe more often than every baseline: on 70% (66% to 74%) of held-out prompts, "
        "against 60% for the highest of them, B."
    )
    close = headline(report(0.7, {"A": (0.5, 0.1), "B": (0.69, -0.03)}))
    assert not close.wins
    assert "its lead over B is within the margin of error" in close.sentence
    uncompared = headline(report(0.7, {"A": (0.5, 0.1), "B": (0.6, None)}))
    assert not uncompared.wins


def test_a_loss_is_said_plainly() -> None:
    behind = headline(report(0.5, {"A": (0.6, -0.15), "B": (0.4, 0.05)}))
    assert not behind.wins
    assert behind.sentence.startswith("BFPO is not ahead here: it answers 50% (46% to 54%)")
    assert behind.sentence.endswith("A 60%.")
    close = headline(report(0.5, {"A": (0.51, -0.05)}))
    assert close.sentence.endswith("a difference within the margin of error.")
    tied = headline(report(0.5, {"A": (0.5, -0.05)}))
    assert "not ahead" in tied.sentence


def test_what_limits_the_claim_follows_it() -> None:
    found = headline(report(0.7, {"A": (0.5, 0.1)}, formed=0.9496, seeds=1, gate=0.9))
    details = " ".join(found.details)
    assert "Only 95.0%" in details
    assert "broken text counts as harmless" in details
    assert "A gate failed (“the start writes well”)" in details
    assert "One seed" in details
    fine = " ".join(headline(report(0.7, {"A": (0.5, 0.1)})).details)
    assert "gate" not in fine
    assert "seed" not in fine
    missing = report(0.7, {"A": (0.5, 0.1)})
    missing.methods.append(MethodResult("C", "C", "baseline"))
    assert not headline(missing).wins
    assert "Not measured: C." in headline(missing).details


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0.0, 0, "0%"),
        (0.001, 0, "<1%"),
        (0.999, 0, ">99%"),
        (1.0, 0, "100%"),
        (0.9999, 1, ">99.9%"),
        (0.6449, 1, "64.5%"),
    ],
)
def test_percent_never_rounds_to_certainty(value: float, decimals: int, text: str) -> None:
    assert percent(value, decimals) == text


def test_points() -> None:
    assert [points(value) for value in (0.123, -0.02, 0.0001)] == ["+12.3", "−2.0", "0.0"]


def of_coherence(name: str, value: float | None, coherent: float, role: str = "baseline", metric: str = "helpfulness"):
    scores = [score("coherent", coherent)] + ([] if value is None else [score(metric, value)])
    return MethodResult(name, name, role, scores=scores, home="", basis={"": Basis(["guard"], "p", 100)})


@pytest.mark.parametrize(
    ("models", "said"),
    [
        # The one with the highest value writes broken text, and neither value is called the highest.
        (
            [("A", 0.6, 0.95), ("B", 0.9, 0.5)],
            ": A 60.0% (56.0% to 64.0%) and B 90.0% (86.0% to 94.0%), not ranked, since they differ in coherence.",
        ),
        # Nothing is known of the coherent one.
        (
            [("A", None, 0.95), ("B", 0.9, 0.5)],
            ": B 90.0% (86.0% to 94.0%), not ranked, since they differ in coherence.",
        ),
        # Broken text did not help, or the intervals of coherence overlap.
        ([("A", 0.9, 0.95), ("B", 0.6, 0.5)], ": highest A 90.0% (86.0% to 94.0%)."),
        ([("A", 0.6, 0.95), ("B", 0.9, 0.88)], ": highest B 90.0% (86.0% to 94.0%)."),
    ],
)
def test_a_value_above_those_of_more_coherent_models_is_not_ranked(models: list, said: str) -> None:
    found = headline(ReportData("t", "", [of_coherence(*model) for model in models]))
    assert found.sentence == f"2 models were measured. Mean helpfulness on harmless prompts{said}"
    worse = [name for name, _, coherent in models if coherent == 0.5]
    assert ("which favours B" in found.details[0]) == bool(worse)


def against(main: float, *others: tuple[str, float, float]) -> ReportData:
    """The main model answers 70% well and leads the others, (name, value, coherent); `main`: share that is coherent."""
    rivals = [of_coherence(*other, metric="helpful_and_safe") for other in others]
    leads = [Comparison(one.name, "helpful_and_safe", 0.1, 0.05, 0.15, 300) for one in rivals]
    ours = of_coherence("BFPO", 0.7, main, "main", "helpful_and_safe")
    return ReportData("t", "", [ours, *rivals], comparisons=leads)


def test_no_lead_is_claimed_by_a_model_of_less_coherent_answers() -> None:
    found = headline(against(0.6, ("A", 0.5, 0.95), ("B", 0.6, 0.6)))
    assert not found.wins
    assert found.sentence == (
        "BFPO answers 70% (66% to 74%) of prompts helpfully and safely, B 60%, but fewer of its answers are coherent "
        "than those of A, so that no lead is claimed."
    )
    assert headline(against(0.9, ("A", 0.5, 0.95), ("B", 0.6, 0.6))).wins  # as coherent, up to the intervals
    assert headline(against(0.95, ("A", 0.5, 0.6))).wins  # the rival's broken text is no reason against a lead
