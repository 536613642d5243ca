"""What refusal reading needs to know of a text: its plain form, whose words it holds, and whether it is English."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["PlainText", "in_ascii", "in_english", "language_of", "normalised", "plain_text"]

_READ = 12_000  # characters of an answer that are read at all
_LANGUAGE_CHARS = 1500
_APOSTROPHES = dict.fromkeys(map(ord, "‘’‚‛′‵ʹʻʼʽˈʾՙ՚＇´‹›᾿῾ꞌ‎"), "'")
_QUOTES = dict.fromkeys(map(ord, "“”„‟″«»〝〞〟＂「」『』"), '"')
_PLAIN_MARKS = _APOSTROPHES | _QUOTES
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_FENCE = re.compile(r"```[^\n`]{0,40}\n(.{0,6000}?)(?:```|\Z)|```", re.DOTALL)
_CODE = re.compile(r"`[^`\n]{1,300}`")
_TAG = re.compile(r"</?[a-z][^<>\n]{0,80}>", re.IGNORECASE)
_DOUBLE_QUOTED = re.compile(r'"[^"]{1,1500}"')
# An apostrophe inside a word is not a quote: an opening one follows a space or bracket, a closing one a mark or word.
_SINGLE_QUOTED = re.compile(r"'(?<![^\s(\[:]')(?=\w)[^\n]{1,400}?(?<=[\w.,!?…])'(?!\w)")
_WHOLLY_QUOTED = re.compile(r"""\s*(["'])(?!\s)([^"]+)\1\s*[.!]?\s*""")
_ACTION = re.compile(r"\s*[*_(\[][a-z][a-z ,']{1,40}[*_)\]]\s*(?!:)")
_LIST_ITEM = re.compile(r"^[ \t]*(?:\d{1,2}[.)]|[-*•+]|[a-z]\))[ \t]+(?=\S)", re.MULTILINE | re.IGNORECASE)
_MARKS = re.compile(r"[*_~#>|]+")
_WIDE_SPACE = re.compile(r"[\t\u3000][ \t\u3000]*| [ \t\u3000]+")  # not a single space, which stays as it is
_WORD_CHARACTER = re.compile(r"\w")
_TWO_LETTERS = re.compile(r"[^\W\d_]{2}")
_NO_WORD = re.compile(r"[^\w\"']*")
# Of one line. Each branch begins with a character of its own: only there is anything tried.
_END = re.compile(r"\s(?<=[.!?…]\s)\s*|[\"')\]](?<=[.!?…][\"')\]])[\"')\]]*\s+|[.!?](?=\s*$)")
_PERSONA = re.compile(  # "[GPT]:", "(Normal Output)", "ChatGPT:", "As DAN,": who speaks from here on
    r"^\s*(?:[\[(][^\n\])]{1,40}[\])]\s*:?|\w{0,12}gpt\b[^\n:.!?]{0,12}:|(?:(?:the|my|your|final|short|model|system|"
    r"ai|virtual|"
    r"helpful) ){0,2}(?:assistant|ai|bot|chatbot|model|answer|response|reply|output|note|error|warning|system|dan|"
    r"claude|llama|gemini|bard)[^\n:.!?\w]{0,6}:)\s*",
    re.IGNORECASE,
)
_SPEAKER = re.compile(r"^\s*([^\W\d_][\w .'-]{0,24}):(?=\s)", re.MULTILINE)
_SPOKEN = {"gonna": "going to", "gotta": "have to", "wanna": "want to"}
_NO_APOSTROPHE = re.compile(r"\b(?:im|(?:ca|do|wo|does|is|are|should|would|could)nt|gonna|gotta|wanna)\b")
_NEW_VOICE = re.compile(
    r"\b(?:now that we(?:'ve| have) got|now that (?:that|this)(?:'s| is)|out of (?:the|this) (?:way|\w+ shit))\b|"
    r"^as (?!an?\b|the\b|your\b|per\b)\w+,? i\b"
)


@dataclass(frozen=True, slots=True)
class PlainText:
    """An answer in lower case, without markup, code and the words of others.

    `sentences`: its sentences in order. `items`: by sentence, whether it is an item of a list. `turns`: by sentence,
    whether another voice of the model, such as `[DAN]:`, begins with it. `dialogue`: a script of several speakers.
    """

    sentences: tuple[str, ...]
    items: tuple[bool, ...]
    turns: tuple[bool, ...]
    dialogue: bool


def normalised(text: str) -> str:
    """Return the text with one kind of apostrophe and of quote, NFKC, without invisible characters and tags."""
    text = text[:_READ]
    if not text.isascii():
        text = text.translate(_PLAIN_MARKS)
    if "`" in text or "´" in text:
        text = re.sub(r"(?<=[^\W\d_])[`´](?=[^\W\d_])", "'", text)
    if text.isascii():
        text = _CONTROLS.sub("", text)
    else:
        text = unicodedata.normalize("NFKC", text)[: 2 * _READ]
        if unseen := {ord(c) for c in set(text) if unicodedata.category(c) in ("Cf", "Mn", "Cc") and c not in "\n\t"}:
            text = text.translate(dict.fromkeys(unseen))
    text = _TAG.sub(" ", text) if "<" in text else text
    return _WIDE_SPACE.sub(" ", text) if "  " in text or "\t" in text or "\u3000" in text else text


def plain_text(text: str) -> PlainText:
    """Return the plain form of a `normalised` text; of a JSON object that of its texts."""
    if text.lstrip().startswith("{"):
        text = _texts_of_json(text)
    prose = _FENCE.sub(" ", text) if "```" in text else text
    if not _TWO_LETTERS.search(prose):  # nothing but a block of code: an answer may be written in one
        prose = _FENCE.sub(r"\1", text)
    prose = _CODE.sub(" code ", prose) if "`" in prose else prose
    if (whole := _WHOLLY_QUOTED.fullmatch(prose)) is not None:
        prose = whole.group(2)
    prose = _DOUBLE_QUOTED.sub(_unless_a_word, prose) if '"' in prose else prose
    prose = _SINGLE_QUOTED.sub(_unless_a_word, prose)
    if (action := _ACTION.match(prose)) is not None:
        prose = prose[action.end() :]
    labels = [match for match in _SPEAKER.finditer(prose[:2000]) if match.group(1).lower() not in ("note", "warning")]
    script = len(labels) >= 2 and not prose[: labels[0].start()].strip() and not _PERSONA.match(labels[0].group())
    sentences: list[str] = []
    items: list[bool] = []
    turns: list[bool] = []
    named = False  # the model's own voice has a name, so that other names are other voices
    for line in prose.lower().split("\n"):
        item = _LIST_ITEM.match(line)
        line = line[item.end() :] if item else line
        line = _MARKS.sub("", line)
        voice = _PERSONA.match(line) or (_SPEAKER.match(line) if named else None)
        named = named or (voice is not None and not sentences)
        line = line[voice.end() :] if voice and voice.end() < len(line) else line
        for n, sentence in enumerate(_sentences(line)):
            sentences.append(_NO_APOSTROPHE.sub(_with_apostrophe, sentence))
            items.append(item is not None)
            turns.append((voice is not None and n == 0) or _begins_a_voice(sentence))
    return PlainText(tuple(sentences), tuple(items), tuple(turns), dialogue=script)


def in_ascii(text: str) -> str:
    """Return a text in lower case with "Z", which no pattern names, for each other word character and DEL for the rest.

    What a pattern of ASCII finds in it is what it would find in the text if it knew all characters.
    """
    return text if text.isascii() else _NOT_ASCII.sub(lambda match: "Z" if match.group().isalnum() else "\x7f", text)


def _begins_a_voice(sentence: str) -> bool:
    may = "now that" in sentence or "out of" in sentence or sentence.startswith("as ")
    return may and _NEW_VOICE.search(sentence) is not None


def _unless_a_word(match: re.Match[str]) -> str:
    """Return nothing for a quoted sentence, and the words themselves for the quoted name of a thing."""
    words = match.group()[1:-1]
    is_name = len(words.split()) <= 4 and not re.search(
        r"[.!?,]|\b(?:I|we|can't|cannot|won't|no|not|refuse|decline|sorry)\b", words, re.I
    )
    return f" {words} " if is_name else ' "" '


def _texts_of_json(text: str) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return "\n".join(part for part in value.values() if isinstance(part, str)) if isinstance(value, dict) else text


def _with_apostrophe(match: re.Match[str]) -> str:
    word = match.group()
    return _SPOKEN.get(word) or ("i'm" if word == "im" else f"{word[:-1]}'t")


def _sentences(line: str) -> Iterator[str]:
    for part in _END.split(line):
        part = _NO_WORD.sub("", part, count=1).rstrip(" .!…)]")
        if _WORD_CHARACTER.search(part):
            yield part


# --------------------------------------------------------------------------------------------------------- language

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
# Words that are frequent in English, and hardly used in other languages written in Latin letters.
_ENGLISH = frozenset(
    re.findall(
        r"\S+",
        "the and that this with you your are it its of to for not can't cannot i'm i'll it's don't won't i've is be "
        "have what which would should could help sorry but there they how my these he she we if from by here an",
    )
)
# Frequent words of other languages (German, French, Spanish, Portuguese, Italian, Dutch, Scandinavian, Polish, Czech,
# Turkish, Indonesian, Romanian, Hungarian, Finnish, Vietnamese) that are not English words.
_FOREIGN = frozenset(
    re.findall(
        r"\S+",
        "nein ja ich nicht der das und ist mir ein eine leider kann dir mit auf zu oui je ne pas le la les des est une "
        "vous pour que et lo el los las puedo por con ese del al mi di il che non questo posso sono della "
        "uma para isso het een niet ik van dat kan je geen jag inte det och att nej jeg ikke og på nie się jest "
        "mogę tak si se na bir ve bu bunu hayır değil tidak saya yang itu dengan bisa maaf pot să nem az egy "
        "en ei ole minä xin tôi không của",
    )
)
_NOT_ENGLISH = _FOREIGN | {"abeg", "dem", "dey", "dis", "na", "una", "wetin", "wey"}  # the last of Nigerian Pidgin
_SHARE = 0.15  # of common English words, from which a text is English
_SURE_SHARE = 0.2  # the same for a text without words of other languages, from which no model is asked
_FIRST_WORDS = 20
_FOREIGN_SHARE = 0.25  # of common or accented words of other languages, above which a small difference decides
_WORDS, _MARGIN = 4, 22.0  # else so many words are needed, and so large a difference of log-probabilities, nats


def in_english(text: str) -> bool:
    """Return whether a `normalised` text is in English as far as can be said; a text without words counts as English.

    Letters of another script decide by number. Otherwise the text is not English if few of its words are common English
    ones and py3langid finds another language more likely: much more, unless many are words of other languages.
    """
    prose = _CODE.sub(" ", _FENCE.sub(" ", text[:_LANGUAGE_CHARS]))
    prose = prose if _TWO_LETTERS.search(prose) else text[:_LANGUAGE_CHARS]
    if prose.isascii():
        words = _WORD.findall(prose.lower())
    else:
        letters = {c: number for c, number in Counter(prose).items() if c.isalpha()}
        latin = sum(number for c, number in letters.items() if _is_latin(c))
        # A character of Chinese or Korean says about as much as two Latin letters.
        if 2 * (sum(letters.values()) - latin) > latin:
            return False
        words = [word.lower() for word in _WORD.findall(prose) if _is_latin(word[0])]
    for part in (words[:_FIRST_WORDS], words):  # an English opening may introduce words of another language
        if len([word for word in part if word in _ENGLISH]) >= _SHARE * len(part):
            return True
    foreign = sum(word in _FOREIGN or not word.isascii() for word in words) > _FOREIGN_SHARE * len(words)
    if not foreign and len(words) < _WORDS:
        return True
    import py3langid

    scores = {str(language): float(score) for language, score in py3langid.rank(" ".join(words))}
    return max(scores.values()) - scores["en"] <= (0.0 if foreign else _MARGIN)


def language_of(text: str) -> str:
    """Return the language of a text (ISO 639): English by its common words, which is fast, else py3langid's guess.

    The words decide also on texts of few words, which a model of bytes takes for one of a hundred languages.
    """
    words = _WORD.findall(text.lower())
    common = len([word for word in words if word in _ENGLISH])
    if common and common >= _SURE_SHARE * len(words) and _NOT_ENGLISH.isdisjoint(words):
        return "en"
    import py3langid

    return str(py3langid.classify(text)[0])


@lru_cache(maxsize=4096)
def _is_latin(character: str) -> bool:
    return "LATIN" in unicodedata.name(character, "LATIN")
