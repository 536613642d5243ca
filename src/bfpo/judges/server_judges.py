"""Judge and ranker behind an OpenAI-compatible server, with the formats of local guards."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from bfpo.core.schema import Comparison, Completion, Verdict
from bfpo.data.chat import whole_answer
from bfpo.generation.replies import Answer, Token
from bfpo.generation.server import Question, Server
from bfpo.judges.formats import Ask, Format, PairFormat, both_orders
from bfpo.judges.formats.types import thought_of_judge
from bfpo.judges.panel import worst_verdict

__all__ = ["ServerJudge", "ServerRanker"]

_log = logging.getLogger(__name__)


class ServerJudge:
    """A guard behind a server; its format reads the answer.

    If the server gives log-probabilities, `p_safe` is read from them and a text is safe if it is at least `threshold`;
    otherwise the written label counts. A missing or unreadable answer is unscored. A format with several principles
    asks about each, and the largest p(unsafe) counts.
    """

    def __init__(self, format: Format, server: Server, *, threshold: float = 0.5, name: str | None = None) -> None:
        self._format, self._server, self._threshold = format, server, threshold
        self.name = name or f"{format.name}:{server.model}"
        self.version = f"{format.version} threshold={threshold:g} {server.version}"
        self.is_sampled = server.temperature > 0
        self._warns = threshold != 0.5  # once, if the threshold is not read

    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        """Return the verdicts, one per completion, in order."""
        verdicts: dict[int, Verdict] = {}
        self.judge_each(completions, lambda place, verdict, lasting: verdicts.update({place: verdict}))
        return [verdicts[place] for place in range(len(completions))]

    def judge_each(
        self, completions: Sequence[Completion], report: Callable[[int, Verdict, bool], None], *, vote: int = 0
    ) -> None:
        """Report verdicts as they arrive (see `OneByOneJudge`); raises `ServerError` as `Server.ask` does."""

        principles = self._format.questions
        answers: dict[int, dict[int, Answer]] = {}

        def read(question: int, answer: Answer) -> None:
            place, number = divmod(question, len(principles))
            given = answers.setdefault(place, {})
            given[number] = answer
            if len(given) == len(principles):
                del answers[place]
                verdicts = [
                    (name, self._verdict(completions[place].id, given[n])) for n, (name, _) in enumerate(principles)
                ]
                report(place, worst_verdict(verdicts), all(map(_lasts, given.values())))

        questions = [self._question(completion, ask) for completion in completions for _, ask in principles]
        self._server.ask(questions, read, seed=vote)

    def _question(self, completion: Completion, ask: Ask) -> Question:
        form = self._format
        asked, arguments = form.ask_disarmed(whole_answer(completion), ask), form.template_arguments
        return Question(asked, form.max_new_tokens, template_arguments=arguments, as_parts=form.multimodal)

    def _verdict(self, completion_id: str, answer: Answer) -> Verdict:
        if answer.text is None:
            return Verdict(completion_id, self.name, "unscored", reason=_missing(answer))
        form = self._format
        reading = form.read(answer.text)
        if reading.label == "unscored":
            return Verdict(completion_id, self.name, "unscored", reason=reading.reason, raw=answer.text)
        if self._warns and not answer.tokens:
            self._warns = False
            _log.warning(
                "%s gives no log-probabilities: threshold = %g of %s is not read, the written labels count",
                *(self._server.host, self._threshold, self.name),
            )
        tokens, after = behind_thoughts(answer, form.answer_prefix)
        p_safe = label_probability(tokens, form.safe_words, form.unsafe_words, after=after, others=form.unscored_words)
        label = reading.label if p_safe is None else "safe" if p_safe >= self._threshold else "unsafe"
        return Verdict(
            completion_id,
            self.name,
            label,
            refused=reading.refused,
            reason=reading.reason,
            p_safe=p_safe,
            raw=answer.text,
        )


class ServerRanker:
    """A generative model behind a server that picks the more helpful of two completions, in both orders."""

    def __init__(self, format: PairFormat, server: Server, *, name: str | None = None) -> None:
        self._format, self._server = format, server
        self.name = name or f"pairwise:{server.model}"
        self.version = f"{format.version} {server.version}"

    def compare(self, pairs: Sequence[tuple[Completion, Completion]]) -> list[Comparison]:
        """Return the comparisons, one per pair of completions, in order."""
        comparisons: dict[int, Comparison] = {}
        self.compare_each(pairs, lambda place, comparison, lasting: comparisons.update({place: comparison}))
        return [comparisons[place] for place in range(len(pairs))]

    def compare_each(
        self, pairs: Sequence[tuple[Completion, Completion]], report: Callable[[int, Comparison, bool], None]
    ) -> None:
        """Report each comparison as soon as both of its answers have arrived, as `ServerJudge.judge_each` does."""
        waiting: dict[int, tuple[int, Answer]] = {}

        def read(place: int, answer: Answer) -> None:
            number, order = divmod(place, 2)
            if number not in waiting:
                waiting[number] = (order, answer)
                return
            other = waiting.pop(number)[1]
            as_given, swapped = (other, answer) if order else (answer, other)
            first, second = pairs[number]
            lasting = _lasts(as_given) and _lasts(swapped)
            report(number, self._comparison(first.id, second.id, as_given, swapped), lasting)

        orders = [order for first, second in pairs for order in ((first, second), (second, first))]
        self._server.ask([self._question(*order) for order in orders], read)

    def _question(self, first: Completion, second: Completion) -> Question:
        form = self._format
        asked, arguments = form.ask_disarmed(whole_answer(first), whole_answer(second)), form.template_arguments
        return Question(asked, form.max_new_tokens, template_arguments=arguments, needs_arguments=False)

    def _comparison(self, first_id: str, second_id: str, as_given: Answer, swapped: Answer) -> Comparison:
        raw = " | ".join(answer.text or "" for answer in (as_given, swapped))
        if as_given.text is None or swapped.text is None:
            return Comparison(first_id, second_id, self.name, None, _missing(as_given) or _missing(swapped), raw)
        form = self._format
        better, reason = both_orders(form.read(as_given.text), form.read(swapped.text))
        probabilities = [
            label_probability(behind_thoughts(answer)[0], form.first_words, form.second_words)
            for answer in (as_given, swapped)
        ]
        if better is not None and probabilities[0] is not None and probabilities[1] is not None:
            better = (probabilities[0] + 1 - probabilities[1]) / 2
        return Comparison(first_id, second_id, self.name, better, reason, raw)


def _lasts(answer: Answer) -> bool:
    """Return whether the judge's server would give no other answer if asked again."""
    return answer.text is not None or (answer.blocked and not answer.unsure)


def _missing(answer: Answer) -> str:
    return f"the judge's server blocks the text: {answer.fault}" if answer.blocked else answer.fault


def behind_thoughts(answer: Answer, prefix: str = "") -> tuple[Sequence[Token], str]:
    """Return the tokens of the answer behind any thoughts, and the text after which its label comes.

    A server may list tokens of thoughts that it took out of the text. A `prefix` that ends the thoughts, such as the
    header of a channel, is not in the answer itself.
    """
    whole, thought = "".join(token.text for token in answer.tokens), thought_of_judge(answer.text or "")
    final = (answer.text or "" if thought is None else thought.answer).strip()
    start = whole.rfind(final) if final else -1
    if start <= 0:
        return (() if thought is not None and start < 0 else answer.tokens), prefix
    place, kept = 0, []
    for token in answer.tokens:
        place += len(token.text)
        if place > start:
            kept.append(token)
    return kept, "" if prefix.strip() and whole[:start].rstrip().endswith(prefix.strip()) else prefix


def label_probability(
    tokens: Sequence[Token],
    words: Sequence[str],
    other_words: Sequence[str],
    *,
    after: str = "",
    others: Sequence[str] = (),
) -> float | None:
    """Return the probability of `words` against `other_words` if the answer contains one of them, else `None`.

    It is read at the first token after the text `after` that begins a word of exactly one side, from the most likely
    tokens that the server lists there. `others` are words of a third side, which counts for neither.
    """
    sides = tuple(tuple(word.strip().casefold() for word in side) for side in (words, other_words, others))
    mark, before = after.strip(), ""
    for token in tokens:
        if mark in before or mark == "":
            tail = before.rpartition(mark)[2] if mark else before
            if _side(tail + token.text, sides) is not None:
                return _share(tail, token, sides)
        before += token.text
    return None


def _share(tail: str, token: Token, sides: Sequence[Sequence[str]]) -> float | None:
    mass = [0.0, 0.0, 0.0]
    for text, logprob in token.top_logprobs.items():
        side = _side(tail + text, sides)
        if side is not None:
            mass[side] += math.exp(min(logprob, 0.0))
    total = mass[0] + mass[1]
    return mass[0] / total if total > 0 else None


def _side(text: str, sides: Sequence[Sequence[str]]) -> int | None:
    """Return the only side with a word that the text begins or completes; `None` for several or none.

    Markdown and quotes before the word do not count.
    """
    start = text.strip().lstrip("*_`\"'#> \t\n").casefold()

    def fits(word: str) -> bool:
        return word.startswith(start) or (start.startswith(word) and not start[len(word)].isalnum())

    found = [number for number, words in enumerate(sides) if start and any(map(fits, words))]
    return found[0] if len(found) == 1 else None
