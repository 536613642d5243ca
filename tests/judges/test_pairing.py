from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfpo.core.errors import SettingError
from bfpo.core.schema import Comparison, Completion, Message, Verdict
from bfpo.data.labels import CELLS
from bfpo.judges.pairing import candidate_duels, choose_pairs
from messages import raises

STRATEGIES = ("informative", "balanced", "random")


def made(prompt: str, *answers: tuple[str, str]) -> tuple[list[Completion], list[Verdict]]:
    """Completions of one prompt from (text, label); the label may be `safe`, `unsafe`, `unscored` or `broken`."""
    completions, verdicts = [], []
    for number, (text, label) in enumerate(answers):
        name = f"{prompt}/{number}"
        completions.append(Completion(name, (Message("user", prompt),), text))
        well_formed = False if label == "broken" else None
        verdicts.append(Verdict(name, "j", "safe" if label == "broken" else label, well_formed=well_formed))  # type: ignore[arg-type]
    return completions, verdicts


def ranked(duels: list[tuple[Completion, Completion]], **better: float | None) -> list[Comparison]:
    """Comparisons in which the alphabetically later text is better, with what is given by "first second" instead."""
    return [
        Comparison(a.id, b.id, "r", better.get(f"{a.text}_{b.text}", 0.9 if a.text > b.text else 0.1)) for a, b in duels
    ]


def test_chosen_is_the_more_helpful_whatever_its_safety() -> None:
    completions, verdicts = made("p", ("a", "safe"), ("b", "unsafe"))
    result = choose_pairs(completions, verdicts, ranked(candidate_duels(completions, verdicts)))
    [pair] = result.pairs
    assert (pair.chosen, pair.rejected, pair.chosen_is_safe, pair.rejected_is_safe) == ("b", "a", 0.0, 1.0)
    assert result.cells == {"safe-safe": 0, "safe-unsafe": 0, "unsafe-safe": 1, "unsafe-unsafe": 0}


def test_a_comparison_given_the_other_way_round_counts_the_other_way_round() -> None:
    completions, verdicts = made("p", ("a", "safe"), ("b", "unsafe"))
    turned = [Comparison("p/1", "p/0", "r", 0.2)]
    assert choose_pairs(completions, verdicts, turned).pairs[0].chosen == "a"


def test_the_funnel_says_what_became_of_every_completion() -> None:
    completions, verdicts = made(
        "p", ("a", "safe"), ("b", "unsafe"), (" b ", "unsafe"), ("c", "unscored"), ("d", "broken"), ("e", "safe")
    )
    duels = candidate_duels(completions, verdicts)
    assert [(a.text, b.text) for a, b in duels] == [("a", "b"), ("a", "e"), ("b", "e")]
    result = choose_pairs(completions, verdicts, ranked(duels, a_b=None, a_e=0.5))
    assert result.funnel == {
        "prompts": 1,
        "completions": 6,
        "well_formed": 5,
        "unscored": 1,
        "unsafe": 2,
        "usable": 4,
        "candidates": 3,
        "unranked": 1,
        "ties": 1,
        "pairs": 1,
        "prompts_with_pairs": 1,
    }
    assert [(pair.chosen, pair.rejected) for pair in result.pairs] == [("e", "b")]


def test_informative_takes_one_of_each_cell_and_conflicts_first() -> None:
    completions, verdicts = made("p", ("a", "safe"), ("b", "unsafe"), ("c", "safe"), ("d", "unsafe"))
    comparisons = ranked(candidate_duels(completions, verdicts))
    one = choose_pairs(completions, verdicts, comparisons, pairs_per_prompt=1)
    assert one.cells["unsafe-safe"] == 1
    every = choose_pairs(completions, verdicts, comparisons)
    assert every.cells == dict.fromkeys(CELLS, 1)
    assert every.candidate_cells == {"safe-safe": 1, "safe-unsafe": 1, "unsafe-safe": 3, "unsafe-unsafe": 1}


def test_informative_prefers_the_surest_order() -> None:
    completions, verdicts = made("p", ("a", "safe"), ("b", "safe"), ("c", "safe"))
    comparisons = ranked(candidate_duels(completions, verdicts), a_b=0.4, a_c=0.02, b_c=0.3)
    [pair] = choose_pairs(completions, verdicts, comparisons).pairs
    assert (pair.chosen, pair.rejected) == ("c", "a")


def test_balanced_fills_the_cell_that_has_fewest() -> None:
    completions, verdicts = [], []
    for number in range(40):
        some = made(f"p{number}", ("a", "safe"), ("b", "unsafe"), ("c", "safe"), ("d", "unsafe"))
        completions += some[0]
        verdicts += some[1]
    comparisons = ranked(candidate_duels(completions, verdicts))
    balanced = choose_pairs(completions, verdicts, comparisons, strategy="balanced", pairs_per_prompt=1)
    assert balanced.cells == dict.fromkeys(CELLS, 10)
    informative = choose_pairs(completions, verdicts, comparisons, pairs_per_prompt=1)
    assert informative.cells["unsafe-safe"] == 40


def test_soft_labels_are_the_probabilities_where_there_are_any() -> None:
    completions, _ = made("p", ("a", "safe"), ("b", "unsafe"))
    verdicts = [Verdict("p/0", "j", "safe", p_safe=0.75), Verdict("p/1", "j", "unsafe")]
    comparisons = ranked(candidate_duels(completions, verdicts))
    [pair] = choose_pairs(completions, verdicts, comparisons, soft_labels=True).pairs
    assert (pair.chosen_is_safe, pair.rejected_is_safe) == (0.0, 0.75)
    [pair] = choose_pairs(completions, verdicts, comparisons).pairs
    assert (pair.chosen_is_safe, pair.rejected_is_safe) == (0.0, 1.0)


def test_ids_may_hold_any_character() -> None:
    completions, verdicts = made("a|b", ("a", "safe"), ("b", "unsafe"), ("c", "safe"))
    assert len(choose_pairs(completions, verdicts, ranked(candidate_duels(completions, verdicts))).pairs) == 3


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"strategy": "best"}, "strategy"),
        ({"pairs_per_prompt": 0}, "pairs_per_prompt"),
    ],
)
def test_bad_settings(settings: dict[str, object], key: str) -> None:
    completions, verdicts = made("p", ("a", "safe"))
    with raises(SettingError, key):
        choose_pairs(completions, verdicts, [], **settings)  # type: ignore[arg-type]


def test_verdicts_of_other_completions_and_repeated_ids_are_errors() -> None:
    completions, verdicts = made("p", ("a", "safe"), ("b", "safe"))
    with raises(SettingError):
        choose_pairs(completions, verdicts[::-1], [])
    with raises(SettingError):
        choose_pairs([completions[0]] * 2, [verdicts[0]] * 2, [])


answers = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from(("safe", "unsafe", "unscored", "broken"))),
    min_size=0,
    max_size=6,
)


@given(
    st.lists(answers, min_size=1, max_size=5),
    st.sampled_from(STRATEGIES),
    st.sampled_from((None, 1, 2)),
    st.integers(0, 9),
)
def test_every_pair_is_true_and_nothing_is_lost(groups, strategy, limit, seed) -> None:
    completions: list[Completion] = []
    verdicts: list[Verdict] = []
    for number, group in enumerate(groups):
        some = made(f"p{number}", *group)
        completions += some[0]
        verdicts += some[1]
    duels = candidate_duels(completions, verdicts)
    rng = random.Random(seed)
    comparisons = [Comparison(a.id, b.id, "r", rng.choice((None, 0.5, 0.1, 0.8))) for a, b in duels]
    result = choose_pairs(completions, verdicts, comparisons, strategy=strategy, pairs_per_prompt=limit, seed=seed)
    funnel = result.funnel
    assert (
        funnel["candidates"] == len(duels) == funnel["unranked"] + funnel["ties"] + sum(result.candidate_cells.values())
    )
    assert funnel["pairs"] == len(result.pairs) == sum(result.cells.values())
    by_id = {completion.id: completion for completion in completions}
    label = {verdict.completion_id: verdict.label for verdict in verdicts}
    better = {(one.first_id, one.second_id): one.first_is_better for one in comparisons}
    for pair in result.pairs:
        chosen, rejected = pair.id.split("|")
        assert (by_id[chosen].text, by_id[rejected].text) == (pair.chosen, pair.rejected)
        assert by_id[chosen].prompt == by_id[rejected].prompt == pair.prompt
        assert [pair.chosen_is_safe, pair.rejected_is_safe] == [float(label[n] == "safe") for n in (chosen, rejected)]
        said = better.get((chosen, rejected))
        assert said == 0.8 if said is not None else better[rejected, chosen] == 0.1
    per_prompt = [sum(pair.prompt == prompt for pair in result.pairs) for prompt in {c.prompt for c in completions}]
    assert all(count <= (limit or len(CELLS)) for count in per_prompt)
    again = choose_pairs(completions, verdicts, comparisons, strategy=strategy, pairs_per_prompt=limit, seed=seed)
    assert again == result
    if limit is None and strategy == "informative":  # every cell that a prompt offers is there
        assert all((result.cells[cell] > 0) == (result.candidate_cells[cell] > 0) for cell in CELLS)


def test_the_order_of_the_prompts_does_not_decide_which_pairs_are_taken() -> None:
    groups = [
        made(f"p{n}", *[(t, random.Random(f"{n}{t}").choice(("safe", "unsafe"))) for t in "abcd"]) for n in range(20)
    ]
    results = []
    for order in (groups, groups[::-1]):
        completions = [c for group in order for c in group[0]]
        verdicts = [v for group in order for v in group[1]]
        comparisons = ranked(candidate_duels(completions, verdicts))
        chosen = choose_pairs(completions, verdicts, comparisons, strategy="balanced", pairs_per_prompt=1)
        results.append({pair.id for pair in chosen.pairs})
    assert results[0] == results[1]
    assert len(list(combinations("abcd", 2))) * 20 > len(results[0]) == 20
