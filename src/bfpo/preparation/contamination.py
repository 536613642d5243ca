"""Evaluation prompts, and whether a prompt of the data matches one of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from bfpo.config.prepare import NearDuplicatesConfig
from bfpo.core.schema import Message, Prompt
from bfpo.data.split import normalised_prompt
from bfpo.preparation.sketches import bands_of, ngrams, similarity, sketches_of

__all__ = ["EvaluationPrompts", "Hit", "Sketch", "without_system"]

How = Literal["equal", "near", "contained"]
Sketch = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]
"""The n-grams of a normalised text, and the hashes of its sketch (num_bands,)."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Hit:
    """A prompt of the data that matches an evaluation prompt."""

    suite: str
    prompt_id: str
    how: How


class EvaluationPrompts:
    """Evaluation prompts of several suites, ready to be compared with many prompts.

    A prompt of the data is a hit where the whole of it or a turn of the user *equals* an evaluation prompt (case, white
    space and Unicode form aside) or *nearly* repeats it (the exact Jaccard similarity of their n-grams, system messages
    aside, reaches the threshold), or where the whole of it *contains* all its words in a row, if these are
    `contained_words` or more. Words are runs of letters and digits: in scripts without spaces between words only the
    first two apply. `near=None` skips near matches.
    """

    def __init__(
        self, suites: Mapping[str, Sequence[Prompt]], *, contained_words: int, near: NearDuplicatesConfig | None
    ) -> None:
        self._contained_words = contained_words
        self._near_settings = near
        self._prompts = [(suite, prompt.id) for suite, prompts in suites.items() for prompt in prompts]
        texts = [normalised_prompt(prompt.messages) for prompts in suites.values() for prompt in prompts]
        self._by_text: dict[str, list[int]] = defaultdict(list)
        self._by_beginning: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self._first_words: set[str] = set()
        for index, text in enumerate(texts):
            self._by_text[text].append(index)
            words = _words(text.removeprefix("user: "))
            if len(words) >= contained_words:
                beginning = " ".join(words[:contained_words])
                self._first_words.add(words[0])
                self._by_beginning[beginning].append((" ".join(words), index))
        said = [normalised_prompt(without_system(prompt.messages)) for some in suites.values() for prompt in some]
        self._grams = [] if near is None else ngrams(said, near.characters)
        self._by_band: list[dict[int, list[int]]] = []
        if near is not None and texts:
            bands = bands_of(sketches_of(self._grams, near), near)
            for column in bands.T.tolist():
                table: dict[int, list[int]] = defaultdict(list)
                for index, band in enumerate(column):
                    table[band].append(index)
                self._by_band.append(dict(table))

    def __len__(self) -> int:
        return len(self._prompts)

    def find(self, text: str, parts: Sequence[str], sketches: Sequence[Sketch]) -> list[Hit]:
        """Return the hits of a prompt, at most one for each suite: equal before near before contained.

        `text` is the normalised prompt, `parts` are what else may equal or nearly repeat an evaluation prompt: the
        prompt without system messages, and turns of the user. `sketches` are those of the parts.
        """
        found: dict[str, Hit] = {}
        for how, indices in (
            ("equal", [index for one in (text, *parts) for index in self._by_text.get(one, ())]),
            ("near", [index for grams, bands in sketches for index in self._near(grams, bands)]),
            ("contained", self._contained(text)),
        ):
            for index in indices:
                suite, prompt_id = self._prompts[index]
                found.setdefault(suite, Hit(suite, prompt_id, how))  # type: ignore[arg-type]
        return list(found.values())

    def _near(self, grams: npt.NDArray[np.uint64], bands: npt.NDArray[np.uint32]) -> list[int]:
        if self._near_settings is None:
            return []
        candidates = {
            index for table, band in zip(self._by_band, bands.tolist(), strict=False) for index in table.get(band, ())
        }
        return [i for i in sorted(candidates) if similarity(grams, self._grams[i]) >= self._near_settings.threshold]

    def _contained(self, text: str) -> list[int]:
        if not self._by_beginning:
            return []
        words, size = _words(text), self._contained_words
        found = []
        for start in range(len(words) - size + 1):
            if words[start] not in self._first_words:  # most are not, and joining words takes longer
                continue
            for whole, index in self._by_beginning.get(" ".join(words[start : start + size]), ()):
                if f"{' '.join(words[start:])} ".startswith(f"{whole} "):
                    found.append(index)
        return found


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def without_system(messages: Sequence[Message]) -> Sequence[Message]:
    """Return the messages that are not the system's; all if there are no others, or no system message."""
    said = [message for message in messages if message.role != "system"]
    return said if 0 < len(said) < len(messages) else messages
