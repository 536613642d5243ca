"""Data sets of the closed world: SFT corpus, safety and helpfulness pairs, prompts; and its tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bfpo.core.schema import Completion, Message, Pair, Prompt
from bfpo.world.oracle import Assessment, assess
from bfpo.world.world import (
    PROMPT_KINDS,
    AnswerKind,
    Part,
    PromptKind,
    Topic,
    answer,
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


def sft_completions(num: int, seed: int, *, ideal: bool = False) -> list[Completion]:
    """Return `num` completions of training topics: the imperfect mixture, or only ideal answers (the ceiling)."""
    rng = random.Random(f"sft {seed}")
    rows = []
    for number, topic in enumerate(_draw_topics(topics("train"), _SFT_PROMPTS, rng)):
        if number == num:
            break
        kind = ideal_kind(topic.kind) if ideal else _draw(_SFT_ANSWERS[topic.kind], rng)
        prompt, text = prompt_text(topic, rng), answer(topic, kind, rng)
        rows.append(Completion(f"sft-{number}", _user(prompt), text, model="world", kind=topic.kind))
    return rows


def main_pairs(num: int, seed: int, *, harmful_share: float = 0.45, part: Part = "train") -> list[Pair]:
    """Return `num` pairs of the safety stream: all kinds of prompts, both labels known, all four label cells."""
    rest = 1 - harmful_share
    shares: dict[PromptKind, float] = {"benign": 0.45 * rest, "borderline": 0.55 * rest, "harmful": harmful_share}
    return _pairs(num, shares, part, random.Random(f"main {part} {seed}"), source="world-safety", labelled=True)


def buffer_pairs(num: int, seed: int) -> list[Pair]:
    """Return `num` pairs of the helpfulness stream: no harmful prompts and, as in most public data, no labels."""
    rng = random.Random(f"buffer {seed}")
    return _pairs(num, _BUFFER_PROMPTS, "train", rng, source="world-helpfulness", labelled=False)


def held_out_prompts(part: Part, seed: int) -> list[Prompt]:
    """Return one prompt for every topic of a held-out part, in a fixed order."""
    rng = random.Random(f"prompts {part} {seed}")
    return [
        Prompt(f"{part}-{topic.verb}-{topic.thing}", _user(prompt_text(topic, rng)), kind=topic.kind)
        for topic in topics(part)
    ]


def redteam_prompts() -> list[Prompt]:
    """Return every prompt about every harmful training topic, in a fixed order."""
    return [
        Prompt(f"redteam-{topic.verb}-{topic.thing}-{number}", _user(text), kind=topic.kind)
        for topic in topics("train")
        if topic.kind == "harmful"
        for number, text in enumerate(prompt_texts(topic))
    ]


def _pairs(
    num: int, shares: Mapping[PromptKind, float], part: Part, rng: random.Random, *, source: str, labelled: bool
) -> list[Pair]:
    pairs: list[Pair] = []
    for topic in _draw_topics(topics(part), shares, rng):
        if len(pairs) == num:
            break
        prompt = prompt_text(topic, rng)
        two = [answer(topic, _draw(_PAIR_ANSWERS[topic.kind], rng), rng) for _ in range(2)]
        (first, first_read), (second, second_read) = sorted(
            ((text, _assess(prompt, text)) for text in two), key=lambda item: -item[1].helpful
        )
        if first_read.helpful == second_read.helpful:
            continue  # a tie in helpfulness has no order
        labels = (float(first_read.safe), float(second_read.safe)) if labelled else (None, None)
        pair_id = f"{source}-{part}-{len(pairs)}"
        pairs.append(Pair(pair_id, _user(prompt), first, second, labels[0], labels[1], source))
    return pairs


def _assess(prompt: str, text: str) -> Assessment:
    assessment = assess(prompt, text)
    assert assessment is not None  # the prompt was made by this world
    return assessment


def _draw_topics(pool: Sequence[Topic], shares: Mapping[PromptKind, float], rng: random.Random) -> Iterator[Topic]:
    """Yield topics endlessly with the given shares of prompt kinds; within a kind, all topics come once per round."""
    by_kind = {kind: [topic for topic in pool if topic.kind == kind] for kind in PROMPT_KINDS}
    queues: dict[PromptKind, list[Topic]] = {kind: [] for kind in PROMPT_KINDS}
    while True:
        kind = rng.choices(list(shares), weights=list(shares.values()))[0]
        if not queues[kind]:
            queues[kind] = rng.sample(by_kind[kind], k=len(by_kind[kind]))
        yield queues[kind].pop()


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
