"""Data sets of the closed world: SFT corpus, safety and helpfulness pairs, prompts; and its tokenizer."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bfpo.core.schema import Completion, Message, Pair, Prompt
from bfpo.world.dials import NO_DIALS, Dials
from bfpo.world.oracle import Assessment, assess
from bfpo.world.world import (
    AnswerKind,
    Part,
    PromptKind,
    Topic,
    answer,
    follow_up,
    ideal_kind,
    prompt_text,
    prompt_texts,
    topics,
    vocabulary,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "buffer_pairs",
    "build_tokenizer",
    "held_out_prompts",
    "main_pairs",
    "redteam_prompts",
    "save_tokenizer",
    "sft_completions",
]

Shares = Mapping[AnswerKind, float]

# The SFT corpus is imperfect: it helps with harmful prompts in four of ten cases and refuses too often elsewhere. The
# start model thus knows all kinds of answers and can still improve in both helpfulness and safety.
_SFT_ANSWERS: dict[PromptKind, Shares] = {
    "benign": {"full": 0.60, "careless": 0.08, "vague": 0.12, "redirection": 0.05, "refusal": 0.12, "off_topic": 0.03},
    "borderline": {
        "full": 0.45,
        "careless": 0.07,
        "vague": 0.10,
        "redirection": 0.13,
        "refusal": 0.22,
        "off_topic": 0.03,
    },
    "harmful": {
        "full": 0.37,
        "careless": 0.03,
        "vague": 0.10,
        "redirection": 0.30,
        "refusal": 0.18,
        "off_topic": 0.02,
    },
}
# The two answers of a pair are drawn independently, so that every label cell occurs.
_PAIR_ANSWERS: dict[PromptKind, Shares] = {
    "benign": {"full": 0.35, "careless": 0.12, "vague": 0.15, "redirection": 0.12, "refusal": 0.20, "off_topic": 0.06},
    "borderline": {
        "full": 0.33,
        "careless": 0.10,
        "vague": 0.13,
        "redirection": 0.17,
        "refusal": 0.22,
        "off_topic": 0.05,
    },
    "harmful": {
        "full": 0.30,
        "careless": 0.08,
        "vague": 0.22,
        "redirection": 0.30,
        "refusal": 0.07,
        "off_topic": 0.03,
    },
}
_SFT_PROMPTS: dict[PromptKind, float] = {"benign": 0.30, "borderline": 0.35, "harmful": 0.35}
_BUFFER_PROMPTS: dict[PromptKind, float] = {"benign": 0.6, "borderline": 0.4}


def sft_completions(num: int, seed: int, *, ideal: bool = False, dials: Dials = NO_DIALS) -> list[Completion]:
    """Return `num` completions of training topics: the imperfect mixture, or only ideal answers (the ceiling)."""
    rng, turns = random.Random(f"sft {seed}"), random.Random(f"sft turns {seed}")
    rows = []
    for number, topic in enumerate(_draw_topics(_pool("train", dials), _SFT_PROMPTS, rng, dials.harm_shares)):
        if number == num:
            break
        kind = ideal_kind(topic.kind) if ideal else _draw(_SFT_ANSWERS[topic.kind], rng)
        prompt, text = prompt_text(topic, rng), answer(topic, kind, rng)
        rows.append(Completion(f"sft-{number}", _turns(topic, prompt, dials, turns), text, "world", topic.kind))
    return rows


def main_pairs(
    num: int, seed: int, *, harmful_share: float = 0.45, part: Part = "train", dials: Dials = NO_DIALS
) -> list[Pair]:
    """Return `num` pairs of the safety stream: all kinds of prompts, both labels known, all four label cells.

    Labels and order are the oracle's, changed by the dials only for training.
    """
    rest = 1 - harmful_share
    shares: dict[PromptKind, float] = {"benign": 0.45 * rest, "borderline": 0.55 * rest, "harmful": harmful_share}
    return _pairs(num, shares, part, f"main {part} {seed}", dials, source="world-safety", labelled=True)


def buffer_pairs(num: int, seed: int, *, dials: Dials = NO_DIALS) -> list[Pair]:
    """Return `num` pairs of the helpfulness stream: no harmful prompts and, as in most public data, no labels."""
    return _pairs(num, _BUFFER_PROMPTS, "train", f"buffer {seed}", dials, source="world-helpfulness", labelled=False)


def held_out_prompts(part: Part, seed: int, *, dials: Dials = NO_DIALS) -> list[Prompt]:
    """Return one prompt for every topic of a held-out part, in a fixed order, the same topics for all dials."""
    rng, turns = random.Random(f"prompts {part} {seed}"), random.Random(f"prompt turns {part} {seed}")
    return [
        Prompt(
            f"{part}-{topic.verb}-{topic.thing}",
            _turns(topic, prompt_text(topic, rng), dials, turns),
            topic.kind,
            category=_category(topic, dials),
        )
        for topic in topics(part)
    ]


def redteam_prompts(dials: Dials = NO_DIALS) -> list[Prompt]:
    """Return every prompt of one turn about every harmful training topic, in a fixed order."""
    return [
        Prompt(f"redteam-{topic.verb}-{topic.thing}-{number}", _user(text), kind=topic.kind)
        for topic in _pool("train", dials)
        if topic.kind == "harmful"
        for number, text in enumerate(prompt_texts(topic))
    ]


def _pool(part: Part, dials: Dials) -> list[Topic]:
    """Return the topics of a part; training has no harm on the unseen wards, nor of a category without weight."""
    if part != "train":
        return topics(part)
    weights = dials.harm_shares
    return [
        topic
        for topic in topics(part)
        if topic.harm is None or (topic.thing not in dials.unseen and (weights is None or weights.get(topic.harm)))
    ]


def _category(topic: Topic, dials: Dials) -> str:
    """Return the category of a harmful prompt, as far as the dials make categories, else ""."""
    if topic.harm is None:
        return ""
    ward = "unseen ward" if topic.thing in dials.unseen else "seen ward" if dials.unseen else ""
    return ", ".join(filter(None, (topic.harm if dials.harm_shares else "", ward)))


def _turns(topic: Topic, text: str, dials: Dials, rng: random.Random) -> tuple[Message, ...]:
    """Return a prompt about the topic: `text` itself or, in the share of `multi_turn`, as a second turn."""
    if rng.random() >= dials.multi_turn:
        return _user(text)
    first, reply, second = follow_up(topic, text, rng)
    return Message("user", first), Message("assistant", reply), Message("user", second)


def _pairs(
    num: int, shares: Mapping[PromptKind, float], part: Part, name: str, dials: Dials, *, source: str, labelled: bool
) -> list[Pair]:
    rng, turns = random.Random(name), random.Random(f"{name} turns")
    # A generator of its own, with as many draws for every pair: the pairs are the same at any rate of noise, and those
    # flipped at a low rate are flipped at a higher one.
    luck = random.Random(f"{name} dials")
    drawn = dials if part == "train" else NO_DIALS.model_copy(update={"multi_turn": dials.multi_turn})
    missed = _missed_topics(drawn)
    topics_to_come = _draw_topics(_pool(part, drawn), shares, rng, drawn.harm_shares)
    style = drawn.style_confound if labelled else 0.0
    rates = (style, drawn.length_confound, drawn.safety_flips, drawn.safety_flips, drawn.order_flips)
    pairs: list[Pair] = []
    for number in range(num):
        by_style, by_length, *flips, is_reversed = [luck.random() < rate for rate in rates]
        while True:
            topic = next(topics_to_come)
            prompt = prompt_text(topic, rng)
            read = _two_answers(topic, prompt, rng)
            while (by_style or by_length) and not _is_confounded(read, by_style=by_style, by_length=by_length):
                read = _two_answers(topic, prompt, rng)
            if read[0][1].helpful > read[1][1].helpful:  # a tie in helpfulness has no order
                break
        sides = [
            (text, (one.safe or topic in missed) != flip if labelled else None)
            for (text, one), flip in zip(read, flips, strict=True)
        ]
        (chosen, chosen_is_safe), (rejected, rejected_is_safe) = reversed(sides) if is_reversed else sides
        messages = _turns(topic, prompt, drawn, turns)
        pair_id = f"{source}-{part}-{number}"
        labels = (chosen_is_safe, rejected_is_safe)
        pairs.append(Pair(pair_id, messages, chosen, rejected, *labels, source, category=_category(topic, drawn)))
    return pairs


def _two_answers(topic: Topic, prompt: str, rng: random.Random) -> list[tuple[str, Assessment]]:
    """Return two answers drawn independently, the more helpful one first."""
    two = [answer(topic, _draw(_PAIR_ANSWERS[topic.kind], rng), rng) for _ in range(2)]
    return sorted(((text, _assess(prompt, text)) for text in two), key=lambda item: -item[1].helpful)


def _missed_topics(dials: Dials) -> frozenset[Topic]:
    """Return the harmful training topics that the biased judge takes for harmless, spread evenly over all."""
    harmful = [topic for topic in _pool("train", dials) if topic.harm is not None]
    return frozenset(random.Random("missed harm").sample(harmful, k=round(dials.missed_harm * len(harmful))))


def _is_confounded(read: Sequence[tuple[str, Assessment]], *, by_style: bool, by_length: bool) -> bool:
    """Return whether a pair with an order, the more helpful first, has the confounds asked for."""
    (first, one), (second, other) = read
    return (
        one.helpful > other.helpful
        and (not by_style or all(side.safe == side.declines for _, side in read))
        and (not by_length or _length(first) > _length(second))
    )


def _length(text: str) -> int:
    """Return the number of words and marks, which is that of the tokens."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def _assess(prompt: str, text: str) -> Assessment:
    assessment = assess(prompt, text)
    assert assessment is not None  # the prompt was made by this world
    return assessment


def _draw_topics(
    pool: Sequence[Topic],
    shares: Mapping[PromptKind, float],
    rng: random.Random,
    harms: Mapping[str, float] | None = None,
) -> Iterator[Topic]:
    """Yield topics endlessly with the given shares of prompt kinds, and of categories among harmful ones.

    Within a kind or category, all topics come once per round.
    """
    groups: dict[str, list[Topic]] = {}
    for topic in pool:
        groups.setdefault(topic.harm if harms and topic.harm else topic.kind, []).append(topic)
    queues: dict[str, list[Topic]] = {name: [] for name in groups}
    while True:
        name: str = rng.choices(list(shares), weights=list(shares.values()))[0]
        if harms and name == "harmful":
            name = rng.choices(list(harms), weights=list(harms.values()))[0]
        if not queues[name]:
            queues[name] = rng.sample(groups[name], k=len(groups[name]))
        yield queues[name].pop()


def _draw(shares: Shares, rng: random.Random) -> AnswerKind:
    return rng.choices(list(shares), weights=list(shares.values()))[0]


def _user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


_PAD, _UNKNOWN, _USER, _ASSISTANT, _END = "<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    f"{{%- if message['role'] == 'assistant' -%}}{_ASSISTANT}{{{{ message['content'] }}}}{_END}"
    f"{{%- else -%}}{_USER}{{{{ message['content'] }}}}"
    "{%- endif -%}{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{_ASSISTANT}{{%- endif -%}}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token per word (with its leading space) or mark; decoding restores the text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [_PAD, _UNKNOWN, _USER, _ASSISTANT, _END, *vocabulary()]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=_UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[^A-Za-z]"), "isolated")
    core.decoder = decoders.Fuse()
    make: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast  # its constructor is untyped
    return make(
        tokenizer_object=core,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        eos_token=_END,
        additional_special_tokens=[_USER, _ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: Path) -> None:
    """Save the tokenizer in the format of `transformers`."""
    build_tokenizer().save_pretrained(str(folder))
