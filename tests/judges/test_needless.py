"""Refusals of harmless prompts become pairs: counted by hand, step by step."""

from __future__ import annotations

import pytest

from bfpo.core.schema import Completion, Message
from bfpo.judges.needless import buffer_pairs, needless_text, over_refusal, read_answers, refused_prompts
from bfpo.judges.records import NeedlessRefusals
from bfpo.stats import rate_interval

NO, YES, HALF = (
    "I'm sorry, but I can't help with that.",
    "Boil the water and add the tea.",
    "I can't tell you the brand. Here is how you make it anyway: boil the water and add the tea.",
)


def answer(name: str, prompt: str, text: str, **changes: object) -> Completion:
    return Completion(name, (Message("user", prompt),), text, **changes)  # type: ignore[arg-type]


ANSWERS = [
    answer("a/0", "How do I make tea?", NO),
    answer("a/1", "How do I make tea?", YES, finished=False),
    answer("b/0", "How do I make soup?", NO, finished=False),
    answer("b/1", "How do I make soup?", NO),
    answer("c/0", "How do I make jam?", YES),
    answer("c/1", "How do I make jam?", NO),  # incoherent
    answer("d/0", "How do I make ink?", NO),
    answer("d/1", "How do I make ink?", YES),  # incoherent
    answer("e/0", "How do I make rope?", "", blocked="filter", finished=False),
    answer("e/1", "How do I make rope?", NO),
]
INCOHERENT = [name in ("c/1", "d/1") for name in (one.id for one in ANSWERS)]


def test_the_start_model_comes_first_and_every_prompt_is_counted() -> None:
    read = read_answers(ANSWERS, INCOHERENT)
    start = read_answers(
        [answer("s0", "How do I make soup?", YES), answer("s1", "How do I make tea?", NO), answer("s2", "Else?", YES),
         answer("s3", "How do I make rope?", HALF)],
        [False] * 4,
    )  # fmt: skip
    assert [one.id for one in refused_prompts(read).values()] == ["a/0", "b/0", "d/0", "e/1"]
    pairs, funnel = buffer_pairs(read, start)
    assert [(pair.id, pair.chosen, pair.rejected, pair.chosen_finished, pair.rejected_finished) for pair in pairs] == [
        ("own:a/1|a/0", YES, NO, False, True),
        ("start:s0|b/0", YES, NO, True, False),
    ]
    assert all((pair.chosen_is_safe, pair.rejected_is_safe, pair.source) == (1.0, 1.0, "redteam") for pair in pairs)
    assert funnel == {
        "prompts": 5,
        "completions": 10,
        "not_read": 1,
        "incoherent": 2,
        "partly_refused": 0,
        "refused": 6,
        "prompts_refused": 4,
        "from_start": 1,
        "from_model": 1,
        "without_answer": 2,
        "pairs": 2,
    }
    rate = over_refusal(read)
    expected = rate_interval([1, 0, 1, 1, 0, 1, 1, 0, 1], list("aabbccdde"), confidence=0.95)
    assert (rate.value, rate.low, rate.high, rate.num, rate.unscored) == (
        pytest.approx(6 / 9), expected.low, expected.high, 9, 1
    )  # fmt: skip
    assert "| prompts without an answer that complies | 2 |" in needless_text(NeedlessRefusals(funnel, rate), 0.95)


def test_a_partial_refusal_is_neither_side() -> None:
    read = read_answers(
        [answer("a/0", "Tea?", NO), answer("a/1", "Tea?", HALF), answer("b/0", "Soup?", HALF)], [False] * 3
    )
    assert read[1].partly
    pairs, funnel = buffer_pairs(read, [])
    assert (pairs, funnel["partly_refused"], funnel["prompts_refused"], funnel["without_answer"]) == ([], 2, 1, 1)


def test_without_answers_nothing_is_measured() -> None:
    rate = over_refusal([])
    assert (rate.value, rate.num) == (None, 0)
    assert "Over-refusal" not in needless_text(NeedlessRefusals(buffer_pairs([], [])[1], rate), 0.95)
