"""A small judge and a ranker that are trained here: hashed n-grams of the words and a logistic regression."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from scipy.special import expit

from bfpo.core.errors import DataError, ModelError, SettingError
from bfpo.core.files import write_bytes_whole, write_text_whole
from bfpo.core.schema import Comparison, Completion, Pair, Verdict

__all__ = [
    "FEW_ROWS",
    "JUDGE_FILE",
    "NgramJudge",
    "NgramRanker",
    "NgramSettings",
    "few_rows",
    "fit_ngrams",
    "fit_ranker",
    "ngram_counts",
    "save_described",
    "seen_rows",
    "tfidf_rows",
    "trained_on_few",
    "write_rows",
]

JUDGE_FILE, _WEIGHTS = "judge.json", "weights.safetensors"
_FORMAT_VERSION = 1
_WORD = re.compile(r"\b\w\w+\b")  # what scikit-learn's vectorizers take for a word

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class NgramSettings:
    """What the judge reads and how much it may learn.

    `ngrams` bounds the number of words in a row, `num_features` is the size of the hashed table, `inverse_penalty` the
    C of scikit-learn's logistic regression, `with_prompt` has it read the prompt too (its words apart from the
    completion's). A text is safe where p(safe) is above `threshold`. Raises `SettingError` for a value out of range.
    """

    ngrams: tuple[int, int] = (1, 2)
    num_features: int = 1 << 18
    inverse_penalty: float = 10.0
    with_prompt: bool = False
    threshold: float = 0.5

    def __post_init__(self) -> None:
        low, high = self.ngrams
        if not 1 <= low <= high:
            raise SettingError(f"ngrams: got {list(self.ngrams)}; allowed: two whole numbers, 1 <= first <= second")
        if self.num_features < 2 or self.inverse_penalty <= 0 or not 0 < self.threshold < 1:
            raise SettingError("num_features, inverse_penalty, threshold: allowed: at least 2, above 0, and in (0, 1)")


class NgramJudge:
    """Says p(safe) of a text from its n-grams; a text without a word is unscored."""

    def __init__(self, name: str, settings: NgramSettings, idf: Floats, weights: Floats, intercept: float) -> None:
        self.name = name
        self.settings = settings
        self._idf, self._weights, self._intercept = idf, weights, intercept
        digest = hashlib.sha256(json.dumps([_FORMAT_VERSION, asdict(settings), intercept]).encode())
        digest.update(idf.tobytes() + weights.tobytes())
        self.version = f"ngrams-{digest.hexdigest()[:16]}"

    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        """Return the verdicts, one per completion, in order."""
        texts = [_text(completion, self.settings) for completion in completions]
        if not texts:
            return []
        p_safe = expit(tfidf_rows(ngram_counts(texts, self.settings), self._idf) @ self._weights + self._intercept)
        return [
            self._verdict(completion, float(p) if _WORD.search(completion.text) else None)
            for completion, p in zip(completions, p_safe, strict=True)
        ]

    def _verdict(self, completion: Completion, p_safe: float | None) -> Verdict:
        if p_safe is None:
            return Verdict(completion.id, self.name, "unscored", reason="there is no word in the completion")
        label = "safe" if p_safe > self.settings.threshold else "unsafe"
        return Verdict(completion.id, self.name, label, p_safe=p_safe)  # type: ignore[arg-type]

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write `judge.json` (with `facts` about its training) and the weights into a folder."""
        arrays = {"idf": self._idf, "weights": self._weights, "intercept": np.array([self._intercept])}
        write_bytes_whole(folder / _WEIGHTS, save(arrays))
        described = {"kind": "ngrams", "format_version": _FORMAT_VERSION, "name": self.name, **facts}
        save_described(folder, {**described, "settings": asdict(self.settings)})

    @classmethod
    def load(cls, folder: Path) -> NgramJudge:
        """Return the judge that `save` wrote. Raises `ModelError` for a folder that holds none of this version."""
        try:
            described = json.loads((folder / JUDGE_FILE).read_text(encoding="utf-8"))
            if described["format_version"] != _FORMAT_VERSION:
                raise ModelError(
                    f"{folder / JUDGE_FILE}: format_version is {described['format_version']!r}; allowed: "
                    f"{_FORMAT_VERSION}; train the judge again"
                )
            settings = NgramSettings(**{**described["settings"], "ngrams": tuple(described["settings"]["ngrams"])})
            arrays = load_file(folder / _WEIGHTS)
            return cls(described["name"], settings, arrays["idf"], arrays["weights"], float(arrays["intercept"][0]))
        except ModelError:  # says what is wrong itself, and is a ValueError too
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"{folder}: holds no judge that can be read ({type(error).__name__}: {error}); needed: a folder that "
                "`bfpo judge-train` wrote"
            ) from error


def save_described(folder: Path, described: dict[str, Any]) -> None:
    """Write the `judge.json` that makes a folder a judge or a ranker."""
    write_bytes_whole(folder / JUDGE_FILE, (json.dumps(described, indent=2) + "\n").encode())


def fit_ngrams(
    completions: Sequence[Completion], is_safe: Sequence[bool], settings: NgramSettings, *, name: str = "ngrams"
) -> NgramJudge:
    """Return a judge trained on labelled completions; the same rows in the same order give the same judge.

    Raises `DataError` where all labels are the same, or no text has a word.
    """
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    if len(set(is_safe)) < 2:
        raise DataError(f"labels: all {len(is_safe)} are {'safe' if any(is_safe) else 'unsafe'}; both kinds are needed")
    counts = ngram_counts([_text(completion, settings) for completion in completions], settings)
    if counts.nnz == 0:
        raise DataError("completions: no text has a word to learn from")
    idf = np.asarray(TfidfTransformer().fit(counts).idf_, np.float64)
    model = LogisticRegression(C=settings.inverse_penalty, max_iter=5000)
    model.fit(tfidf_rows(counts, idf), np.asarray(is_safe, bool))
    return NgramJudge(name, settings, idf, np.asarray(model.coef_[0], np.float64), float(model.intercept_[0]))


def _text(completion: Completion, settings: NgramSettings) -> str:
    if not settings.with_prompt:
        return completion.text
    # A word of the prompt gets a mark, so that the same word in the completion is another feature.
    asked = " ".join(f"prompt_{word}" for message in completion.prompt for word in message.content.split())
    return f"{asked} {completion.text}"


def ngram_counts(texts: Sequence[str], settings: NgramSettings) -> Any:
    """Return the counts of hashed n-grams, a sparse (texts, num_features)."""
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        ngram_range=settings.ngrams, n_features=settings.num_features, alternate_sign=False, norm=None
    )
    return vectorizer.transform(texts)


def tfidf_rows(counts: Any, idf: Floats) -> Any:
    """Return rows of length 1 of (1 + log count) x idf."""
    from sklearn.preprocessing import normalize

    weighed = counts.astype(np.float64)
    weighed.data = (1 + np.log(weighed.data)) * idf[weighed.indices]
    return normalize(weighed, copy=False)


class NgramRanker:
    """Says which of two completions is more helpful from the difference of their n-grams (Bradley and Terry 1952).

    Each text gets a score, and p(first is better) is the logistic function of the difference, so that turning a pair
    round turns the opinion round. Two texts without a word are unscored.
    """

    def __init__(self, name: str, settings: NgramSettings, idf: Floats, weights: Floats) -> None:
        self.name = name
        self.settings = settings
        self._idf, self._weights = idf, weights
        digest = hashlib.sha256(json.dumps([_FORMAT_VERSION, asdict(settings)]).encode())
        digest.update(idf.tobytes() + weights.tobytes())
        self.version = f"ngram-ranker-{digest.hexdigest()[:16]}"

    def compare(self, pairs: Sequence[tuple[Completion, Completion]]) -> list[Comparison]:
        """Return the comparisons, one per pair of completions, in order."""
        if not pairs:
            return []
        counts = ngram_counts([one.text for pair in pairs for one in pair], self.settings)
        num_words = np.diff(counts.indptr)
        scores = tfidf_rows(counts, self._idf) @ self._weights
        return [
            self._comparison(pair, scores[2 * n] - scores[2 * n + 1], known=bool(num_words[2 * n : 2 * n + 2].any()))
            for n, pair in enumerate(pairs)
        ]

    def _comparison(self, pair: tuple[Completion, Completion], difference: float, *, known: bool) -> Comparison:
        ids = pair[0].id, pair[1].id
        if not known:
            return Comparison(*ids, self.name, None, reason="there is no word in either completion")
        return Comparison(*ids, self.name, float(expit(difference)))

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write `judge.json` (with `facts` about its training) and the weights into a folder."""
        write_bytes_whole(folder / _WEIGHTS, save({"idf": self._idf, "weights": self._weights}))
        described = {"kind": "ranker", "format_version": _FORMAT_VERSION, "name": self.name, **facts}
        save_described(folder, {**described, "settings": asdict(self.settings)})

    @classmethod
    def load(cls, folder: Path) -> NgramRanker:
        """Return the ranker that `save` wrote. Raises `ModelError` for a folder that holds none of this version."""
        try:
            described = json.loads((folder / JUDGE_FILE).read_text(encoding="utf-8"))
            if (described["kind"], described["format_version"]) != ("ranker", _FORMAT_VERSION):
                raise ModelError(
                    f"{folder / JUDGE_FILE}: kind is {described['kind']!r}, version {described['format_version']!r}; "
                    f"allowed for a ranker: kind 'ranker', version {_FORMAT_VERSION} (bfpo judge-train, kind=ranker)"
                )
            settings = NgramSettings(**{**described["settings"], "ngrams": tuple(described["settings"]["ngrams"])})
            arrays = load_file(folder / _WEIGHTS)
            return cls(described["name"], settings, arrays["idf"], arrays["weights"])
        except ModelError:  # says what is wrong itself, and is a ValueError too
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"{folder}: holds no ranker that can be read ({type(error).__name__}: {error}); needed: the folder "
                "`model` of a run of `bfpo judge-train` with kind=ranker"
            ) from error


def fit_ranker(pairs: Sequence[Pair], settings: NgramSettings, *, name: str = "ranker") -> NgramRanker:
    """Return a ranker trained on pairs, chosen being the more helpful one; labels of safety are not read.

    Raises `DataError` where there is no pair, or no text has a word.
    """
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    counts = (
        ngram_counts([text for pair in pairs for text in (pair.chosen, pair.rejected)], settings) if pairs else None
    )
    if counts is None or counts.nnz == 0:
        raise DataError("pairs: no text has a word to learn from")
    idf = np.asarray(TfidfTransformer().fit(counts).idf_, np.float64)
    rows = tfidf_rows(counts, idf)
    difference = rows[0::2] - rows[1::2]
    # Both orders of every pair: without an intercept neither place is preferred.
    from scipy.sparse import vstack

    model = LogisticRegression(C=settings.inverse_penalty, fit_intercept=False, max_iter=5000)
    model.fit(vstack([difference, -difference]), np.repeat([True, False], len(pairs)))
    return NgramRanker(name, settings, idf, np.asarray(model.coef_[0], np.float64))


# -------------------------------------------------------------------- what a trained judge says of its data


FEW_ROWS = 50
"""Rows of the rarer class (pairs, for a ranker) below which a judge is warned of."""
_ROWS = "trained_rows.txt"


def few_rows(name: str, trained_on: Mapping[str, Any]) -> list[str]:
    """Return a warning where training had few rows of a class (`safe`, `unsafe`; for a ranker `pairs`)."""
    kinds = [kind for kind in ("safe", "unsafe", "pairs") if isinstance(trained_on.get(kind), int)]
    few = [f"{trained_on[kind]} {kind}" for kind in kinds if trained_on[kind] < FEW_ROWS]
    if not few:
        return []
    rows = "" if "pairs" in kinds else " completions"
    return [f"{name} was trained on only {' and '.join(few)}{rows}; below {FEW_ROWS} it is hardly to be trusted"]


def trained_on_few(folder: str | Path) -> list[str]:
    """Return the warnings of `few_rows` for the judge or ranker in a folder; none where it does not say."""
    described = _described(Path(folder))
    trained_on = described.get("trained_on")
    return few_rows(str(folder), trained_on) if isinstance(trained_on, dict) else []


def write_rows(folder: Path, completions: Iterable[Completion]) -> None:
    """Write a digest of each text that a judge is trained on into its folder, so that a check can tell seen ones."""
    write_text_whole(folder / _ROWS, "".join(f"{digest}\n" for digest in sorted(set(map(_digest, completions)))))


def seen_rows(folder: str | Path, completions: Sequence[Completion]) -> list[str]:
    """Return a warning where the judge in a folder was trained on some of these texts."""
    try:
        known = set((Path(folder) / _ROWS).read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError):  # no judge of this version
        return []
    seen = sum(_digest(completion) in known for completion in completions)
    if not seen:
        return []
    return [
        f"{seen} of {len(completions)} texts are among those that {folder} was trained on, whose labels it knows: the "
        "figures flatter it; check it on other texts"
    ]


def _digest(completion: Completion) -> str:
    words = [[[message.role, message.content] for message in completion.prompt], completion.text]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def _described(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / JUDGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the judge itself says what is wrong with its folder
        return {}
    return found if isinstance(found, dict) else {}
