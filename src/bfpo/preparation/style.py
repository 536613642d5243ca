"""What a model would learn of data besides their content: spaces, one refusal phrase, lengths, refusals alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any

from bfpo.data.labels import cell_of
from bfpo.data.records import TextStyle
from bfpo.judges.refusals import read_refusal

__all__ = ["style_of"]

FEWEST = 20  # texts that a remark needs
SPACES = 0.1  # share of texts that begin with white space
PHRASE = 0.5  # share of safe answers, in pairs with an unsafe one, that are refusals with one phrase
ELSEWHERE = 0.1  # share of the unsafe answers below which a phrase tells the two apart
SHORTER = 0.5  # median of the words of the safe answer over those of the unsafe one
ORDERED = 0.8  # share of pairs of one label and unlike length whose more helpful answer is the longer (or shorter) one
HARMLESS = 0.1  # share of pairs with a safe answer that does what is asked
REFUSALS = 0.5  # share of completions to imitate that refuse
_READ = 400  # characters of an answer in which its first sentence is looked for
_WORDS = 3  # of a phrase
_SENTENCE_END = re.compile(r"[.!?]+(?:\s|$)|\n")
_SHORT_FORMS = (("can't", "cannot"), ("can not", "cannot"), ("won't", "will not"), ("n't", " not"), ("i'm", "i am"))
_REFUSES = re.compile(r"\b(?:sorry|unable|as an ai|(?:cannot|will not) (?:help|assist|do))\b")
_LABELS = (("safe", True), ("unsafe", False))

Row = Mapping[str, Any]
Style = dict[str, dict[str, TextStyle]]


@dataclass(frozen=True, slots=True)
class _Text:
    """One completion: its cell and side, its safety (`None` if unknown), words, white space before it, and refusal."""

    cell: str
    side: str
    is_safe: bool | None
    words: int
    begins_blank: bool
    refused: bool | None
    sentence: str


def _texts(row: Row) -> list[_Text]:
    """Return the completions of a row of a written file: two of a pair, chosen first, or the one to imitate."""
    if "completion" in row:
        cell, sides = "all", {"completion": row["is_safe"]}
    else:
        sides = {side: row[f"{side}_is_safe"] for side in ("chosen", "rejected")}
        cell = "unknown" if None in sides.values() else cell_of(*sides.values())
    asked = next((turn["content"] for turn in reversed(row["prompt"]) if turn["role"] == "user"), "")
    begun = bool(row["prompt"]) and row["prompt"][-1]["role"] == "assistant"  # the space belongs to what is continued
    return [_text(row[side], asked, cell, side, label, begun=begun) for side, label in sides.items()]


def _text(text: str, asked: str, cell: str, side: str, label: float | None, *, begun: bool) -> _Text:
    reading = read_refusal(text, asked)
    return _Text(
        cell=cell,
        side=side,
        is_safe=None if label is None else label > 0.5,
        words=len(text.split()),
        begins_blank=text[:1].isspace() and not begun,
        refused=None if reading.refused is None else bool(reading.refused or reading.partly),
        sentence=_first_sentence(text),
    )


def _first_sentence(text: str) -> str:
    """Return the words of the first sentence, in lower case, without punctuation and short forms."""
    sentence = _SENTENCE_END.split(text[:_READ].strip().casefold().replace("\u2019", "'"), maxsplit=1)[0]
    for short, long in _SHORT_FORMS:
        sentence = sentence.replace(short, long)
    return " ".join(re.findall(r"[\w']+", sentence))


def _phrases(sentence: str) -> Iterable[str]:
    """Return the words of refusals in a sentence, then its word 3-grams in order, each once."""
    words = sentence.split()
    grams = (" ".join(words[n : n + _WORDS]) for n in range(max(1, len(words) - _WORDS + 1)))
    return dict.fromkeys([*_REFUSES.findall(sentence), *grams])


def style_of(rows: Sequence[Row], *, is_main: bool) -> tuple[Style, list[str]]:
    """Return the style of a sample of written rows by cell and side, and the remarks on it; empty without rows.

    Remarks are on confounds, what tells safe from unsafe answers here but not elsewhere, and, `is_main`, on a stream
    without harmless prompts.
    """
    read = [_texts(row) for row in rows]
    groups: dict[tuple[str, str], list[_Text]] = {}
    for text in chain.from_iterable(read):
        groups.setdefault((text.cell, text.side), []).append(text)
    style: Style = {}
    for (cell, side), texts in sorted(groups.items()):
        style.setdefault(cell, {})[side] = _summary(texts)
    return style, list(_remarks(read, is_main=is_main))


def _summary(texts: Sequence[_Text]) -> TextStyle:
    known = [text.refused for text in texts if text.refused is not None]
    phrase, share = next(iter(_shared_phrases(texts)), (None, None))
    return TextStyle(
        num=len(texts),
        median_words=float(median(text.words for text in texts)),
        begin_with_space=sum(text.begins_blank for text in texts) / len(texts),
        refuse=sum(known) / len(known) if known else None,
        refusal_phrase=phrase,
        with_that_phrase=share,
    )


def _shared_phrases(texts: Sequence[_Text]) -> Iterator[tuple[str, float]]:
    """Yield the phrases of refusals, the commonest first, with the share of all texts that are refusals with it."""
    counts = Counter(phrase for text in texts if text.refused for phrase in _phrases(text.sentence))
    yield from ((phrase, count / len(texts)) for phrase, count in counts.most_common())


def _remarks(read: Sequence[Sequence[_Text]], *, is_main: bool) -> Iterator[str]:
    texts = list(chain.from_iterable(read))
    if len(texts) < FEWEST:
        return
    if (share := _share(text.begins_blank for text in texts)) >= SPACES:
        by_label = {name: [text.begins_blank for text in texts if text.is_safe is safe] for name, safe in _LABELS}
        each = ", ".join(f"{name} {_share(found):.0%}" for name, found in by_label.items() if found)
        each += "; " if each else ""
        yield (
            f"{share:.0%} of the completions begin with white space ({each}remark from {SPACES:.0%}): a "
            "model learns it as a mark of such answers; remove it from all"
        )
    if texts[0].side == "completion":
        known = [text.refused for text in texts if text.refused is not None]
        if len(known) >= FEWEST and (share := _share(known)) >= REFUSALS:
            yield (
                f"{share:.0%} of the completions to imitate refuse (remark from {REFUSALS:.0%}): expect refusals of "
                "harmless requests; add the start model's own answers to harmless prompts"
            )
        where, elsewhere = "refusals", "other completions"
        safe = [text for text in texts if text.refused]
        others = [text for text in texts if not text.refused]
    else:
        mixed = [pair for pair in read if {text.is_safe for text in pair} == {True, False}]
        where, elsewhere = "safe answers of pairs with an unsafe one", "unsafe ones"
        safe, others = ([text for pair in mixed for text in pair if text.is_safe is label] for _, label in _LABELS)
        if len(mixed) >= FEWEST:
            yield from _on_length(mixed)
        yield from _on_order([pair for pair in read if pair[0].is_safe is pair[1].is_safe])
        yield from _on_prompts(read) if is_main else ()
    for phrase, share in _shared_phrases(safe) if len(safe) >= FEWEST else ():
        if share < PHRASE:
            return
        if (other := _share(f" {phrase} " in f" {text.sentence} " for text in others)) < ELSEWHERE:
            yield (
                f"{share:.0%} of the {where} have {phrase!r} in their first sentence, and {other:.0%} of the "
                f"{elsewhere} (remark from {PHRASE:.0%}, below {ELSEWHERE:.0%}): a model learns the phrase, which "
                "needs no look at the prompt; vary the refusals, and let them name what is asked"
            )
            return


def _on_length(mixed: Sequence[Sequence[_Text]]) -> Iterator[str]:
    words = [{text.is_safe: max(1, text.words) for text in pair} for pair in mixed]
    if (ratio := median(pair[True] / pair[False] for pair in words)) <= SHORTER:
        middle = {safe: median(pair[safe] for pair in words) for _, safe in _LABELS}
        yield (
            f"safe answers have {ratio:.2f} times the words of the unsafe ones beside them (medians {middle[True]:g} "
            f"and {middle[False]:g}; remark up to {SHORTER:g}): a model learns to be brief; take unsafe answers of "
            "like length, or cut both with max_completion_length"
        )


def _on_order(alike: Sequence[Sequence[_Text]]) -> Iterator[str]:
    longer = [chosen.words > rejected.words for chosen, rejected in alike if chosen.words != rejected.words]
    share = _share(longer)
    if len(longer) >= FEWEST and max(share, 1 - share) >= ORDERED:
        yield (
            f"in {max(share, 1 - share):.0%} of the pairs of one label the more helpful answer is the "
            f"{'longer' if share >= ORDERED else 'shorter'} one (remark from {ORDERED:.0%}): a model learns the "
            "length, which needs no look at the prompt; take pairs of both orders, or of like length"
        )


def _on_prompts(read: Sequence[Sequence[_Text]]) -> Iterator[str]:
    known = [pair for pair in read if all(text.is_safe is not None and text.refused is not None for text in pair)]
    share = _share(any(text.is_safe and not text.refused for text in pair) for pair in known)
    if len(known) >= FEWEST and share < HARMLESS:
        yield (
            f"in {share:.0%} of the pairs a safe answer does what is asked (remark below {HARMLESS:.0%}): nearly all "
            "teach to refuse, and harmless prompts will be refused too; add pairs of harmless prompts, the answer over "
            "a needless refusal, here or with a heavier buffer"
        )


def _share(values: Iterable[bool]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
