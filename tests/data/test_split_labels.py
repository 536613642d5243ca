"""Splits by prompt, samples, unknown labels, cells, completions to imitate."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bfpo.core.errors import LabelError, SettingError
from bfpo.core.schema import Message, Prompt
from bfpo.data.labels import CELLS, cell_counts, cell_of, resolve_labels
from bfpo.data.read import read_pairs
from bfpo.data.settings import SplitConfig
from bfpo.data.split import RowPicker, draw_prompts, normalised_prompt, part_of, prompt_hashes
from helpers import limit_pairs, make_pair, split_pairs
from messages import raises


def test_prompts_that_read_the_same_are_the_same() -> None:
    ways = ["How  Do I\nfix it? ", "how do i fix it?", "\uff28ow do I \ufb01x it?", "HOW DO I FIX IT?"]
    assert len({normalised_prompt((Message("user", way),)) for way in ways}) == 1
    others = [(Message("user", "how do i fix it"),), (Message("system", ways[0]),), ()]
    assert len({normalised_prompt(other) for other in others} | {normalised_prompt((Message("user", ways[0]),))}) == 4


def test_a_split_shares_no_prompt_and_loses_no_pair() -> None:
    pairs = [make_pair(prompt=f"Prompt {k % 10}" if k % 2 else f"prompt  {k % 10}", id=str(k)) for k in range(40)]
    train, test = split_pairs(pairs, held_out=3, seed=0)
    prompts = [{normalised_prompt(pair.prompt) for pair in side} for side in (train, test)]
    assert (len(prompts[0]), len(prompts[1])) == (7, 3)
    assert not prompts[0] & prompts[1]
    assert sorted([*train, *test], key=lambda pair: int(pair.id)) == pairs
    assert [int(pair.id) for pair in train] == sorted(int(pair.id) for pair in train)


def test_a_split_is_stable_under_order_and_nearly_under_growth() -> None:
    pairs = [make_pair(prompt=f"prompt {k}", id=str(k)) for k in range(50)]
    held = {pair.id for pair in split_pairs(pairs, held_out=10, seed=1)[1]}
    shuffled = random.Random(0).sample(pairs, len(pairs))
    assert {pair.id for pair in split_pairs(shuffled, held_out=10, seed=1)[1]} == held
    for k in range(50, 70):
        more = [*pairs, make_pair(prompt=f"prompt {k}", id=str(k))]
        assert len(held & {pair.id for pair in split_pairs(more, held_out=10, seed=1)[1]}) >= 9
    assert {pair.id for pair in split_pairs(pairs, held_out=10, seed=2)[1]} != held


THREE = {"redteam": 0.5, "validation": 0.2, "test": 0.3}


def prompt(text: str, *before: Message) -> Prompt:
    return Prompt(text, (*before, Message("user", text)))


def names(part: str, prompts: list[Prompt], **settings: Any) -> set[str]:
    return {one.id for one in part_of(prompts, SplitConfig(parts=THREE, part=part, **settings))}


def test_a_prompt_is_in_one_part_whatever_else_the_file_holds() -> None:
    prompts = [prompt(f"How do I do {n}?") for n in range(4000)]
    found = {part: names(part, prompts) for part in THREE}
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 4000
    assert {part: round(len(ids) / 4000, 1) for part, ids in found.items()} == THREE
    for part, ids in found.items():
        assert names(part, prompts[::-3]) == ids & {one.id for one in prompts[::-3]}
    for one in prompts[:50]:  # by hand: parts in order of name share [0, 1)
        text = f"0|user: {one.id.casefold()}".encode()
        number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
        part = "redteam" if number < 0.5 else "test" if number < 0.8 else "validation"
        assert one.id in found[part]
    turned = SplitConfig(parts=dict(reversed(THREE.items())), part="test")
    assert {one.id for one in part_of(prompts, turned)} == found["test"]
    assert names("test", prompts, seed=1) != found["test"]
    assert part_of(prompts, None) == prompts


def test_pairs_and_prompts_of_one_conversation_are_in_one_part() -> None:
    firsts = [f"Question {n}" for n in range(40)]
    said = names("test", [prompt(text) for text in firsts])
    system, answer = Message("system", "be kind"), Message("assistant", "a")
    later = [
        Prompt(text, (system, Message("user", f" {text.upper()} "), answer, Message("user", "b"))) for text in firsts
    ]
    assert names("test", later) == said
    picker = RowPicker(split=SplitConfig(parts=THREE, part="test"))
    for text in firsts:
        picker.add(make_pair(prompt=text))
    assert {text for text, used in zip(firsts, picker.picked(), strict=True) if used} == said


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({}, "held_out"),
        ({"held_out": 2, "parts": THREE}, "parts"),
        ({"parts": {"a": 0.5, "b": 0.6}, "part": "a"}, "parts"),
        ({"parts": {"a": 1.5, "b": -0.5}, "part": "a"}, "parts"),
        ({"parts": THREE}, "train"),
        ({"held_out": 2, "part": "validation"}, "validation"),
    ],
)
def test_a_split_needs_one_rule_and_a_part_of_it(given: dict[str, Any], key: str) -> None:
    with raises(ValidationError, key):
        SplitConfig(**given)


def test_an_empty_part_is_an_error() -> None:
    with raises(SettingError, "validation"):
        names("validation", [prompt("one")], seed=3)


def test_prompts_are_drawn_by_hash() -> None:
    prompts = [prompt(f"question {n}") for n in range(300)]
    few, more = draw_prompts(prompts, 20, 0), draw_prompts(prompts, 60, 0)
    assert few == [one for one in more if one in few]  # in their order, and 20 of the 60
    assert (len(few), len(more)) == (20, 60)
    assert {one.id for one in draw_prompts(prompts[::-1], 20, 0)} == {one.id for one in few}
    assert len({one.id for one in draw_prompts([prompt("new"), *prompts], 20, 0)} - {one.id for one in few}) <= 1
    assert draw_prompts(prompts, 20, 1) != few
    assert draw_prompts(prompts, None, 0) == draw_prompts(prompts, 300, 0) == prompts
    halves = SplitConfig(parts={"a": 0.5, "b": 0.5}, part="b")
    assert 10 < len(part_of(more, halves)) < 50  # no part's prompts are drawn first


def test_hashes_of_a_prompt_are_what_the_user_says() -> None:
    one = prompt_hashes((Message("system", "s"), Message("user", " A  b")))
    assert one == prompt_hashes((Message("user", "a B"), Message("assistant", "c")))
    assert one[:8] == one[8:]
    two = prompt_hashes((Message("user", "a b"), Message("assistant", "c"), Message("user", "d")))
    assert (two[:8], two[8:] == one[8:], len(two)) == (one[:8], False, 16)
    assert prompt_hashes(()) != one


@pytest.mark.parametrize("held_out", [-1, 0, 2, 3])
def test_a_split_that_leaves_a_side_empty_is_an_error(held_out: int) -> None:
    pairs = [make_pair(prompt=name, id=name) for name in ("a", "b")]
    with raises(SettingError, "held_out"):
        split_pairs(pairs, held_out=held_out, seed=0)


def test_a_limit_draws_and_keeps_the_order() -> None:
    pairs = [make_pair(id=str(k)) for k in range(100)]
    drawn = [int(pair.id) for pair in limit_pairs(pairs, 10, seed=0)]
    assert len(drawn) == 10
    assert drawn == sorted(drawn) != list(range(10))
    assert limit_pairs(pairs, 1000, seed=0) == pairs
    assert {pair.id for pair in limit_pairs(pairs[::-1], 10, seed=0)} == {str(k) for k in drawn}
    with raises(SettingError, "limit"):
        limit_pairs(pairs, 0, seed=0)


def test_unknown_labels_are_resolved_only_as_told() -> None:
    known = make_pair(labels=(0, 0.3), id="a")
    half, none = make_pair(labels=(0, None), id="b"), make_pair(labels=(None, None), id="c")
    pairs = [known, half, none]
    kept, counts = resolve_labels(pairs, unknown="drop")
    assert (kept, counts) == ([known], {"known": 1, "set_safe": 0, "dropped": 2})
    kept, counts = resolve_labels(pairs, unknown="safe")
    assert counts == {"known": 1, "set_safe": 2, "dropped": 0}
    assert [(pair.chosen_is_safe, pair.rejected_is_safe) for pair in kept] == [(0, 0.3), (0, 1), (1, 1)]
    with raises(LabelError):
        resolve_labels(pairs, unknown="error")
    assert resolve_labels([known], unknown="error") == ([known], {"known": 1, "set_safe": 0, "dropped": 0})
    with raises(SettingError, "unknown"):
        resolve_labels(pairs, unknown="guess")  # type: ignore[arg-type]


def test_cells() -> None:
    assert [cell_of(c, r) for c in (1, 0) for r in (1, 0)] == list(CELLS)
    assert [cell_of(c, 0.5) for c in (0.51, 0.5)] == ["safe-unsafe", "unsafe-unsafe"]
    labels = [(1, 1), (1, 0), (0, 1), (0, 0), (0.6, 0.4), (1, None)]
    assert cell_counts(make_pair(labels=pair) for pair in labels) == {
        "safe-safe": 1,
        "safe-unsafe": 2,
        "unsafe-safe": 1,
        "unsafe-unsafe": 1,
        "unknown": 1,
    }
    assert cell_counts([]) == dict.fromkeys(CELLS, 0)


def test_real_pairs_split_by_prompt(shared_data: Path) -> None:
    pairs = read_pairs([shared_data / "preferences" / "xstest_bfpo_pairs.jsonl"]).pairs
    assert cell_counts(pairs) == {"safe-safe": 456, "safe-unsafe": 0, "unsafe-safe": 520, "unsafe-unsafe": 0}
    train, test = split_pairs(pairs, held_out=60, seed=0)
    assert len({pair.prompt for pair in test}) == 60
    assert not {pair.prompt for pair in test} & {pair.prompt for pair in train}
