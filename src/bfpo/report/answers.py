"""The answers on a page: thousands of texts as one compressed block, which the page's script unpacks."""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from bfpo.core.schema import Verdict
from bfpo.report.data import ReportData, SampleAnswer
from bfpo.report.figures.marks import token_of

__all__ = ["DIFFER", "AnswerBlock", "answer_block", "badges", "behind", "is_folded"]

MAX_BYTES = 16_000_000
DIFFER = "judges differ"
_SHORTEST_TEXT = 60
_SHORTER_THOUGHTS = 3  # thoughts get this part of an answer's room: they are long, and answers count


@dataclass(frozen=True, slots=True)
class AnswerBlock:
    """The answers on the page: base64 of deflated JSON, and how many of the texts it contains."""

    text: str
    num_prompts: int
    num_answers: int
    num_cut: int
    longest: int


def answer_block(data: ReportData, *, max_bytes: int = MAX_BYTES) -> AnswerBlock:
    """Return all answers for the page in full, or cut to the length that fits into `max_bytes`.

    A cut text has the number of missing characters. Base64 contains no character that could end the HTML element. If
    even the shortest texts do not fit, the last prompts are left out.
    """
    # Where judges disagree, people should look first.
    samples = sorted(data.samples, key=lambda sample: not any(answer.judges_differ for answer in sample.answers))
    lengths = [len(sample.prompt) for sample in samples]
    for answer in (answer for sample in samples for answer in sample.answers):
        votes = [*([asdict(answer.verdict)] if answer.verdict else []), *(answer.votes or ())]
        shorter = [len(answer.reasoning), *(len(str(vote.get("raw") or "")) for vote in votes)]
        lengths += [len(answer.text), *(_SHORTER_THOUGHTS * length for length in shorter)]
    longest = max(lengths, default=0)
    while True:
        content, num_cut = _content(data, samples, longest)
        raw = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        block = base64.b64encode(zlib.compress(raw, 9)).decode("ascii")
        if len(block) <= max_bytes:
            num_answers = sum(len(sample.answers) for sample in samples)
            return AnswerBlock(block, len(samples), num_answers, num_cut, longest)
        if longest > _SHORTEST_TEXT:
            longest = max(_SHORTEST_TEXT, int(longest * min(0.7, max_bytes / len(block))))
        else:
            samples = samples[: len(samples) // 2]


def _content(data: ReportData, samples: list[Any], longest: int) -> tuple[dict[str, Any], int]:
    places = {method.name: place for place, method in enumerate(data.methods)}
    sets: dict[tuple[tuple[str, str], ...], int] = {}
    rows, num_cut = [], 0
    asked = [(sample.suite, sample.kind, sample.prompt) for sample in samples]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(asked), start=1)}
    several, seen = Counter(asked), Counter[tuple[str, str, str]]()
    for sample, prompt in zip(samples, asked, strict=False):
        answers = []
        seen[prompt] += 1
        copy = seen[prompt] if several[prompt] > 1 else 0  # number of the sample of a prompt that has several
        for answer in sample.answers:
            words = tuple(badges(answer.verdict, answer.finished, answer.incoherent))
            words += ((DIFFER, "note"),) * answer.judges_differ
            missing = max(0, len(answer.text) - longest)
            num_cut += missing > 0
            fold = int(is_folded(answer, sample.kind))
            row: list[Any] = [places[answer.method], answer.text[:longest], sets.setdefault(words, len(sets))]
            thoughts, facts = (
                _thoughts(answer, longest // _SHORTER_THOUGHTS),
                behind(answer, longest // _SHORTER_THOUGHTS),
            )
            answers.append([*row, fold, missing, *(thoughts or ["", 0] * bool(facts)), *([facts] if facts else [])])
        num_cut += len(sample.prompt) > longest
        # Links name a prompt by what it is, not by its place, which changes while a run is in progress.
        key = "\0".join(prompt) + (f"\0{copy}" if copy > 1 else "")
        name = sha256(key.encode("utf-8", "replace")).hexdigest()[:10]
        rows.append([sample.prompt[:longest], sample.kind, sample.suite, answers, name, numbers[prompt], copy])
        if category := next((answer.category for answer in sample.answers if answer.category), ""):
            rows[-1].append(category[:longest])
    methods = [[method.title, token_of(data, method)] for method in data.methods]
    return {"methods": methods, "badges": list(sets), "rows": rows}, num_cut


def _thoughts(answer: SampleAnswer, longest: int) -> list[Any]:
    """Return the thoughts before an answer and how many characters of them are missing; nothing without thoughts."""
    if not answer.reasoning:
        return []
    return [answer.reasoning[:longest], max(0, len(answer.reasoning) - longest)]


def behind(answer: SampleAnswer, longest: int) -> list[tuple[str, str]]:
    """Return titles and texts of what stands behind a verdict, raw outputs cut to `longest`; empty for a bare label.

    Each judge has its label, p(safe) beside its threshold, its reason and its raw output.
    """
    if answer.verdict is None:
        return []
    votes = answer.votes or []
    # A verdict of several judges is theirs together; one of a single judge stands among the others.
    together = answer.verdict.judge not in {vote.get("judge") for vote in votes}
    votes = [asdict(answer.verdict), *votes] if together else votes
    several = len(votes) > 1
    found: list[tuple[str, str]] = []
    for number, vote in enumerate(votes):
        p, least = vote.get("p_safe"), (answer.thresholds or {}).get(str(vote.get("judge")))
        parts = [str(vote.get("label"))] * several
        parts += [] if p is None else [f"p(safe) {p:.3f}" + ("" if least is None else f", safe from {least:g} on")]
        parts += [str(vote["reason"])] if vote.get("reason") else []
        raw = str(vote.get("raw") or "")
        parts += [
            f"output: {raw[:longest]}" + f" [{len(raw) - longest} more characters]" * (len(raw) > longest)
        ] * bool(raw)
        if parts:
            found.append(
                (f"{'All, ' if several and together and not number else ''}{vote.get('judge')}", "\n".join(parts))
            )
    return found


def is_folded(answer: SampleAnswer, kind: str) -> bool:
    """Return whether an answer is hidden until a click: judged unsafe, or unjudged and to a harmful prompt.

    What stands in place of a blocked answer is not hidden.
    """
    label = answer.verdict.label if answer.verdict is not None else "unscored"
    if answer.finished is None:
        return False
    return label == "unsafe" or (label == "unscored" and kind == "harmful")


def badges(
    verdict: Verdict | None, finished: bool | None, incoherent: Sequence[str] | None = None
) -> Iterable[tuple[str, str]]:
    """Yield the words and styles of a verdict, the decisive ones first."""
    if finished is None:
        yield "blocked by its server: no answer", "note"
        return
    if verdict is None or verdict.label == "unscored":
        yield ("not judged" if verdict is None else "unscored"), "plain"
    else:
        if verdict.label == "unsafe":
            yield "unsafe", "bad"
        elif verdict.helpful_and_safe:
            yield "helpful and safe", "good"
        else:
            yield "safe", "plain"
        if verdict.well_formed is False:
            yield "broken text", "bad"
        elif verdict.on_topic is False:
            yield "off topic", "note"
        if verdict.refused:
            yield "declines", "note"
        if verdict.helpful is not None:
            yield f"helpfulness {verdict.helpful:.1f}", "plain"
    if incoherent:
        yield f"incoherent: {', '.join(incoherent).replace('_', ' ')}", "bad"
    if not finished:
        yield "cut at the token limit", "note"
