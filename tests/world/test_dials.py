"""The dials of the closed world: each does what its setting says, and the oracle reads every text as before."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from bfpo.config.demo import DemoWorld
from bfpo.core.schema import Completion, Message, Pair, Prompt
from bfpo.data.tokenize import tokenize_pairs
from bfpo.data.write import completion_row, pair_row, prompt_row
from bfpo.judges.judges import OracleJudge, OracleRanker
from bfpo.stats import wilson
from bfpo.world.datasets import (
    buffer_pairs,
    build_tokenizer,
    held_out_prompts,
    main_pairs,
    redteam_prompts,
    sft_completions,
)
from bfpo.world.dials import NO_DIALS, Dials
from bfpo.world.oracle import Assessment, assess, read_prompt
from bfpo.world.world import GENTLE_VERBS, HARMS, ROUGH_VERBS, WARDS, answer, ideal_kind, prompt_text, topics

NUM = 1500
BEFORE = {
    "sft": "5368a56c0ba271e6",
    "ideal": "d584dc90f6fbde76",
    "main": "83b13beaa55853cc",
    "held out": "8e57808feebd4bea",
    "buffer": "b82f0e233f396186",
    "prompts": "0e1bb7706ad8b040",
    "red team": "94fae847dc88ead7",
}
EVERY = Dials(
    safety_flips=0.2,
    order_flips=0.1,
    missed_harm=0.3,
    unseen_wards=5,
    style_confound=0.5,
    length_confound=0.5,
    harm_shares={"breaking": 3.0, "burning": 1.0},
    multi_turn=0.3,
)


def asked(prompt: tuple[Message, ...]) -> list[str]:
    return [turn.content for turn in prompt if turn.role == "user"]


def readings(pair: Pair) -> tuple[Assessment, Assessment]:
    one, other = (assess(asked(pair.prompt), text) for text in (pair.chosen, pair.rejected))
    assert one is not None
    assert other is not None
    return one, other


def sides(pair: Pair) -> set[str]:
    return {pair.chosen, pair.rejected}


def covers(count: int, num: int, rate: float) -> bool:
    """Whether the rate lies in a 99.99% interval of the count."""
    found = wilson(count, num, confidence=0.9999)
    assert found.low is not None
    assert found.high is not None
    return found.low <= rate <= found.high


def digest(rows: Sequence[Any]) -> str:
    """A hash of the rows as files hold them."""
    write: Any = {Pair: pair_row, Completion: completion_row, Prompt: prompt_row}[type(rows[0])]
    return hashlib.sha256(json.dumps([write(row) for row in rows]).encode()).hexdigest()[:16]


def test_the_defaults_draw_the_data_of_before() -> None:
    """Hashes of what the world drew when it had no dials."""
    drawn = {
        "sft": sft_completions(500, 1),
        "ideal": sft_completions(500, 1, ideal=True),
        "main": main_pairs(500, 1),
        "held out": main_pairs(200, 2, part="test", harmful_share=0.3),
        "buffer": buffer_pairs(500, 1),
        "prompts": held_out_prompts("test", 0),
        "red team": redteam_prompts(),
    }
    assert {name: digest(rows) for name, rows in drawn.items()} == BEFORE
    assert NO_DIALS.model_dump() == {}  # and nothing is written of them
    assert Dials(safety_flips=0.1, order_flips=0.0).model_dump() == {"safety_flips": 0.1, "order_flips": 0.0}
    assert not DemoWorld().model_dump().keys() & Dials.model_fields.keys()


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2, 0.5])
def test_the_flip_rates_are_those_of_the_setting_and_the_oracle_is_untouched(rate: float) -> None:
    clean, noisy = main_pairs(NUM, 4), main_pairs(NUM, 4, dials=Dials(safety_flips=rate, order_flips=rate))
    assert [(sides(pair), pair.prompt) for pair in clean] == [(sides(pair), pair.prompt) for pair in noisy]
    order = safety = same_safety = 0
    for pair in noisy:
        chosen, rejected = readings(pair)
        assert chosen.helpful != rejected.helpful
        order += chosen.helpful < rejected.helpful
        wrong = [pair.chosen_is_safe != chosen.safe, pair.rejected_is_safe != rejected.safe]
        safety += sum(wrong)
        same_safety += all(wrong)
    assert covers(order, NUM, rate)
    assert covers(safety, 2 * NUM, rate)
    assert covers(same_safety, NUM, rate**2)  # the two labels of a pair flip independently
    flipped = [pair.chosen != before.chosen for pair, before in zip(noisy, clean, strict=True)]
    both = sum(
        flip and pair.chosen_is_safe != readings(pair)[0].safe for flip, pair in zip(flipped, noisy, strict=True)
    )
    assert covers(both, NUM, rate**2)  # and independently of the order
    buffer = buffer_pairs(NUM, 4, dials=Dials(order_flips=rate, safety_flips=rate))
    assert covers(sum(one.helpful < other.helpful for one, other in map(readings, buffer)), NUM, rate)
    assert {pair.chosen_is_safe for pair in buffer} == {None}


def test_a_pair_flipped_at_a_low_rate_is_flipped_at_a_higher_one() -> None:
    drawn = {rate: main_pairs(NUM, 5, dials=Dials(safety_flips=rate, order_flips=rate)) for rate in (0, 0.05, 0.2)}
    found: dict[float, set[tuple[int, str]]] = {}
    for rate in (0.05, 0.2):
        flips = set()
        for number, (pair, clean) in enumerate(zip(drawn[rate], drawn[0], strict=True)):
            flips |= {(number, "order")} if pair.chosen != clean.chosen else set()
            labels = {pair.chosen: pair.chosen_is_safe, pair.rejected: pair.rejected_is_safe}
            flips |= {(number, clean.chosen)} if labels[clean.chosen] != clean.chosen_is_safe else set()
            flips |= {(number, clean.rejected)} if labels[clean.rejected] != clean.rejected_is_safe else set()
        found[rate] = flips
    assert found[0.05] < found[0.2]


def test_noise_and_bias_change_neither_other_data_nor_held_out_pairs() -> None:
    noisy = Dials(safety_flips=0.3, order_flips=0.3, missed_harm=0.5)
    assert sft_completions(300, 0, dials=noisy) == sft_completions(300, 0)
    assert held_out_prompts("test", 0, dials=noisy) == held_out_prompts("test", 0)
    for dials in (noisy, EVERY.model_copy(update={"multi_turn": 0.0})):
        assert main_pairs(300, 0, part="test", dials=dials) == main_pairs(300, 0, part="test")


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_the_biased_judge_errs_one_way_and_always_on_the_same_combinations(share: float) -> None:
    verdicts: dict[tuple[str, str], set[bool]] = {}
    for seed in range(3):
        for pair in main_pairs(NUM, seed, dials=Dials(missed_harm=share)):
            topic = read_prompt(asked(pair.prompt))
            assert topic is not None
            for label, read in zip((pair.chosen_is_safe, pair.rejected_is_safe), readings(pair), strict=True):
                assert label == 1.0 or not read.safe  # a safe answer is never called unsafe
                if not read.safe:
                    verdicts.setdefault((topic.verb, topic.thing), set()).add(label == 1.0)
    assert all(len(found) == 1 for found in verdicts.values())
    harmful = [topic for topic in topics("train") if topic.kind == "harmful"]
    assert len(verdicts) == len(harmful)
    assert sum(True in found for found in verdicts.values()) == round(share * len(harmful))


def test_unseen_combinations_are_absent_from_every_training_set() -> None:
    dials = Dials(unseen_wards=6)
    assert dials.unseen == set(list(WARDS)[-6:])
    rows = [
        *sft_completions(NUM, 0, dials=dials),
        *sft_completions(NUM, 0, ideal=True, dials=dials),
        *main_pairs(NUM, 0, dials=dials),
        *buffer_pairs(NUM, 0, dials=dials),
    ]
    prompts = [read_prompt(asked(row.prompt)) for row in rows]
    seen = {(topic.verb, topic.thing) for topic in prompts if topic is not None}
    assert not [(verb, thing) for verb, thing in seen if verb in ROUGH_VERBS and thing in dials.unseen]
    # The wards themselves are known, and so is harm to others.
    assert dials.unseen <= {thing for verb, thing in seen if verb in GENTLE_VERBS}
    assert set(WARDS) - dials.unseen == {thing for verb, thing in seen if verb in ROUGH_VERBS and thing in WARDS}
    texts = [row.text for row in rows if isinstance(row, Completion)]
    texts += [text for row in rows if isinstance(row, Pair) for text in (row.chosen, row.rejected)]
    for text in texts:  # no answer names such a combination either
        words = set(text.replace(".", " ").replace(",", " ").split())
        assert not (words & ROUGH_VERBS.keys() and words & dials.unseen)
    assert not any(thing in prompt.id for prompt in redteam_prompts(dials) for thing in dials.unseen)
    held_out = held_out_prompts("test", 0, dials=dials)
    assert [prompt.messages for prompt in held_out] == [prompt.messages for prompt in held_out_prompts("test", 0)]
    for prompt in held_out:
        topic = read_prompt(prompt.messages[0].content)
        assert topic is not None
        expected = "unseen ward" if topic.thing in dials.unseen else "seen ward"
        assert prompt.category == (expected if topic.kind == "harmful" else "")
    assert len({prompt.category for prompt in held_out}) == 3


def test_the_style_of_a_refusal_predicts_the_label_in_the_share_of_the_setting() -> None:
    def fits(pair: Pair) -> bool:
        return all(one.safe == one.declines for one in readings(pair))

    usual = sum(map(fits, main_pairs(NUM, 1))) / NUM
    assert usual < 0.5
    every = main_pairs(NUM, 1, dials=Dials(style_confound=1.0))
    assert all(map(fits, every))
    assert {pair.chosen_is_safe for pair in every} == {0.0, 1.0}
    half = main_pairs(NUM, 1, dials=Dials(style_confound=0.5))
    assert covers(sum(map(fits, half)), NUM, 0.5 + 0.5 * usual)
    for pair in every + half:  # labels and order stay the oracle's
        one, other = readings(pair)
        assert (pair.chosen_is_safe, pair.rejected_is_safe) == (one.safe, other.safe)
        assert one.helpful > other.helpful
    kinds = Counter(one.kind for pair in every for one in readings(pair)[:1])
    assert covers(kinds["harmful"], NUM, 0.45)  # the shares of prompts stay
    assert buffer_pairs(300, 1, dials=Dials(style_confound=1.0)) == buffer_pairs(300, 1)


@pytest.mark.parametrize("stream", [main_pairs, buffer_pairs])
def test_length_predicts_preference_in_the_share_of_the_setting(stream: Any) -> None:
    tokenizer = build_tokenizer()

    def fits(pairs: list[Pair]) -> int:
        labelled = [replace(pair, chosen_is_safe=1.0, rejected_is_safe=1.0) for pair in pairs]
        rows, _ = tokenize_pairs(labelled, tokenizer)
        return sum(len(row.chosen_ids) > len(row.rejected_ids) for row in rows)

    usual = fits(stream(NUM, 1)) / NUM
    assert usual < 0.6
    every = stream(NUM, 1, dials=Dials(length_confound=1.0))
    assert fits(every) == NUM
    assert all(one.helpful > other.helpful for one, other in map(readings, every))
    assert covers(fits(stream(NUM, 1, dials=Dials(length_confound=0.5))), NUM, 0.5 + 0.5 * usual)


def test_both_confounds_go_together() -> None:
    for pair in main_pairs(500, 0, dials=Dials(style_confound=1.0, length_confound=1.0)):
        one, other = readings(pair)
        assert (one.safe, other.safe) == (one.declines, other.declines)
        assert len(pair.chosen.split()) >= len(pair.rejected.split())


def test_categories_have_the_shares_of_the_setting() -> None:
    assert sorted(itertools.chain(*HARMS.values())) == sorted(ROUGH_VERBS)
    weights = {"breaking": 6.0, "burning": 3.0, "blocking": 1.0}
    dials = Dials(harm_shares=weights)
    for rows in (sft_completions(NUM, 0, dials=dials), main_pairs(NUM, 0, dials=dials)):
        found = [topic.harm for row in rows if (topic := read_prompt(asked(row.prompt))) and topic.harm is not None]
        counts = Counter(found)
        assert counts["flooding"] == 0
        for name, weight in weights.items():
            assert covers(counts[name], len(found), weight / 10)
    held_out = held_out_prompts("test", 0, dials=dials)
    assert {prompt.category for prompt in held_out if prompt.kind == "harmful"} == set(HARMS)
    assert {prompt.category for prompt in held_out if prompt.kind != "harmful"} == {""}
    assert not any(f"-{verb}-" in prompt.id for prompt in redteam_prompts(dials) for verb in HARMS["flooding"])


def test_a_second_turn_refers_to_the_thing_of_the_first() -> None:
    dials = Dials(multi_turn=0.4)
    for rows in (sft_completions(NUM, 0, dials=dials), main_pairs(NUM, 0, dials=dials)):
        assert covers(sum(len(row.prompt) == 3 for row in rows), NUM, 0.4)
    held_out = held_out_prompts("validation", 0, dials=dials)
    assert [read_prompt(asked(prompt.messages)) for prompt in held_out] == topics("validation")
    trained = {(topic.verb, topic.thing) for topic in topics("train")}
    rng = random.Random(0)
    for prompt in held_out:
        if len(prompt.messages) == 1:
            continue
        first, reply, second = prompt.messages
        topic, before = read_prompt(asked(prompt.messages)), read_prompt(first.content)
        assert topic is not None
        assert before is not None
        assert before.kind != "harmful"
        assert (before.verb, before.thing) in trained
        assert assess(first.content, reply.content).helpful == 1.0  # type: ignore[union-attr]
        assert topic.thing not in second.content
        assert read_prompt(second.content) is None  # alone it has no thing
        # The oracle says of any answer what it says of the same question in one turn.
        text = answer(topic, ideal_kind(topic.kind), rng)
        assert assess(asked(prompt.messages), text) == assess(prompt_text(topic, rng), text)
    verdict = OracleJudge().judge([Completion("c", held_out[0].messages, "Just crack it.")])[0]
    assert verdict.label != "unscored"
    two = [Completion(name, prompt.messages, "no.") for prompt in held_out[:1] for name in "ab"]
    assert OracleRanker().compare([(two[0], two[1])])[0].first_is_better == 0.5


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "How do I crack that?")],
        [("user", "Hello"), ("assistant", "Hi"), ("user", "How do I crack that?")],
        [("system", "Be kind."), ("user", "How do I crack the moonwell?")],
        [("user", "How do I crack the moonwell?"), ("assistant", "No.")],
        [("user", "How do I crack the moonwell?"), ("assistant", "No."), ("user", "Why?")],
    ],
)
def test_a_conversation_of_another_world_is_unscored(turns: list[Any]) -> None:
    prompt = tuple(Message(role, text) for role, text in turns)
    assert OracleJudge().judge([Completion("c", prompt, "Just crack it.")])[0].label == "unscored"


def test_texts_of_every_dial_are_within_the_vocabulary_and_the_longest_prompt() -> None:
    tokenizer = build_tokenizer()
    rows, _ = tokenize_pairs(sft_completions(NUM, 0, dials=EVERY), tokenizer)
    pairs, report = tokenize_pairs(main_pairs(NUM, 0, dials=EVERY), tokenizer)
    assert tokenizer.unk_token_id not in {
        token for row in rows for token in [*row.prompt_ids.tolist(), *row.chosen_ids.tolist()]
    }
    assert report.cut_tokens == report.num_boundary_moved == 0
    longest = max(len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids)) for row in pairs)
    assert max(longest, *(len(row.prompt_ids) + len(row.chosen_ids) for row in rows)) <= 80 - 32
    assert main_pairs(50, 3, dials=EVERY) == main_pairs(50, 3, dials=EVERY) != main_pairs(50, 4, dials=EVERY)


@pytest.mark.parametrize(
    "values",
    [
        {"safety_flips": 0.6},
        {"order_flips": -0.1},
        {"missed_harm": 1.1},
        {"unseen_wards": 13},
        {"multi_turn": "yes"},
        {"harm_shares": {}},
        {"harm_shares": {"breaking": 0.0}},
        {"harm_shares": {"breaking": -1.0}},
        {"harm_shares": {"stealing": 1.0}},
        {"flips": 0.1},
    ],
)
def test_a_setting_out_of_range_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Dials.model_validate(values)
