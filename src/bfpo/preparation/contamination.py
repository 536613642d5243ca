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

__all__ = ["EvaluationPrompts", "Hit"]

How = Literal["equal", "near", "contained"]
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
    space and Unicode form aside), where it *nearly* repeats it (the exact Jaccard similarity of their n-grams reaches
    the threshold), or where it *contains* all its words in a row, if these are `contained_words` or more. Words are
    runs of letters and digits: in scripts without spaces between words only the first two apply. `near=None` skips near
    matches.
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
        for index, text in enumerate(texts):
            self._by_text[text].append(index)
            words = _words(text.removeprefix("user: "))
            if len(words) >= contained_words:
                beginning = " ".join(words[:contained_words])
                self._by_beginning[beginning].append((" ".join(words), index))
        self._grams = [] if near is None else ngrams(texts, near.characters)
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

    def find(
        self,
        messages: Sequence[Message],
        text: str,
        grams: npt.NDArray[np.uint64] | None,
        bands: npt.NDArray[np.uint32],
    ) -> list[Hit]:
        """Return the hits of a prompt, at most one for each suite: equal before near before contained.

        `text` is the normalised prompt, `grams` its n-grams and `bands` (num_bands,) the hashes of its sketch.
        """
        found: dict[str, Hit] = {}
        for how, indices in (
            ("equal", self._equal(messages, text)),
            ("near", self._near(grams, bands)),
            ("contained", self._contained(text)),
        ):
            for index in indices:
                suite, prompt_id = self._prompts[index]
                found.setdefault(suite, Hit(suite, prompt_id, how))  # type: ignore[arg-type]
        return list(found.values())

    def _equal(self, messages: Sequence[Message], text: str) -> list[int]:
        turns = [normalised_prompt([turn]) for turn in messages if turn.role == "user"] if len(messages) > 1 else []
        return [index for one in (text, *turns) for index in self._by_text.get(one, ())]

    def _near(self, grams: npt.NDArray[np.uint64] | None, bands: npt.NDArray[np.uint32]) -> list[int]:
        if self._near_settings is None or grams is None:
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
            for whole, index in self._by_beginning.get(" ".join(words[start : start + size]), ()):
                if f"{' '.join(words[start:])} ".startswith(f"{whole} "):
                    found.append(index)
        return found


def _words(text: str) -> list[str]:
    return _WORD.findall(text)
