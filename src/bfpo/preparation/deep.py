"""Refusals after a harmful beginning, made from pairs of a harmful answer and a refusal (Qi et al., ICLR 2025).

The first words of the harmful answer become a begun message of the assistant, which the refusal continues: the prompt's
side has no loss, so that only the refusal is learned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b

from bfpo.core.schema import Completion, Message, Pair
from bfpo.data.messages import ends_with_assistant
from bfpo.data.rejects import LEFT_OUT, RowError
from bfpo.judges.refusals import last_question, read_refusal

__all__ = ["DeepRefusals", "declines"]


@dataclass(frozen=True, slots=True)
class DeepRefusals:
    """Makes the rows of a source: at most `most_words` words are given, then one of `transitions`, then the refusal.

    `as_pairs`: the harmful answer's rest stands against the refusal, else the refusal alone is a completion.
    """

    most_words: int
    transitions: tuple[str, ...]
    as_pairs: bool

    def in_words(self) -> str:
        """Return what the rows are, for the card."""
        against = ", against the rest of that answer" if self.as_pairs else ""
        return (
            f"a refusal after the first 1 to {self.most_words} words of an unsafe answer{against}; these words belong "
            "to the prompt and have no loss"
        )

    def __call__(self, pair: Pair) -> Pair | Completion:
        """Return the row; number of words and transition are drawn by a hash of prompt and harmful answer.

        The order of a pair and its labels stay. Raises `RowError`, as a row that is left out, for a pair that is not a
        harmful answer and a refusal, and for a harmful answer of a single word.
        """
        sides = {
            "chosen": (pair.chosen, pair.chosen_is_safe, pair.chosen_finished),
            "rejected": (pair.rejected, pair.rejected_is_safe, pair.rejected_finished),
        }
        safe = [name for name, (_, label, _) in sides.items() if label is not None and label > 0.5]
        unsafe = [name for name, (_, label, _) in sides.items() if label is not None and label <= 0.5]
        if len(safe) != 1 or len(unsafe) != 1 or not pair.prompt or ends_with_assistant(pair.prompt):
            raise RowError("chosen", f"{LEFT_OUT}not one safe and one unsafe answer to a prompt", pair.chosen)
        (harmful, _, whole), (refusal, _, ended) = sides[unsafe[0]], sides[safe[0]]
        question = last_question(pair.prompt)
        if declines(refusal, question) is not True:
            raise RowError(safe[0], f"{LEFT_OUT}the safe answer does not decline", refusal)
        if declines(harmful, question) is not False:
            raise RowError(unsafe[0], f"{LEFT_OUT}the unsafe answer declines too, or is not read for it", harmful)
        ends = [word.end() for word in re.finditer(r"\S+", harmful)]
        if len(ends) < 2:
            raise RowError(unsafe[0], f"{LEFT_OUT}the unsafe answer has a single word", harmful)
        content = "\0".join([*(turn.content for turn in pair.prompt), harmful])
        drawn = int.from_bytes(blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest(), "little")
        place, drawn = ends[drawn % min(self.most_words, len(ends) - 1)], drawn >> 64
        prompt = (*pair.prompt, Message("assistant", harmful[:place]))
        answer = self.transitions[drawn % len(self.transitions)] + refusal.lstrip()
        if not self.as_pairs:
            return Completion(pair.id, prompt, answer, finished=ended, is_safe=1.0, category=pair.category)
        texts = {safe[0]: answer, unsafe[0]: harmful[place:]}
        finished = {safe[0]: ended, unsafe[0]: whole}
        return Pair(
            pair.id,
            prompt,
            texts["chosen"],
            texts["rejected"],
            pair.chosen_is_safe,
            pair.rejected_is_safe,
            pair.source,
            chosen_finished=finished["chosen"],
            rejected_finished=finished["rejected"],
            category=pair.category,
        )


def declines(answer: str, question: str) -> bool | None:
    """Return whether an answer declines, in full or in part; `None` if it is not read for refusals."""
    found = read_refusal(answer, question)
    return None if found.refused is None else bool(found.refused or found.partly)
