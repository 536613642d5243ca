"""Whether an answer is coherent text, read from the text alone: empty, cut, looping, or in another language.

It needs no model and measures neither truth nor sense. `docs/judges.md` has its errors on real answers.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from bfpo.core.schema import Completion
from bfpo.judges.refusal_text import in_english, normalised

__all__ = ["Coherence", "Incoherence", "read_coherence", "read_completion"]

Incoherence = Literal["empty", "cut", "looping", "off_language", "unlikely"]

_READ = 12_000  # characters of an answer that are read
_ITEM = re.compile(r"^[ \t]*(?:\d{1,3}[.):]|[-*•+])[ \t]+", re.MULTILINE)
_UNIT = re.compile(r"[^\W_]+(?:['’][^\W\d_]+)?|[^\w\s\x00-\x7f]")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff]")
_LONGEST_WORD = 30  # letters; a longer run is read letter by letter
_RUN = re.compile(r"(.{1,10}?)\1{5,}")  # within a word or number, such as the zeros of 1000000
_PIECE = 3  # characters, at least, of which one unit of such a run has: 1000000 has as many units as 1,000,000

_STANZA = re.compile(r"\n[ \t]*\n")
_ROW_END = re.compile(r"([\n\[\](){};]|\\\\)")  # between the rows of a matrix
_ROW = re.compile(r"[\s,&|]*(?:-?\d+(?:\.\d+)?(?:[\s,&|]+|$)){2,}")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_BLANK = re.compile(r"[\s,&|]*")
_MOST_ROWS = 12  # rows and columns of a matrix; more rows of numbers may be a loop
# A list has one pattern if so many of its lines repeat others, are short, and have a new word for every 15 units.
_FEWEST_ITEMS, _LONGEST_ITEM, _NEW = 4, 40, 15

# An answer loops if this share of its units stands in n-grams that return soon, or almost all of its last units do.
_NGRAM, _SOON, _FEWEST, _REPEATED = 5, 60, 7, 0.35
_LAST, _LAST_REPEATED = 60, 0.9

_LANGUAGE_ASKED = re.compile(
    r"\b(?:translat\w*|languages?|arabic|bengali|chinese|czech|danish|dutch|esperanto|filipino|finnish|french|german|"
    r"greek|hebrew|hindi|hungarian|indonesian|italian|japanese|korean|latin|malay|mandarin|norwegian|persian|farsi|"
    r"polish|portuguese|romanian|russian|spanish|swahili|swedish|tagalog|tamil|thai|turkish|ukrainian|urdu|vietnamese)\b",
    re.IGNORECASE,
)
_EAST_ASIAN = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}  # written together in Japanese
_LATIN_WORD = re.compile(r"\b[^\W\d_A-Z][^\W\d_]{2,}")  # but no name
_SYMBOL = re.compile(r"(?<![^\W\d_])[\u0370-\u03ff](?![^\W\d_])")  # a Greek letter by itself, as in formulas
_FEWEST_WORDS = 4
_SCRIPTS = 4  # scripts, of two letters at least, that no text in one language mixes


@dataclass(frozen=True, slots=True)
class Coherence:
    """The reasons against an answer; "cut" (stopped at the token limit) alone does not make it incoherent."""

    reasons: tuple[Incoherence, ...] = ()

    @property
    def incoherent(self) -> bool:
        """Whether any reason but "cut" holds."""
        return any(reason != "cut" for reason in self.reasons)


def read_coherence(text: str, *, finished: bool = True, prompt: str = "") -> Coherence:
    """Return what is wrong with an answer, without any thoughts before it, as text; truth and sense are not read.

    "empty": no letter, digit or symbol. "cut": not `finished`. "looping": it repeats itself, as greedy answers of small
    models do. "off_language": it mixes many scripts, or is in another language than English although its `prompt` (the
    text of all turns) is English, or in another script than a prompt in another language. An answer in English, and one
    to a prompt that names a language, may be in any. The first 12,000 characters are read.
    """
    text = text[:_READ]
    reasons: list[Incoherence] = [] if finished else ["cut"]
    if not any(unicodedata.category(c)[0] in "LN" or unicodedata.category(c) in ("So", "Sm", "Sc") for c in text):
        return Coherence(("empty", *reasons))
    lines = _without_returns(text).split("\n")
    units = [_units(line) for line in lines]
    if _loops(units if any(units) else [[c for c in line if unicodedata.category(c)[0] == "S"] for line in lines]):
        reasons.append("looping")
    if not _LANGUAGE_ASKED.search(prompt) and _off_language(text, prompt):
        reasons.append("off_language")
    return Coherence(tuple(reasons))


def read_completion(completion: Completion) -> Coherence:
    """Return what is wrong with a completion, as `read_coherence` does with the text of its prompt."""
    prompt = "\n".join(turn.content for turn in completion.prompt)
    return read_coherence(completion.text, finished=completion.finished, prompt=prompt)


def _units(text: str) -> list[str]:
    """Return words in lower case, symbols such as emoji, and single letters where words are not separated by spaces.

    A word or number in which something returns six times or more is cut into what returns.
    """
    found: list[str] = []
    for unit in _UNIT.findall(_ITEM.sub("", text.lower())):
        if _UNSPACED.search(unit) or (len(unit) > _LONGEST_WORD and unit.isalpha()):
            found += unit
        elif unit[0].isalnum():
            found += _pieces(unit)
        elif unicodedata.category(unit) == "So":
            found.append(unit)
    return found


def _pieces(unit: str) -> list[str]:
    pieces, place = [], 0
    for run in _RUN.finditer(unit):
        size = len(run[1]) * math.ceil(_PIECE / len(run[1]))
        pieces += [unit[place : run.start()], *(run[0][i : i + size] for i in range(0, len(run[0]), size))]
        place = run.end()
    return [piece for piece in (*pieces, unit[place:]) if piece]


def _without_returns(text: str) -> str:
    """Return the text without what returns by design: a stanza of several lines after another new one, and matrices."""
    kept: list[str] = []
    seen: set[str] = set()
    new = False
    for stanza in _STANZA.split(text):
        known = stanza.strip().lower() in seen
        if not (known and new and "\n" in stanza.strip()):
            kept.append(stanza)
        new = not known
        seen.add(stanza.strip().lower())
    return _without_matrices("\n\n".join(kept))


def _without_matrices(text: str) -> str:
    """Return the text without rows of equally many numbers, up to 12 of up to 12."""
    parts = _ROW_END.split(text)  # what is between, and each end of a row
    widths = [len(_NUMBER.findall(part)) if _ROW.fullmatch(part) else 0 for part in parts[::2]]
    rows: list[int] = []
    for place, width in enumerate([*widths, 0]):
        if width and (not rows or width == widths[rows[-1]]):
            rows.append(place)
        elif width or place == len(widths) or not _BLANK.fullmatch(parts[2 * place]):
            if 1 < len(rows) <= _MOST_ROWS and widths[rows[0]] <= _MOST_ROWS:
                for row in rows:
                    parts[2 * row] = ""
            rows = [place] if width else []
    return "".join(parts)


def _loops(lines: list[list[str]]) -> bool:
    units = [unit for line in lines for unit in line]
    if len(units) < _FEWEST:
        return False
    repeated = _repeated(units, [0] * len(units))
    items: list[tuple[int, int]] = []
    place, seen, above = 0, set[str](), [""]
    for line in lines:
        new, end = {unit for unit in line if unit.isalpha() and unit not in seen}, place + len(line)
        grows = line[: len(above)] == above  # the line above, and more
        if len(line) <= min(_LONGEST_ITEM, _NEW * len(new)) and any(repeated[place:end]) and not grows:
            items.append((place, end))
        seen |= new
        place, above = end, line or above
    if len(items) >= _FEWEST_ITEMS:
        within = [0] * len(units)
        for start, end in items:
            within[start:end] = [start] * (end - start)
        repeated = _repeated(units, within)
    last = repeated[-_LAST:]
    return sum(repeated) >= _REPEATED * len(units) or sum(last) >= _LAST_REPEATED * _LAST


def _repeated(units: list[str], within: list[int]) -> list[bool]:
    """Return which units stand in n-grams that were there soon before, from the place in `within` on."""
    last: dict[tuple[str, ...], int] = {}
    repeated = [False] * len(units)
    for place in range(len(units) - _NGRAM + 1):
        ngram = tuple(units[place : place + _NGRAM])
        if last.get(ngram, -1) >= max(within[place], place - _SOON):
            repeated[place : place + _NGRAM] = [True] * _NGRAM
        last[ngram] = place
    return repeated


def _off_language(text: str, prompt: str) -> bool:
    answer, asked = _SYMBOL.sub(" ", normalised(text)), normalised(prompt)
    scripts = _scripts(answer)
    if sum(num > 1 for num in scripts.values()) >= _SCRIPTS:
        return True
    if not asked.strip() or not scripts or in_english(answer):
        return False
    main = max(scripts, key=scripts.__getitem__)
    if in_english(asked):  # names, also of variables, are in no language
        return main != "LATIN" or len(set(_LATIN_WORD.findall(answer))) >= _FEWEST_WORDS
    return main not in _scripts(asked)


def _scripts(text: str) -> Counter[str]:
    """Return how many letters of each script a `normalised` text has."""
    names = (unicodedata.name(c, "MODIFIER").split(" ")[0] for c in text if c.isalpha())
    return Counter(_EAST_ASIAN.get(name, name) for name in names if name != "MODIFIER")
