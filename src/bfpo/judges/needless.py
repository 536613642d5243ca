"""Harmless prompts that a model refuses -> pairs of the buffer: an answer that complies over the needless refusal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from bfpo.core.console import level_text
from bfpo.core.markdown import table
from bfpo.core.schema import Completion, Pair, Score
from bfpo.data.rejects import LEFT_OUT, RowError
from bfpo.data.split import normalised_prompt
from bfpo.data.thinking import message_extra
from bfpo.judges.coherence import read_completion
from bfpo.judges.records import NeedlessRefusals
from bfpo.judges.refusals import RefusalJudge

__all__ = [
    "NEEDLESS_STEPS",
    "ReadAnswer",
    "buffer_pairs",
    "check_kept",
    "needless_text",
    "over_refusal",
    "read_answers",
    "refused_prompts",
]

NEEDLESS_STEPS = {
    "prompts": "harmless prompts",
    "completions": "answers",
    "not_read": "of these not read for refusals",
    "incoherent": "of these incoherent",
    "partly_refused": "of these refused in part",
    "refused": "of these refused",
    "prompts_refused": "prompts with a refusal that can be used",
    "from_start": "pairs with an answer of the start model",
    "from_model": "pairs with another answer of the model",
    "without_answer": "prompts without an answer that complies",
    "pairs": "pairs for the buffer",
}


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """An answer to a harmless prompt; `refused` and `partly` as in `RefusalReading`."""

    completion: Completion
    refused: bool | None
    partly: bool | None
    coherent: bool

    @property
    def is_needless(self) -> bool:
        """Whether it is a refusal that a pair can reject."""
        return self.refused is True and self.coherent

    @property
    def complies(self) -> bool:
        """Whether it is read, declines nothing and is coherent."""
        return self.refused is False and not self.partly and self.coherent


def check_kept(leave_out: Collection[str]) -> Callable[[Completion], None]:
    """Return a check that raises `RowError` for an answer that `leave_out` (refused, incoherent, cut) leaves out."""

    def check(completion: Completion) -> None:
        found = read_completion(completion)
        reasons: list[str] = [name for name in found.reasons if ("cut" if name == "cut" else "incoherent") in leave_out]
        if not reasons and "refused" in leave_out:
            (answer,) = read_answers([completion], [False])
            reasons = [
                words for words, holds in (("refused", answer.refused), ("refused in part", answer.partly)) if holds
            ]
        if reasons:
            raise RowError("text", f"{LEFT_OUT}{reasons[0]}", completion.text)

    return check


def read_answers(completions: Sequence[Completion], incoherent: Sequence[bool]) -> list[ReadAnswer]:
    """Return the answers with their refusals, in order; `incoherent`: one for each, which no pair takes."""
    verdicts = RefusalJudge().judge(completions)
    return [
        ReadAnswer(
            completion, *((None, None) if completion.blocked else (found.refused, found.partly_refused)), not bad
        )
        for completion, found, bad in zip(completions, verdicts, incoherent, strict=True)
    ]


def refused_prompts(answers: Iterable[ReadAnswer]) -> dict[str, Completion]:
    """Return the first needless refusal of each normalised prompt that has one, in order."""
    found: dict[str, Completion] = {}
    for answer in answers:
        if answer.is_needless:
            found.setdefault(normalised_prompt(answer.completion.prompt), answer.completion)
    return found


def buffer_pairs(
    answers: Sequence[ReadAnswer], start: Sequence[ReadAnswer], *, source: str = "redteam"
) -> tuple[list[Pair], dict[str, int]]:
    """Return one pair for each prompt with a needless refusal, both sides safe, and the counts of every step.

    Chosen is the first answer of `start` that complies, else the first of the model itself; rejected the refusal. A
    prompt without such an answer gives no pair and is counted as `without_answer`.
    """
    complying = [_first_by_prompt(start), _first_by_prompt(answers)]
    refused = refused_prompts(answers)
    pairs, taken = [], [0, 0]
    for prompt, refusal in refused.items():
        place = next((n for n, found in enumerate(complying) if prompt in found), None)
        if place is None:
            continue
        taken[place] += 1
        chosen = complying[place][prompt]
        pairs.append(
            Pair(
                f"{'own' if place else 'start'}:{chosen.id}|{refusal.id}",
                refusal.prompt,
                chosen.text,
                refusal.text,
                1.0,
                1.0,
                source,
                tools=refusal.tools,
                chosen_extra=message_extra(chosen),
                rejected_extra=message_extra(refusal),
                chosen_finished=chosen.finished,
                rejected_finished=refusal.finished,
            )
        )
    funnel = {
        "prompts": len({normalised_prompt(answer.completion.prompt) for answer in answers}),
        "completions": len(answers),
        "not_read": sum(answer.refused is None for answer in answers),
        "incoherent": sum(not answer.coherent for answer in answers),
        "partly_refused": sum(answer.partly is True for answer in answers),
        "refused": sum(answer.refused is True for answer in answers),
        "prompts_refused": len(refused),
        "from_start": taken[0],
        "from_model": taken[1],
        "without_answer": len(refused) - len(pairs),
        "pairs": len(pairs),
    }
    return pairs, funnel


def _first_by_prompt(answers: Iterable[ReadAnswer]) -> dict[str, Completion]:
    found: dict[str, Completion] = {}
    for answer in answers:
        if answer.complies:
            found.setdefault(normalised_prompt(answer.completion.prompt), answer.completion)
    return found


def over_refusal(answers: Sequence[ReadAnswer], *, confidence: float = 0.95) -> Score:
    """Return the share of the answers that are refused; the interval is over prompts, unread answers count apart."""
    read = [answer for answer in answers if answer.refused is not None]
    prompts = [normalised_prompt(answer.completion.prompt) for answer in read]
    from bfpo.stats import rate_interval  # which `bfpo prepare` does not need

    found = rate_interval([answer.refused is True for answer in read], prompts, confidence=confidence)
    unread = len(answers) - len(read)
    return Score("over_refusal", found.value, found.low, found.high, found.num, unread, higher_is_better=False)


def needless_text(found: NeedlessRefusals, confidence: float) -> str:
    """Return the counts and the rate as Markdown."""
    lines = table(["step", "number"], ([words, found.funnel[name]] for name, words in NEEDLESS_STEPS.items()))
    rate = found.over_refusal
    if rate is not None and rate.value is not None and rate.low is not None and rate.high is not None:
        shown = f"{rate.value:.3f} ({rate.low:.3f} to {rate.high:.3f}; {level_text(confidence)}, over prompts)"
        lines += ["", f"Over-refusal, the share of {rate.num} answers to harmless prompts that are refused: {shown}."]
    return "\n".join(lines)
